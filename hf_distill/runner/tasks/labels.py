"""The labels of classifiers in recipes: their names, from the data and the teacher, and their ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from datasets import ClassLabel, Dataset, Value
from transformers import AutoConfig, PretrainedConfig

from ...errors import DistillError, did_you_mean
from ...recipe.schema import Recipe
from ..model_loading import load_pretrained

LABELS = "labels"  # name of the column of the rows
_SHOWN = 5  # labels in an error message


@dataclass(frozen=True)
class Labels:
    """The classes of a classifier.

    Attributes:
        names: Name of each class, in the order of the ids.
        is_named: Whether the names are more than LABEL_0, LABEL_1, ...
    """

    names: tuple[str, ...]
    is_named: bool = True

    def model_options(self) -> dict[str, Any]:
        """Return the fields of a model's config."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: i for i, name in enumerate(self.names)},
        }

    @classmethod
    def of_config(cls, config: PretrainedConfig) -> "Labels":
        """Return the classes of a model."""
        names_by_id = {int(i): str(name) for i, name in (config.id2label or {}).items()}
        names = tuple(names_by_id[i] for i in sorted(names_by_id))
        return cls(names, not all(name.startswith("LABEL_") for name in names))

    @classmethod
    def numbered(cls, count: int) -> "Labels":
        """Return classes without names, as those of transformers."""
        return cls(tuple(f"LABEL_{i}" for i in range(count)), is_named=False)


def labels_of_models(recipe: Recipe) -> tuple[Labels, str] | None:
    """Return the classes of the first frozen teacher, or of a student whose classes have names, and whose they are.

    Raises:
        DistillError: A config cannot be loaded.
    """
    frozen = [spec for spec in recipe.all_teachers if spec.kind == "frozen" and spec.loaded_model]
    spec: Any = frozen[0] if frozen else recipe.student
    labels = Labels.of_config(load_pretrained(AutoConfig, str(spec.model), revision=spec.revision))
    if not frozen and not labels.is_named:
        return None  # the default of a model without a classification head
    return labels, f"the {'teacher' if frozen else 'student'} {spec.model}"


def find_labels(columns: Mapping[str, tuple[Dataset, str]], of_model: tuple[Labels, str] | None) -> Labels:
    """Return the classes of a recipe: those of the model if it has names for them, else those of the data.

    Args:
        columns: Name of a data set -> its rows, and the name of the column with the labels.
        of_model: See `labels_of_models`.

    Raises:
        DistillError: The data has other labels than the model, or labels that are no classes.
    """
    names = {where: _names(rows, column, where) for where, (rows, column) in columns.items()}
    unnamed = [where for where, each in names.items() if each is None]
    if unnamed and len(unnamed) < len(names):
        raise DistillError(
            f"{', '.join(unnamed)} has numbers as labels, and the other data has names: give all data the same labels."
        )
    names_in_data = list(dict.fromkeys(name for each in names.values() for name in each or ()))
    if not all(_is_class_label(rows, column) for rows, column in columns.values()):
        names_in_data.sort()
    if of_model is not None and (of_model[0].is_named or unnamed):
        labels, owner = of_model
        if missing := [name for name in names_in_data if name not in labels.names]:
            raise DistillError(
                f"The data has labels that {owner} does not have: {_list(missing)}"
                f"{did_you_mean(missing[0], labels.names)}. Its labels are {_list(labels.names)}. Give the data the "
                "same labels, or use a teacher that was trained on these."
            )
        return labels
    if of_model is not None and len(names_in_data) != len(of_model[0].names):
        raise DistillError(
            f"The data has {len(names_in_data)} labels ({_list(names_in_data)}), and {of_model[1]} has "
            f"{len(of_model[0].names)} classes: use data and a teacher with the same labels."
        )
    if names_in_data:
        return Labels(tuple(names_in_data))
    return Labels.numbered(max(2, *(max(_numbers(rows, column, w)) + 1 for w, (rows, column) in columns.items())))


def with_label_ids(rows: Dataset, column: str, labels: Labels, where: str) -> Dataset:
    """Return rows with a column `labels`, the id of the class of each row, in place of the column of the data.

    Args:
        rows: Rows of a data set.
        column: Name of the column with the labels.
        labels: The classes.
        where: The data set, for error messages.

    Raises:
        DistillError: A row has no label, or one that is no class.
    """
    names = _names(rows, column, where)
    if names is None:
        ids = _numbers(rows, column, where)
        if (largest := max(ids)) >= len(labels.names):
            raise DistillError(
                f"{where} has the label {largest}, and there are {len(labels.names)} classes: the labels must be from "
                f"0 to {len(labels.names) - 1}."
            )
    else:
        feature, index = rows.features[column], {name: i for i, name in enumerate(labels.names)}
        values = rows[column]
        if isinstance(feature, ClassLabel):
            numbers = _numbers(rows, column, where)
            values = [names[number] for number in numbers]
        ids = [index[value] for value in values]
    return rows.remove_columns(column).add_column(LABELS, ids)


def _is_class_label(rows: Dataset, column: str) -> bool:
    return isinstance(rows.features[column], ClassLabel)


def _names(rows: Dataset, column: str, where: str) -> list[str] | None:
    """Return the names of the labels of a data set; None if they are numbers without names."""
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    dtype = feature.dtype if isinstance(feature, Value) else type(feature).__name__
    if dtype in ("string", "large_string"):
        values = rows.unique(column)
        if None in values:
            raise DistillError(f"{where}: some rows have no label in the column {column!r}: remove them.")
        are_numbers = all(value.isascii() and value.isdecimal() for value in values)  # a CSV file holds texts only
        return None if are_numbers else sorted(values)
    if dtype.startswith(("int", "uint", "bool")):
        return None
    raise DistillError(
        f"{where}: the column {column!r} has the type {dtype}, and a label of a recipe is one class of each row: "
        "a name or a whole number. For several labels of a row, or regression, use DistillTrainer in a script."
    )


def _numbers(rows: Dataset, column: str, where: str) -> list[int]:
    values = cast(Sequence[Any], rows[column])
    if any(value is None or int(value) < 0 for value in values):
        raise DistillError(
            f"{where}: some rows have no label in the column {column!r} (null, or below 0): remove them."
        )
    return [int(value) for value in values]


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
