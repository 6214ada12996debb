"""Licences of models: what a teacher's says of those that learn from it. Facts of the licences' texts, no advice."""

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from ..core.references import distribution_of, reference_kind
from .errors import translate_hub_errors
from .malformed import reading


@dataclass(frozen=True)
class License:
    """What a model's card says.

    id:      as the Hub writes it, such as apache-2.0; None: it does not say
    link:    to its text, where it is `other`
    forbids: the sentence of the card that forbids training other models with it; None: there is none
    """

    id: str | None
    link: str | None = None
    forbids: str | None = None


_LLAMA_OLD = "forbids using its outputs to improve any other large language model than Llama itself"
_LLAMA = (
    'wants a model trained on its outputs to have a name that begins with "Llama", and "Built with Llama" beside it'
)
_QWEN = 'wants "Built with Qwen" or "Improved using Qwen" beside a model trained on its outputs'
_GEMMA = "counts a model that learns from its outputs as a derivative, which stays under its terms"
_NAMED = {
    "llama2": _LLAMA_OLD,
    "llama3": _LLAMA_OLD,
    **dict.fromkeys(("llama3.1", "llama3.2", "llama3.3", "llama4"), _LLAMA),
    **dict.fromkeys(("qwen", "qwen-research", "tongyi-qianwen", "tongyi-qianwen-research"), _QWEN),
    "gemma": _GEMMA,
}
_FREE = re.compile(
    r"apache-2\.0|mit|bsd.*|isc|cc0-1\.0|cc-by-[0-9.]+|unlicense|wtfpl|zlib|artistic-2\.0|afl-3\.0|ecl-2\.0|ms-pl|"
    r"postgresql|ncsa|cdla-permissive-.*|odc-by|pddl|bsl-1\.0"
)
_NO_DERIVATIVES = re.compile(r"cc-by(-nc)?-nd.*")


@dataclass(frozen=True)
class LicenseDecision:
    """A student's licence.

    id:        that it gets
    notes:     what the licences of teacher and student ask for beside that
    conflicts: why it may not be published like this; its author may know better
    """

    id: str | None
    notes: list[str]
    conflicts: list[str]


def decide_license(
    teachers: dict[str, License], base: License | None, name: str, wanted: str | None = None
) -> LicenseDecision:
    """The licence of a student.

    Args:
        teachers: by name; that of the one it was cut from is its base's.
        base: of the model whose weights the student began with.
        name: of the student's repository, org/name.
        wanted: the licence that its author wants; None: inherited.
    """
    notes, conflicts, binding = list[str](), list[str](), dict[str, str]()
    for who, licence in {**teachers, **({"the student's own base": base} if base else {})}.items():
        if licence.forbids:
            conflicts.append(f"{who}: its card says: “{licence.forbids}”")
        if licence.id is None:
            conflicts.append(f"{who}: nobody says under which licence it is")
            continue
        if licence.id == "other":
            conflicts.append(f"{who}: its licence is one of its own ({licence.link or 'no link to it'}): read it")
        if says := _NAMED.get(licence.id):
            stranger = base is not None and not str(base.id).startswith("llama")
            breaks = {_LLAMA_OLD: stranger, _LLAMA: not name.rpartition("/")[2].lower().startswith("llama")}
            (conflicts if breaks.get(says) else notes).append(f"{who}: {licence.id} {says}")
        if _NO_DERIVATIVES.fullmatch(licence.id):
            conflicts.append(f"{who}: {licence.id} allows no derivatives")
        passes_on = says in (None, _GEMMA) or who == "the student's own base"
        if not _FREE.fullmatch(licence.id) and licence.id != "other" and passes_on:
            binding[licence.id] = who
    if len(binding) > 1:
        each = ", ".join(f"{who} {licence}" for licence, who in binding.items())
        conflicts.append(f"the licences bind to different ones: {each}")
    own = next(iter(binding), None) or (base.id if base else None)
    own = own or next((licence.id for licence in teachers.values() if licence.id), None)
    if wanted and binding and wanted not in binding:
        conflicts.append(f"{wanted} is wanted, and {own} is what {binding[str(own)]} passes on")
    return LicenseDecision(wanted or own, notes, conflicts)


def licence_of(model: str, revision: str | None = None) -> License:
    """The licence of a model: of its card on the Hub or in its folder, or of the package that brings it.

    Args:
        model: see `names.kind_of`.
        revision: of an id.

    Raises:
        DistillError: see `translate_hub_errors`.
    """
    match reference_kind(model):
        case "smoke":
            return License("apache-2.0")  # the project's own
        case "package":
            return License(_of_package(model))
        case "path":
            readme = Path(model) / "README.md"
            return _of_file(model, readme) if readme.is_file() else License(None)
    with translate_hub_errors(model, "model", revision):
        try:
            readme = Path(hf_hub_download(model, "README.md", revision=revision))
        except RemoteEntryNotFoundError:
            return License(None)
    return _of_file(model, readme)


def _of_file(model: str, readme: Path) -> License:
    with reading(f"The card of {model}"):
        return of_card(ModelCard.load(readme))


def of_card(card: ModelCard) -> License:
    """What a card says."""
    said = card.data.to_dict()
    own = said.get("license")
    own = own[0] if isinstance(own, list) and own else own
    return License(str(own).lower() if own else None, said.get("license_link"), find_training_ban(card.text))


def _of_package(name: str) -> str | None:
    try:
        known = metadata(distribution_of(name))
    except PackageNotFoundError:
        return None
    said = known["License-Expression"] or known["License"] or ""
    return said.strip().lower() if re.fullmatch(r"[\w.+-]+", said.strip()) else None


_NOT = re.compile(r"\b(not|never|prohibit\w*|forbid\w*|forbidden|disallow\w*|no)\b", re.IGNORECASE)
_TRAIN = re.compile(r"\b(train\w*|distil\w*|improv\w*|develop\w*)\b", re.IGNORECASE)
_OTHERS = re.compile(r"\b(other|another|competing|student|different)\b[^.]*\bmodels?\b", re.IGNORECASE)


def find_training_ban(text: str) -> str | None:
    """The sentence of a card that forbids training other models with the model or its outputs; None: there is none."""
    for sentence in re.split(r"(?<=[.!?])\s+|\n{2,}|\n[-*#]+ ", text):
        if all(part.search(sentence) for part in (_NOT, _TRAIN, _OTHERS)) and len(sentence) < 600:
            return " ".join(sentence.split()).lstrip("-*#> ")
    return None
