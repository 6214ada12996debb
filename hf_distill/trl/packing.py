"""Do the models keep packed documents apart? Asked of them, not of a table of names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..errors import tell
from ..signals import Targets
from ..tasks import bare
from ..teachers import FrozenTeacher, Teacher
from ..teachers.loading import partitioned

logger = logging.get_logger(__name__)
_LENGTH = 4


@torch.no_grad()
def check_apart(student: nn.Module, teacher: Teacher, collator: Callable, autocast: Callable[[], Any]) -> None:
    """Refuse a student or a frozen teacher in which a document of a padding-free row sees the one before it.

    Both models run on two short rows, which differ in the first document alone: what they say about the second must
    not differ. A teacher of another class is trusted. A student that is sharded already cannot run yet: told once.

    Args:
        student: before it is wrapped.
        teacher: prepared.
        collator: makes a padding-free batch of `input_ids` and `labels`.
        autocast: the context in which the student is trained.

    Raises:
        DistillError: which of them does not keep documents apart.
    """
    size, device = bare(student).get_input_embeddings().weight.shape[0], next(student.parameters()).device
    batches = [_two_documents(collator, first, size, device) for first in (1, 1 + _LENGTH)]
    problems = []
    if partitioned(student) or device.type == "meta":
        logger.warning_once(
            "The student is sharded, so it was not checked that its attention keeps packed documents apart."
        )
    else:
        training = student.training
        student.eval()
        with autocast():
            said = [
                student(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[0, _LENGTH:]
                for batch in batches
            ]
        student.train(training)
        problems += _leak("student", student, *said)
    if isinstance(teacher, FrozenTeacher):
        told = []
        for batch in batches:
            targets = Targets.from_batch(batch, shift=True)
            source: Any = teacher(batch, targets, {}).logits
            told.append(source.project()[targets.positions >= _LENGTH])
        problems += _leak("teacher", teacher.model, *told)
    tell(problems)


def _two_documents(collator: Callable, first: int, size: int, device: torch.device) -> dict:
    """A padding-free batch of two documents; `first` is the first id of the first."""
    documents = [[(start + i) % size for i in range(_LENGTH)] for start in (first, 1 + 2 * _LENGTH)]
    batch = collator([{"input_ids": ids, "labels": ids} for ids in documents])
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _leak(who: str, model: nn.Module, one: Tensor, other: Tensor) -> list[str]:
    if torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-3 * float(one.float().abs().max())):
        return []
    return [
        f"in the {who} ({type(bare(model)).__name__}) a packed document sees the one before it, so packing and "
        "padding_free would change what is learnt: leave them off, or load it with an attention that reads "
        "position_ids (attn_implementation='sdpa' or 'flash_attention_2')"
    ]
