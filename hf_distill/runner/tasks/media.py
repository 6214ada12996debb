"""Checks of images and audio: their files, and whether teacher and student read them in the same way."""

import json
from typing import Any

from datasets import Dataset

from ...core.references import path_exists, reference_kind
from ...errors import DistillError
from ...recipe.schema import Recipe
from ..model_loading import load_pretrained

# Keys of a saved processor that do not change what it makes of an image or a recording.
_NAMES = ("processor_class", "image_processor_type", "feature_extractor_type", "tokenizer", "_name_or_path")


def check_no_nulls(rows: Dataset, column: str, where: str) -> None:
    """Check that every row has a value in a column.

    Args:
        rows: Rows of a data set.
        column: The column.
        where: The data set, for error messages.

    Raises:
        DistillError: A row has none.
    """
    if count := rows.data.column(column).null_count:
        raise DistillError(f"{where}: {count} of {len(rows)} rows have no {column}: remove them.")


def check_files(rows: Dataset, column: str, where: str, path: str) -> None:
    """Check that the files that a column names exist, and that the data that names them is local.

    Args:
        rows: Rows of a data set.
        column: The column.
        where: The data set, for error messages.
        path: Its path, id or address.

    Raises:
        DistillError: Some do not exist, or a data set of the Hub names files of this machine.
    """
    if reference_kind(path) != "path":
        raise DistillError(
            f"{where}: the column {column!r} holds paths, and only local data may name files of this machine. Use a "
            "data set that holds the files themselves."
        )
    names = rows.unique(column)
    missing = [name for name in names if not ("://" in name or path_exists(name))]
    if missing:
        raise DistillError(
            f"{where}: {len(missing)} of {len(names)} files of the column {column!r} do not exist, such as "
            f"{missing[0]!r}. Paths are relative to the folder in which the command runs."
        )


def check_same_processing(recipe: Recipe, processor: Any, kind: Any, part: str | None = None) -> None:
    """Check that the frozen teachers of a recipe read the same inputs as the student.

    Args:
        recipe: The recipe.
        processor: The student's processor.
        kind: Auto class of processors.
        part: The attribute of the processor that makes the inputs; None: the processor itself.

    Raises:
        DistillError: The processor of a teacher makes other inputs.
    """
    settings = _settings(processor, part)
    for spec in recipe.all_teachers:
        if spec.kind != "frozen" or spec.loaded_model in (None, recipe.tokenizer_model):
            continue
        other = _settings(load_pretrained(kind, str(spec.model), revision=spec.revision), part)
        if differing := [key for key in sorted({*settings, *other}) if settings.get(key) != other.get(key)]:
            key = differing[0]
            raise DistillError(
                f"The teacher {spec.model} and the student {recipe.tokenizer_model} read other inputs: their "
                f"processors differ in {', '.join(differing)} ({key} is {other.get(key)} for the teacher and "
                f"{settings.get(key)} for the student). Use a student with the processor of the teacher, or "
                "DistillTrainer in a script."
            )


def _settings(processor: Any, part: str | None) -> dict[str, Any]:
    values = json.loads((getattr(processor, part) if part else processor).to_json_string())
    return {key: value for key, value in values.items() if key not in _NAMES}
