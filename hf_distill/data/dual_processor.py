"""`DualProcessorCollator`: batches for a student and a teacher that have different processors."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin

from ..core.targets import IGNORE_INDEX, TEACHER_PREFIX
from ..core.teacher_inputs import is_teacher_key
from ..errors import DistillError

Row: TypeAlias = Mapping[str, Any]
Collate: TypeAlias = Callable[[list[dict[str, Any]]], Mapping[str, Any]]
Processor: TypeAlias = ImageProcessingMixin | FeatureExtractionMixin | PreTrainedTokenizerBase | ProcessorMixin

RAW_COLUMNS = ("image", "audio", "text", "text_pair")
_LABEL_COLUMNS = ("labels", "label", "label_ids")
_PARTS = {"image": "image_processor", "audio": "feature_extractor", "text": "tokenizer"}  # of a `ProcessorMixin`
_MAX_LENGTH = 10**6  # tokenizers without a limit have a larger `model_max_length`


class DualProcessorCollator:
    """Makes the batch of the student, and the inputs of a teacher with another processor as `teacher_<name>`.

    A processor makes the inputs from the raw columns of the rows: an image processor from `image`, a feature extractor
    from `audio`, a tokenizer from `text`, and `text_pair` if the rows have it. It pads to the longest row of the batch,
    or as it does by default, and a tokenizer cuts texts at its `model_max_length`. Labels come from the column `label`
    or `labels`: numbers, or lists of ids, which are padded with -100.

    A collator can take the place of a processor. A collator of transformers gets the rows without the raw columns; for
    the teacher, it gets the columns `teacher_<name>` under `<name>`, such as those of a data set that was tokenized
    with both tokenizers. Any other function gets the rows and returns a batch.

    `DistillTrainer` keeps the raw columns of a data set, so `remove_unused_columns` does not have to be changed.

    Args:
        student: the student's image processor, feature extractor, tokenizer or processor; or a collator.
        teacher: the teacher's.
        student_kwargs: arguments for calls of the student's processor, such as {"max_length": 128}.
        teacher_kwargs: arguments for calls of the teacher's processor.
        columns: names of further columns that the collators read, which the trainer keeps.

    Raises:
        DistillError: an argument has a wrong type.

    Example:
        collator = DualProcessorCollator(student_image_processor, teacher_image_processor)
        batch = collator([{"image": image, "label": 3}])  # pixel_values, labels, teacher_pixel_values
    """

    def __init__(
        self,
        student: Processor | Collate,
        teacher: Processor | Collate,
        *,
        student_kwargs: Mapping[str, Any] | None = None,
        teacher_kwargs: Mapping[str, Any] | None = None,
        columns: Sequence[str] = (),
    ):
        for role, each, kwargs in (("student", student, student_kwargs), ("teacher", teacher, teacher_kwargs)):
            if isinstance(each, type) or not callable(each):
                raise DistillError(
                    f"The {role} of a DualProcessorCollator is {each!r}: give an image processor, a feature extractor, "
                    "a tokenizer, a processor, or a collator."
                )
            if kwargs and not isinstance(each, Processor):
                raise DistillError(
                    f"{role}_kwargs {sorted(kwargs)} are for calls of a processor, and the {role}'s is a collator: set "
                    "its options when you create it."
                )
        if isinstance(columns, str):
            raise DistillError(f"columns is {columns!r}: give a list of names.")
        self.student, self.teacher = student, teacher
        self.student_kwargs, self.teacher_kwargs = dict(student_kwargs or {}), dict(teacher_kwargs or {})
        self.raw_columns = (*RAW_COLUMNS, *columns)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the student's batch, and the teacher's inputs as `teacher_<name>`.

        Raises:
            DistillError: a column is missing, or its values cannot be read.
        """
        batch = self._batch_of_student(rows)
        of_teacher = self._batch_of_teacher(rows)
        if _equal(of_teacher.get("labels"), batch.get("labels")):
            del of_teacher["labels"]  # the labels are those of the rows, and not of the teacher's tokens
        return batch | {
            name if is_teacher_key(name) else f"{TEACHER_PREFIX}{name}": value for name, value in of_teacher.items()
        }

    def _batch_of_student(self, rows: Sequence[Row]) -> dict[str, Any]:
        if isinstance(self.student, Processor):
            return _processed(self.student, rows, self.student_kwargs, "student") | _labels(rows)
        dropped = self.raw_columns if _is_of_transformers(self.student) else ()
        kept = [{k: v for k, v in row.items() if k not in dropped and not is_teacher_key(k)} for row in rows]
        return dict(self.student(kept))

    def _batch_of_teacher(self, rows: Sequence[Row]) -> dict[str, Any]:
        if isinstance(self.teacher, Processor):
            return _processed(self.teacher, rows, self.teacher_kwargs, "teacher")
        if not _is_of_transformers(self.teacher):
            return dict(self.teacher([dict(row) for row in rows]))
        columns = [{k.removeprefix(TEACHER_PREFIX): v for k, v in row.items() if is_teacher_key(k)} for row in rows]
        if not columns[0]:
            raise DistillError(
                f"The teacher's collator, a {_name_of(self.teacher)}, reads columns named teacher_<name>, such as "
                f"teacher_input_ids, and the rows have {_listed(rows[0])}: add these columns, or pass the teacher's "
                "processor, which makes its inputs from `image`, `audio` or `text`."
            )
        return dict(self.teacher(columns))


