"""Logits of classes of ids: the log of the summed probabilities of the ids of a class, apart from the normalization.

Models with different tokenizers are compared over the K classes of which both have an id (see `core/token_classes.py`).
Most classes have one id of a model, whose logit is copied; only the ids of other classes are summed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.logits import SparseLogProbs
from ..core.token_classes import TokenClasses


@dataclass(frozen=True)
class ClassMap:
    """The classes of the V ids of one model.

    class_of_id:  [V] class of each id; 0 for ids that are left out
    has_class:    [V] False for ids that are left out: ids of classes of which the other model has no id, and padding
    left_out_ids: these ids
    first_ids:    [K] the first id of each class
    groups:       [n] the classes that have several ids of this model
    grouped_ids:  [m] the ids of these classes
    group_index:  [m] index of their class in `groups`
    """

    class_of_id: Tensor
    has_class: Tensor
    left_out_ids: Tensor
    first_ids: Tensor
    groups: Tensor
    grouped_ids: Tensor
    group_index: Tensor

    def __len__(self) -> int:
        return len(self.first_ids)


class ClassLogits(NamedTuple):
    """Logits of classes.

    logits: [C, K]
    exps:   [C, m] exp(logit - shift) of the ids of classes with several ids
    sums:   [C, n] their sums
    """

    logits: Tensor
    exps: Tensor
    sums: Tensor


@lru_cache(maxsize=16)
def class_maps(
    token_classes: TokenClasses, student_vocab_size: int, teacher_vocab_size: int, device: torch.device
) -> tuple[ClassMap, ClassMap]:
    """Return the maps of student and teacher to the classes of which both have an id.

    Args:
        token_classes: a partition of both vocabularies.
        student_vocab_size: number of the student's logits. Ids without a class (padding) are left out.
        teacher_vocab_size: number of the teacher's logits, likewise.
        device: of the maps.
    """
    count = token_classes.count
    sides = [
        _padded(token_classes.student.cpu(), student_vocab_size, count),
        _padded(token_classes.teacher.cpu(), teacher_vocab_size, count),
    ]
    student_counts, teacher_counts = (_counts(side, count) for side in sides)
    is_shared = (student_counts > 0) & (teacher_counts > 0)
    num_shared = int(is_shared.sum())
    renumbered = torch.full((count + 1,), num_shared)
    renumbered[:count][is_shared] = torch.arange(num_shared)
    student, teacher = (_class_map(renumbered[side], num_shared, device) for side in sides)
    return student, teacher


def _padded(classes: Tensor, vocab_size: int, no_class: int) -> Tensor:
    """Return the classes of `vocab_size` ids, [V]; ids that the classes do not have are in `no_class`."""
    return torch.nn.functional.pad(classes[:vocab_size], (0, max(vocab_size - len(classes), 0)), value=no_class)


def _counts(class_of_id: Tensor, count: int) -> Tensor:
    """Return the number of ids of each class, [count]; ids of the class `count` are not counted."""
    return torch.zeros(count + 1, dtype=torch.long).index_add(0, class_of_id, torch.ones_like(class_of_id))[:count]


def _class_map(class_of_id: Tensor, num_classes: int, device: torch.device) -> ClassMap:
    vocab_size = len(class_of_id)
    ids = torch.arange(vocab_size)
    first_ids = torch.full((num_classes + 1,), vocab_size).scatter_reduce_(0, class_of_id, ids, "amin")[:-1]
    groups = (_counts(class_of_id, num_classes) > 1).nonzero()[:, 0]
    index_of_class = torch.full((num_classes + 1,), -1)
    index_of_class[groups] = torch.arange(len(groups))
    grouped_ids = (index_of_class[class_of_id] >= 0).nonzero()[:, 0]
    has_class = class_of_id < num_classes
    parts = (
        class_of_id.where(has_class, 0),
        has_class,
        (~has_class).nonzero()[:, 0],
        first_ids,
        groups,
        grouped_ids,
        index_of_class[class_of_id[grouped_ids]],
    )
    return ClassMap(*(part.to(device) for part in parts))


def class_logits(
    logits: Tensor, class_map: ClassMap, new_buffer: Callable[..., Tensor] | None = None, exact: bool = True
) -> ClassLogits:
    """Return the logits of classes: the log-sum-exp of the logits of their ids.

    Args:
        logits: [C, V], divided by the temperature.
        class_map: of the model.
        new_buffer: returns a tensor of a shape for results and temporaries, without autograd; None allocates them.
        exact: whether the sum of a class is computed relative to the largest logit of the class. Relative to that of
            the row, it takes half the time, and is 0 if all ids of the class have a probability below 1e-38.
    """
    rows, num_groups = len(logits), len(class_map.groups)

    def buffer(*shape: int) -> Tensor | None:
        return None if new_buffer is None else new_buffer(rows, *shape)

    of_classes = torch.index_select(logits, 1, class_map.first_ids, out=buffer(len(class_map)))
    exps = torch.index_select(logits, 1, class_map.grouped_ids, out=buffer(len(class_map.grouped_ids)))
    with torch.no_grad():
        lowest = torch.finfo(logits.dtype).min
        if exact:
            index = class_map.group_index.expand(rows, -1)
            shift = exps.new_full((rows, num_groups), lowest).scatter_reduce_(1, index, exps, "amax")
            shift_of_ids = torch.index_select(shift, 1, class_map.group_index, out=buffer(len(class_map.grouped_ids)))
        else:
            shift = shift_of_ids = logits.amax(1, keepdim=True).clamp_(min=lowest)
    exps = exps.sub_(shift_of_ids).exp_()
    zeros = buffer(num_groups)
    sums = exps.new_zeros(rows, num_groups) if zeros is None else zeros.zero_()
    sums = sums.index_add_(1, class_map.group_index, exps)
    if exact:  # -inf if all logits of a class are; the lowest number has finite gradients
        sums = sums.clamp_(min=torch.finfo(logits.dtype).tiny)
    group_logits = torch.log(sums, out=buffer(num_groups)).add_(shift)
    return ClassLogits(of_classes.index_copy_(1, class_map.groups, group_logits), exps, sums)


def logit_gradient_of_classes(gradient: Tensor, class_map: ClassMap, classes: ClassLogits, out: Tensor) -> Tensor:
    """Return the gradient with respect to the logits of ids, [C, V]; those of ids that are left out are 0.

    An id gets the gradient of its class times its share in the probability of the class.

    Args:
        gradient: [C, K] with respect to the logits of classes.
        class_map: of the model.
        classes: logits of classes.
        out: buffer [C, V] that is written and returned.
    """
    torch.index_select(gradient, 1, class_map.class_of_id, out=out)
    of_groups = gradient.index_select(1, class_map.groups).div_(classes.sums)
    of_grouped_ids = of_groups.index_select(1, class_map.group_index).mul_(classes.exps)
    return out.index_copy_(1, class_map.grouped_ids, of_grouped_ids).index_fill_(1, class_map.left_out_ids, 0)


def sparse_class_log_probs(teacher: SparseLogProbs, class_map: ClassMap) -> SparseLogProbs:
    """Return the probabilities of the classes of a sparse teacher's ids, at temperature 1 of `class_logits`.

    Ids of one class become one entry. Ids that are left out are removed, and the probabilities of a top-k teacher are
    normalized again; ids that are not stored stay in the tail.

    Args:
        teacher: [C, K] ids and their log-probabilities.
        class_map: of the teacher.
    """
    classes = class_map.class_of_id[teacher.ids]
    is_removed = ~class_map.has_class[teacher.ids]
    probs, log_tail = teacher.log_probs.exp(), teacher.log_tail
    if log_tail is not None:
        removed_mass = probs.where(is_removed, 0).sum(1, keepdim=True)
        log_remaining = torch.log1p(-removed_mass.clamp(max=1 - 1e-6))
        probs, log_tail = probs / log_remaining.exp(), log_tail - log_remaining[:, 0]
    # Entries of one class are summed in the first of them; the others become padding slots.
    classes, order = classes.sort(1)
    is_first = torch.nn.functional.pad(classes[:, 1:] != classes[:, :-1], (1, 0))
    slots = is_first.cumsum(1)
    sums = torch.zeros_like(probs).scatter_add_(1, slots, probs.masked_fill(is_removed, 0).gather(1, order))
    ids = torch.zeros_like(classes).scatter_(1, slots, classes)
    return replace(
        teacher,
        ids=ids,
        log_probs=sums.log(),
        log_tail=log_tail,
        temperature=1.0,
        negative_entropy=None,
        vocab_size=len(class_map),
        label_log_probs=None,
    )
