"""Packed batches in a trainer: the lengths of documents for flash attention, and the check of the models' attention."""

from typing import Any

from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..core.processes import any_process
from ..core.row_values import ORIGIN, WEIGHT
from ..data.alignment.collator import AlignedCollator
from ..data.collator import Collator, returns_document_lengths
from ..data.packing import missing_positions_problem, packed_attention_problem
from ..data.row_values import RowValuesCollator, has_row_value
from ..data.teacher_column import TeacherColumnCollator
from ..errors import DistillError, raise_if_any
from ..models.model_call import uses_flash_attention
from ..models.model_types import unwrap_model
from ..teachers import RoutedTeacher
from ..teachers.group import teachers_by_name
from .teacher_argument import cross_tokenizer_teachers

logger = logging.get_logger(__name__)

_NO_DISPATCH = "accelerator_config={'dispatch_batches': False}"


def collator_for_models(trainer: Any) -> Any:
    """Return the trainer's collator; it also makes the rows of teachers with another tokenizer, see `_for_attention`.

    Args:
        trainer: a trainer whose teacher, if it has one, is prepared.
    """
    if isinstance(trainer.data_collator, AlignedCollator):
        trainer.data_collator = trainer.data_collator.collator
    makers = [teacher.row_maker for teacher in cross_tokenizer_teachers(trainer.teacher)]
    collator = _with_row_values(trainer, _for_attention(trainer))
    return AlignedCollator(collator, makers) if makers and trainer.collates_batches else collator


def _for_attention(trainer: Any) -> Any:
    """Return the trainer's collator; a `Collator` also returns lengths of documents if a model has flash attention.

    Flash attention would otherwise derive them from `position_ids` in every layer, and wait for the device each time.

    Args:
        trainer: a trainer whose teacher, if it has one, is prepared.
    """
    collator = trainer.data_collator
    if isinstance(trainer.teacher, RoutedTeacher) and trainer.teacher.sources is None:
        return collator if isinstance(collator, TeacherColumnCollator) else _with_teacher_column(trainer)
    if not isinstance(collator, Collator) or returns_document_lengths(collator):
        return collator
    if not any(uses_flash_attention(model) for model in [trainer.model, *_teacher_models(trainer).values()]):
        return collator
    if _dispatched_datasets(trainer):
        logger.warning_once(
            "accelerate collates the batches of a stream in one process and cannot send the lengths of packed "
            f"documents to the others, so flash attention derives them in every layer. Set {_NO_DISPATCH}."
        )
        return collator
    return Collator(collator.pad_token_id, collator.sources, return_flash_attn_kwargs=True)


def _with_row_values(trainer: Any, collator: Any) -> Any:
    """Return a collator that also returns the weights and origins of rows that have them, if the trainer reads them."""
    if not trainer.is_distilling or isinstance(collator, Collator | RowValuesCollator) or not trainer.collates_batches:
        return collator
    datasets = [trainer.train_dataset, trainer.eval_dataset]
    columns = [WEIGHT, ORIGIN] if trainer.reads_origins else [WEIGHT]
    return RowValuesCollator(collator) if any(has_row_value(name, *datasets) for name in columns) else collator


def _with_teacher_column(trainer: Any) -> TeacherColumnCollator:
    """Return the trainer's collator with the column `teacher`; rows are not packed then."""
    return TeacherColumnCollator(trainer.data_collator, trainer.teacher.names)


def dispatch_problems(trainer: Trainer) -> list[str]:
    """Return why the batches of the trainer's collator cannot be dispatched to processes; empty if they can."""
    if not returns_document_lengths(trainer.data_collator):
        return []
    return [
        f"accelerate collates the batches of {name} in one process and slices their tensors by rows for the others, "
        f"but the collator returns `cu_seq_lens_q` and `max_length_q`, which have no rows. Set {_NO_DISPATCH}"
        for name in _dispatched_datasets(trainer)
    ]


def _dispatched_datasets(trainer: Any) -> list[str]:
    """Return the names of the data sets whose batches accelerate collates in one process and sends to the others."""
    dispatches = trainer.accelerator.dispatch_batches
    datasets = {"train_dataset": trainer.train_dataset, "eval_dataset": trainer.eval_dataset}
    return [
        name
        for name, data in datasets.items()
        if data is not None and (dispatches or (dispatches is None and isinstance(data, IterableDataset)))
    ]


def _teacher_models(trainer: Any) -> dict[str, nn.Module]:
    """Return the models of the trainer's teachers that are not the student itself, by a name for messages."""
    teachers = {} if trainer.teacher is None else teachers_by_name(trainer.teacher)
    return {
        "teacher" if name is None else f"teacher {name!r}": teacher.model
        for name, teacher in teachers.items()
        if teacher.model is not None and unwrap_model(teacher.model) is not unwrap_model(trainer.model)
    }


class PackedAttentionCheck(TrainerCallback):
    """Checks before the first batch that packed documents do not attend to each other in student and teacher.

    The models run after `accelerator.prepare`: on their devices (flash attention does not run on a CPU), in the
    wrappers of FSDP or DeepSpeed, and on every rank, because sharded weights are gathered in collectives.

    Args:
        trainer: a `DistillMixin` whose teacher is prepared.

    Raises:
        DistillError: a model takes no `position_ids`.
    """

    def __init__(self, trainer: Any):
        self._trainer, self._is_pending = trainer, True
        models = {"student": trainer.model} | _teacher_models(trainer)
        raise_if_any([p for role, model in models.items() if (p := missing_positions_problem(model, role))])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Check the models; an evaluation before the first step comes later."""
        self.check(self._trainer.model_wrapped)

    def check(self, student: nn.Module) -> None:
        """Check the models, unless they were checked before.

        Args:
            student: the student as prepared by accelerate.

        Raises:
            DistillError: on all ranks, if the documents of a model attend to each other on any of them.
        """
        if not self._is_pending:
            return
        for role, model in ({"student": student} | _teacher_models(self._trainer)).items():
            with self._trainer.accelerator.autocast():
                problem = packed_attention_problem(model, role, self._trainer.data_collator)
            if any_process(problem is not None, self._trainer.args.device):
                raise DistillError(
                    problem or f"packing: on another rank, documents attend to each other in the {role}."
                )
        self._is_pending = False


__all__ = ["PackedAttentionCheck", "collator_for_models", "dispatch_problems"]