def _processed(processor: Processor, rows: Sequence[Row], kwargs: Mapping[str, Any], role: str) -> dict[str, Any]:
    """Return the inputs that a processor makes of the raw columns."""
    if isinstance(processor, ProcessorMixin):
        processor = _part_of(processor, rows, role)
    if isinstance(processor, PreTrainedTokenizerBase):
        texts = _column(rows, "text", role, processor)
        pairs = _column(rows, "text_pair", role, processor) if "text_pair" in rows[0] else None
        options = {"padding": True, "truncation": processor.model_max_length < _MAX_LENGTH or "max_length" in kwargs}
        return dict(processor(texts, pairs, **{**options, "return_tensors": "pt", **kwargs}))
    call: Callable[..., Mapping[str, Any]] = processor  # type: ignore[assignment]  # the mixins declare no call
    if isinstance(processor, ImageProcessingMixin):
        return dict(call(_column(rows, "image", role, processor), **{"return_tensors": "pt", **kwargs}))
    arrays, rate = _waves(_column(rows, "audio", role, processor), processor, role)
    defaults = {"return_tensors": "pt"} | ({} if rate is None else {"sampling_rate": rate})
    padding = inspect.signature(call).parameters.get("padding")
    if padding is not None and not padding.default:  # others pad by default, some of them to a fixed length
        defaults["padding"] = True
    return dict(call(arrays, **{**defaults, **kwargs}))


def _part_of(processor: ProcessorMixin, rows: Sequence[Row], role: str) -> Any:
    """Return the part of a processor that reads the raw column of the rows."""
    parts = {column: getattr(processor, part, None) for column, part in _PARTS.items()}
    present = {column: part for column, part in parts.items() if part is not None and column in rows[0]}
    if len(present) == 1:
        return next(iter(present.values()))
    readable = [column for column, part in parts.items() if part is not None]
    raise DistillError(
        f"The {role}'s {type(processor).__name__} reads {' or '.join(f'`{name}`' for name in readable)}, and the rows "
        f"have {_listed(rows[0])}: pass the part of the processor that makes the inputs, such as "
        f"{_PARTS[readable[0]] if readable else 'the tokenizer'}, or a function of the rows that returns a batch."
    )


def _column(rows: Sequence[Row], name: str, role: str, processor: object) -> list[Any]:
    missing = [i for i, row in enumerate(rows) if row.get(name) is None]
    if missing:
        raise DistillError(
            f"The {role}'s {type(processor).__name__} reads the column `{name}`, and row {missing[0]} of the batch has "
            f"{_listed({k: v for k, v in rows[missing[0]].items() if v is not None})}: rename the column that has the "
            f"{'text' if name == 'text_pair' else name} with dataset.rename_column(..., {name!r})."
        )
    return [row[name] for row in rows]


def _waves(values: list[Any], extractor: Any, role: str) -> tuple[list[np.ndarray], int | None]:
    """Return the waveforms of `datasets.Audio` values or arrays, and their sampling rate; None if it is unknown."""
    plain = (list, tuple, np.ndarray, Tensor)
    arrays = [np.asarray(value if isinstance(value, plain) else value["array"], np.float32) for value in values]
    rates = {int(value["sampling_rate"]) for value in values if not isinstance(value, plain)}
    expected = getattr(extractor, "sampling_rate", None)
    if len(rates) > 1 or (rates and expected is not None and rates != {expected}):
        raise DistillError(
            f"The audio has a sampling rate of {' and '.join(map(str, sorted(rates)))} Hz, and the {role}'s "
            f"{type(extractor).__name__} reads {expected or 'one rate only'}: set it with "
            f"dataset.cast_column('audio', datasets.Audio(sampling_rate={expected or max(rates)}))."
        )
    return arrays, next(iter(rates), None)


def _labels(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return the labels of the rows: numbers [B], lists of real numbers [B, C], or lists of ids padded to [B, S]."""
    column = next((name for name in _LABEL_COLUMNS if rows[0].get(name) is not None), None)
    if column is None:
        return {}
    try:
        labels = [torch.as_tensor(row[column]) for row in rows]
        labels = [label.float() if label.is_floating_point() else label.long() for label in labels]
        is_ids = labels[0].dim() == 1 and not labels[0].is_floating_point()
        return {"labels": pad_sequence(labels, True, IGNORE_INDEX) if is_ids else torch.stack(labels)}
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise DistillError(
            f"The column `{column}` has {rows[0][column]!r} in the first row of a batch, and the labels cannot be made "
            f"into a tensor ({error}): give each row a class id, a number, or a list of numbers, such as with "
            f"dataset.class_encode_column({column!r})."
        ) from error


def _equal(one: object, other: object) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)


def _is_of_transformers(collator: object) -> bool:
    module = getattr(collator, "__module__", None) or type(collator).__module__
    return module.partition(".")[0] == "transformers"


def _name_of(collator: object) -> str:
    return getattr(collator, "__name__", type(collator).__name__)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in names)
