"""Licenses of models: what a teacher's license requires of a student. Facts of the license texts, no legal advice."""

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import metadata as package_metadata
from pathlib import Path

from huggingface_hub import ModelCard, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError

from ..core.references import distribution_of, reference_kind
from .errors import translate_hub_errors
from .malformed import reading


@dataclass(frozen=True)
class License:
    """The license of a model, as its card states it.

    id:      the id that the Hub uses, such as apache-2.0; None: the card states no license
    link:    the link to the license text, if the id is `other`
    forbids: the sentence of the card that forbids training other models with this one; None: there is none
    """

    id: str | None
    link: str | None = None
    forbids: str | None = None


_LLAMA_BAN = "forbids using its outputs to improve any other large language model than Llama itself"
_LLAMA_NAMING = (
    'requires that a model trained on its outputs has a name that begins with "Llama" and is displayed with "Built '
    'with Llama"'
)
_QWEN = 'requires that a model trained on its outputs is displayed with "Built with Qwen" or "Improved using Qwen"'
_GEMMA = "counts a model that learns from its outputs as a derivative, which stays under its terms"
_TERMS = {
    "llama2": _LLAMA_BAN,
    "llama3": _LLAMA_BAN,
    **dict.fromkeys(("llama3.1", "llama3.2", "llama3.3", "llama4"), _LLAMA_NAMING),
    **dict.fromkeys(("qwen", "qwen-research", "tongyi-qianwen", "tongyi-qianwen-research"), _QWEN),
    "gemma": _GEMMA,
}
_PERMISSIVE = re.compile(
    r"apache-2\.0|mit|bsd.*|isc|cc0-1\.0|cc-by-[0-9.]+|unlicense|wtfpl|zlib|artistic-2\.0|afl-3\.0|ecl-2\.0|ms-pl|"
    r"postgresql|ncsa|cdla-permissive-.*|odc-by|pddl|bsl-1\.0"
)
_BASE = "the student's base model"
_CARD = "README.md"
_CARD_TIMEOUT_SECONDS = 5.0
_NO_DERIVATIVES = re.compile(r"cc-by(-nc)?-nd.*")


@dataclass(frozen=True)
class LicenseDecision:
    """The license of a student.

    id:        the license that the student gets
    notes:     further requirements of the licenses of teachers and base
    conflicts: reasons not to publish the student under this license; its author may accept them
    """

    id: str | None
    notes: list[str]
    conflicts: list[str]


def decide_license(
    teachers: dict[str, License], base: License | None, name: str, requested: str | None = None
) -> LicenseDecision:
    """Decide which license a student gets.

    Args:
        teachers: license of each teacher, by name. If the student was cut from a teacher, that one is its base too.
        base: license of the model whose weights the student began with.
        name: the student's repository, org/name.
        requested: the license that the author requests; None: it is inherited.
    """
    notes, conflicts, binding = list[str](), list[str](), dict[str, str]()
    for owner, license in {**teachers, **({_BASE: base} if base else {})}.items():
        if license.forbids:
            conflicts.append(f"{owner}: its card says: “{license.forbids}”")
        if license.id is None:
            conflicts.append(f"{owner}: its license is not known")
            continue
        if license.id == "other":
            conflicts.append(
                f"{owner}: it has a custom license ({license.link or 'without a link to the text'}): read it"
            )
        if terms := _TERMS.get(license.id):
            is_violated = {
                _LLAMA_BAN: base is not None and not str(base.id).startswith("llama"),
                _LLAMA_NAMING: not name.rpartition("/")[2].lower().startswith("llama"),
            }
            (conflicts if is_violated.get(terms) else notes).append(f"{owner}: {license.id} {terms}")
        if _NO_DERIVATIVES.fullmatch(license.id):
            conflicts.append(f"{owner}: {license.id} allows no derivatives")
        is_passed_on = terms in (None, _GEMMA) or owner == _BASE
        if not _PERMISSIVE.fullmatch(license.id) and license.id != "other" and is_passed_on:
            binding[license.id] = owner
    if len(binding) > 1:
        each = ", ".join(f"{owner} requires {license_id}" for license_id, owner in binding.items())
        conflicts.append(f"the licenses require different licenses of the student: {each}")
    inherited = next(iter(binding), None) or (base.id if base else None)
    inherited = inherited or next((license.id for license in teachers.values() if license.id), None)
    if requested and binding and requested not in binding:
        conflicts.append(f"{requested} is requested, but {binding[str(inherited)]} requires {inherited}")
    return LicenseDecision(requested or inherited, notes, conflicts)


def get_license(model: str, revision: str | None = None, retries: bool = True) -> License:
    """Return the license of a model: from its card on the Hub or in its folder, or from the package that contains it.

    Args:
        model: a model reference, see `references.reference_kind`.
        revision: the revision of a model on the Hub.
        retries: whether a request to the Hub that fails is repeated, with pauses that grow.

    Raises:
        DistillError: see `translate_hub_errors`.
    """
    match reference_kind(model):
        case "smoke":
            return License("apache-2.0")  # the license of this project
        case "package":
            return License(_package_license(model))
        case "path":
            readme = Path(model) / _CARD
            return _card_file_license(model, readme) if readme.is_file() else License(None)
    with translate_hub_errors(model, "model", revision):
        try:
            if not retries and not isinstance(try_to_load_from_cache(model, _CARD, revision=revision), str):
                # A download of a file that is not in the cache repeats the request; this asks once.
                get_hf_file_metadata(hf_hub_url(model, _CARD, revision=revision), timeout=_CARD_TIMEOUT_SECONDS)
            readme = Path(hf_hub_download(model, _CARD, revision=revision))
        except RemoteEntryNotFoundError:
            return License(None)
    return _card_file_license(model, readme)


def _card_file_license(model: str, readme: Path) -> License:
    with reading(f"The card of {model}"):
        return card_license(ModelCard.load(readme))


def card_license(card: ModelCard) -> License:
    """Return the license that a model card states."""
    metadata = card.data.to_dict()
    ids = metadata.get("license")
    first = ids[0] if isinstance(ids, list) and ids else ids
    return License(str(first).lower() if first else None, metadata.get("license_link"), find_training_ban(card.text))


def _package_license(name: str) -> str | None:
    try:
        package = package_metadata(distribution_of(name))
    except PackageNotFoundError:
        return None
    text = package["License-Expression"] or package["License"] or ""
    return text.strip().lower() if re.fullmatch(r"[\w.+-]+", text.strip()) else None


_NEGATION = re.compile(r"\b(not|never|prohibit\w*|forbid\w*|forbidden|disallow\w*|no)\b", re.IGNORECASE)
_TRAINING = re.compile(r"\b(train\w*|distil\w*|improv\w*|develop\w*)\b", re.IGNORECASE)
_OTHER_MODELS = re.compile(r"\b(other|another|competing|student|different)\b[^.]*\bmodels?\b", re.IGNORECASE)


def find_training_ban(text: str) -> str | None:
    """Return the sentence of a card that forbids training other models with the model or its outputs, or None."""
    for sentence in re.split(r"(?<=[.!?])\s+|\n{2,}|\n[-*#]+ ", text):
        if all(part.search(sentence) for part in (_NEGATION, _TRAINING, _OTHER_MODELS)) and len(sentence) < 600:
            return " ".join(sentence.split()).lstrip("-*#> ")
    return None
