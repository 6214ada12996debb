"""Which files of a run go to the Hub: the student's own, the card, the facts, plots; nothing else."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..core.escape import html_text
from ..core.local_paths import typed_paths, with_reduced_keys, without_local_paths
from ..core.references import is_id
from ..errors import DistillError
from ..model_card import FILE, CardData, Figure, build_card
from ..models.sidecar import SIDECAR
from ..runner.run_results import WRITTEN_BY, Run
from .repository import CARD, with_digests

# What from_pretrained reads. Never: pickles, checkpoints' state, projectors (sidecar.safetensors).
_WEIGHTS = re.compile(
    r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors|mtp\.safetensors|model\.safetensors\.index\.json"
)
_BESIDE = re.compile(
    r"(config|generation_config|adapter_config|mtp|vocab|tokenizer|tokenizer_config|special_tokens_map|added_tokens|"
    r"chat_template|preprocessor_config|processor_config)\.json|chat_template\.jinja|merges\.txt|vocab\.txt|"
    r"spiece\.model|tokenizer\.model|sentencepiece\.bpe\.model|[\w-]+\.tiktoken|[a-z_]+\.py"
)
_ADAPTER = "adapter_config.json"
_LISTS = (
    "tokenizer.json",
    "vocab.json",
    "added_tokens.json",
    "model.safetensors.index.json",
)  # tokens, tensors: no paths
# What the plots of a report show.
_SHOWS = {
    "closeness": "KL to the teacher and agreement with it while training",
    "curve": "NLL of held-out rows over tokens",
    "entropies": "Entropy of teacher and student while training",
    "losses": "The terms of the loss while training",
    "retention": "Percent of the teacher's score that was kept, with intervals",
    "sources": "The loss of each source while training",
    "teacher_entropy": "How sure the teacher is: entropy of its tokens",
    "teacher_t": "What the temperature does to the teacher's probabilities",
    "temperature": "The search of T and alpha",
}


@dataclass(frozen=True)
class Contents:
    """What is uploaded.

    files:    path in the repository -> a file, or its bytes
    left_out: names in the student's folder that are not
    notes:    what others will stumble over
    """

    files: dict[str, Path | bytes]
    left_out: list[str]
    notes: list[str]


def contents_of(run: Run, facts: CardData, report: bool = False) -> Contents:
    """A student's files, its card and its facts.

    Args:
        run: see `open_run`.
        facts: see `run_card_data`.
        report: the page too.

    Raises:
        DistillError: the student or the report is not there; weights hold what is no part of the student.
    """
    folder = run.path("student")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    weights = [name for name in names if _WEIGHTS.fullmatch(name)]
    if not any(name.endswith(".safetensors") for name in weights):
        raise DistillError(f"{folder} holds no safetensors: `{WRITTEN_BY['student']}` writes them.")
    for name in weights:
        if name.endswith(".safetensors"):
            _check_weights(folder / name)
    files: dict[str, Path | bytes] = {n: folder / n for n in names if _WEIGHTS.fullmatch(n) or _BESIDE.fullmatch(n)}
    configs = [n for n in files if n.endswith(".json") and n not in _LISTS and n != _ADAPTER]
    left_out = [name for name in names if name not in files and name not in (CARD, FILE)]
    drawn = sorted((run.folder / "figures").glob("*.png"))
    figures = [Figure(f"figures/{path.name}", _SHOWS.get(path.stem, path.stem)) for path in drawn]
    files |= {figure.path: path for figure, path in zip(figures, drawn, strict=True)}
    if report:
        files["report.html"] = _report(run)
    notes: list[str] = []
    if _ADAPTER in files:
        files[_ADAPTER], notes = _adapter_config(folder / _ADAPTER, facts)
    files |= {n: _without_places(folder / n) for n in configs}
    files[CARD] = build_card(facts, figures).content.encode()
    files[FILE] = _json(with_digests(facts.as_json(), {name: _digest(file) for name, file in files.items()}))
    return Contents(files, left_out, notes)


def _report(run: Run) -> bytes:
    """The report without paths of this machine; those of the recipe may be relative."""
    known = [html_text(path) for path in typed_paths(run.recipe.model_dump(exclude_none=True))]
    return without_local_paths(run.path("report.html").read_text(), known).encode()


def _without_places(file: Path) -> Path | bytes:
    """A model's config whose values name no path of this machine; the file itself where none did."""
    values = _read(file)
    changed = with_reduced_keys(values)
    return file if changed == values else _json(changed)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise DistillError(f"{file} is not JSON ({error}): train or save the student again.") from None


def _adapter_config(file: Path, facts: CardData) -> tuple[bytes, list[str]]:
    """Of adapters: with the id of their base, where it is known; else what others need to be told."""
    values = _read(file)
    own, base = values.get("base_model_name_or_path"), facts.student.get("base_model")
    if base:
        values["base_model_name_or_path"] = base
    elif not is_id(own):
        return _json(with_reduced_keys(values)), [
            f"The adapters' base is a folder of this machine ({own}), and others cannot load them: give --base-model "
            "ID, or set `export: merged` in the recipe."
        ]
    return _json(values), []


def _check_weights(file: Path) -> None:
    try:
        with safe_open(file, "pt") as weights:
            foreign = [name for name in weights.keys() if SIDECAR in name.split(".")]  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError) as error:
        raise DistillError(f"{file} is damaged ({error}): train or save the student again.") from error
    if foreign:
        raise DistillError(
            f"{file} holds {foreign[0]} and {len(foreign) - 1} more, which were trained beside the student and are no "
            "part of it: save it with `trainer.save_model()`."
        )


def _digest(file: Path | bytes) -> str:
    if isinstance(file, bytes):
        return hashlib.sha256(file).hexdigest()
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()
