"""Select the files of a run that are published: the student's files, the card, distillation.json and plots."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..core import run_files
from ..core.escape import html_text
from ..core.json_types import JSONObject
from ..core.local_paths import typed_paths, with_reduced_keys, without_local_paths
from ..core.references import is_id
from ..errors import DistillError
from ..model_card import FILE, CardData, Figure, build_card
from ..models.sidecar import SIDECAR
from ..runner.run_results import WRITTEN_BY, Run
from .repository import CARD, with_digests

# Only what from_pretrained reads: no pickles, no training state, no projectors (sidecar.safetensors).
_WEIGHTS = re.compile(
    r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors|mtp\.safetensors|model\.safetensors\.index\.json"
)
_CONFIGS_AND_TOKENIZERS = re.compile(
    r"(config|generation_config|adapter_config|mtp|vocab|tokenizer|tokenizer_config|special_tokens_map|added_tokens|"
    r"chat_template|preprocessor_config|processor_config)\.json|chat_template\.jinja|merges\.txt|vocab\.txt|"
    r"spiece\.model|tokenizer\.model|sentencepiece\.bpe\.model|[\w-]+\.tiktoken|[a-z_]+\.py"
)
_ADAPTER = "adapter_config.json"
_WITHOUT_PATHS = (  # tokens or tensor names
    "tokenizer.json",
    "vocab.json",
    "added_tokens.json",
    "model.safetensors.index.json",
)
# Captions of the plots of a report.
_CAPTIONS = {
    "closeness": "KL to the teacher and top-1 agreement with it during training",
    "curve": "NLL of held-out rows over training tokens",
    "entropies": "Entropy of teacher and student during training",
    "losses": "The loss terms during training",
    "retention": "Student score in percent of the teacher's, with confidence intervals",
    "sources": "The loss of each data source during training",
    "teacher_entropy": "Entropy of the teacher's predictions",
    "teacher_t": "The teacher's probabilities at several temperatures",
    "temperature": "The search over T and alpha",
}


@dataclass(frozen=True)
class Contents:
    """The files to publish.

    files:    path in the repository -> a local file, or bytes
    left_out: names of files in the student's folder that are not published
    notes:    problems that users of the model will have
    """

    files: dict[str, Path | bytes]
    left_out: list[str]
    notes: list[str]


def collect_files(run: Run, card_data: CardData, report: bool = False) -> Contents:
    """Collect a student's files, its model card and distillation.json.

    Args:
        run: see `open_run`.
        card_data: see `run_card_data`.
        report: also publish report.html.

    Raises:
        DistillError: the student or the report is missing; the weights contain tensors that are not the student's.
    """
    folder = run.path("student")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    weights = [name for name in names if _WEIGHTS.fullmatch(name)]
    if not any(name.endswith(".safetensors") for name in weights):
        raise DistillError(f"{folder} has no safetensors weights. `{WRITTEN_BY['student']}` writes them.")
    for name in weights:
        if name.endswith(".safetensors"):
            _check_weights(folder / name)
    files: dict[str, Path | bytes] = {
        n: folder / n for n in names if _WEIGHTS.fullmatch(n) or _CONFIGS_AND_TOKENIZERS.fullmatch(n)
    }
    configs = [n for n in files if n.endswith(".json") and n not in _WITHOUT_PATHS and n != _ADAPTER]
    left_out = [name for name in names if name not in files and name not in (CARD, FILE)]
    plots = sorted((run.folder / "figures").glob("*.png"))
    figures = [Figure(f"figures/{path.name}", _CAPTIONS.get(path.stem, path.stem)) for path in plots]
    files |= {figure.path: path for figure, path in zip(figures, plots, strict=True)}
    if report:
        files[run_files.REPORT] = _report(run)
    notes: list[str] = []
    if _ADAPTER in files:
        files[_ADAPTER], notes = _adapter_config(folder / _ADAPTER, card_data)
    files |= {n: _without_local_paths(folder / n) for n in configs}
    files[CARD] = build_card(card_data, figures).content.encode()
    files[FILE] = _json(with_digests(card_data.as_json(), {name: _digest(file) for name, file in files.items()}))
    return Contents(files, left_out, notes)


def _report(run: Run) -> bytes:
    """Return the report without local paths, including the relative ones of the recipe."""
    known = [html_text(path) for path in typed_paths(run.recipe.model_dump(exclude_none=True))]
    return without_local_paths(run.path(run_files.REPORT).read_text(), known).encode()


def _without_local_paths(file: Path) -> Path | bytes:
    """Return a model's config without local paths; the file itself where it has none."""
    values = _read(file)
    changed = with_reduced_keys(values)
    return file if changed == values else _json(changed)


def _read(file: Path) -> JSONObject:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise DistillError(f"{file} is not valid JSON ({error}). Train or save the student again.") from None


def _adapter_config(file: Path, card_data: CardData) -> tuple[bytes, list[str]]:
    """Return adapter_config.json with the id of the base model; without an id, a note that others cannot load it."""
    values = _read(file)
    local_base, base = values.get("base_model_name_or_path"), card_data.student.get("base_model")
    if base:
        values["base_model_name_or_path"] = base
    elif not is_id(local_base):
        return _json(with_reduced_keys(values)), [
            f"The base model of the adapters is a local folder ({local_base}), so others cannot load them. Pass "
            "--base-model ID, or set `export: merged` in the recipe."
        ]
    return _json(values), []


def _check_weights(file: Path) -> None:
    try:
        with safe_open(file, "pt") as weights:
            foreign = [name for name in weights.keys() if SIDECAR in name.split(".")]  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError) as error:
        raise DistillError(f"{file} is damaged ({error}). Train or save the student again.") from error
    if foreign:
        raise DistillError(
            f"{file} contains {foreign[0]} and {len(foreign) - 1} more tensors of modules that were trained with the "
            "student but are not part of it. Save the student with `trainer.save_model()`."
        )


def _digest(file: Path | bytes) -> str:
    if isinstance(file, bytes):
        return hashlib.sha256(file).hexdigest()
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _json(values: object) -> bytes:
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()
