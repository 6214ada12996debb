"""Losses, targets and metrics of question answering, whose outputs are two distributions over the S positions of a row.

One is that of the position where the answer starts, the other that where it ends. Each of them is a target, so a row
has two targets, with the indices 2 * row and 2 * row + 1.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.loss_kinds import SPANS
from ..core.signals import Signals
from ..core.targets import IGNORE_INDEX, Targets
from ..errors import DistillError
from .alignment import LOG_ZERO, dense_logits
from .analytic_gradients import BlockLogits
from .registry import loss

SPAN_LABELS = ("start_positions", "end_positions")
SPAN_HITS = ("hits_label", "teacher_hits_label")
SPAN_STUDENT_METRICS = ("measured", "hits_label")
SPAN_PAIR_METRICS = ("kl", "agreement", "teacher_hits_label")


@loss("span_kl", compares=("logits",), outputs=SPANS)
def span_kl(
    student: Signals | Tensor, teacher: Signals | Tensor, targets: Targets, *, temperature: float = 1.0
) -> Tensor:
    """Forward KL, KL(teacher || student), over the positions of a row that are no padding.

    sum_s q(s) * (log q(s) - log p(s))

    Args:
        student: signals, or logits [T, S].
        teacher: signals, or logits [T, S]; no gradient reaches it.
        targets: T starts and ends, whose `allowed` marks the positions without padding.
        temperature: T, divides the logits of both models.

    Returns:
        [T] in nats; 0 where p = q.

    Raises:
        DistillError: temperature is not positive.
    """
    if not temperature > 0:
        raise DistillError(f"temperature is {temperature}; it must be a positive number")
    s = dense_logits(student)
    t = dense_logits(teacher).detach().to(s)
    log_p, log_q = (_without_padding(z / temperature, targets).log_softmax(-1) for z in (s, t))
    return (log_q.exp() * (log_q - log_p)).sum(-1)


@loss("span_cross_entropy", compares=(), outputs=SPANS)
def span_cross_entropy(student: Signals, teacher: Signals | None, targets: Targets) -> Tensor:
    """Cross entropy with the position of the start or end, over all positions of a row as transformers computes it.

    Args:
        student: signals with the student logits [T, S].
        teacher: not used.
        targets: T starts and ends.

    Returns:
        [T] in nats.
    """
    return torch.nn.functional.cross_entropy(dense_logits(student), targets.labels, reduction="none")


def span_metrics(student: BlockLogits, block: BlockLogits | None, targets: Targets) -> dict[str, Tensor]:
    """Return the statistics of each start and end of a block: name -> [r].

    `kl` is at T = 1 in nats, and `agreement` is 1 where both models have the same most probable position.
    `hits_label` and `teacher_hits_label` are 1 where the most probable position of a model is the label.

    Args:
        student: the student logits.
        block: student and teacher logits; None returns `SPAN_STUDENT_METRICS` alone.
        targets: the r starts and ends.
    """
    new_ones, top = student.student.new_ones(len(student.student)), _top_position(student.student, targets)
    metrics = {"measured": new_ones, "hits_label": top == targets.labels}
    if block is None or block.teacher is None:
        return metrics
    teacher_top = _top_position(block.teacher, targets)
    return metrics | {
        "kl": span_kl(block.student, block.teacher, targets),
        "agreement": top == teacher_top,
        "teacher_hits_label": teacher_top == targets.labels,
    }


def span_labels(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the positions where the answers start and end, [B, 2]; -100 for a position outside of its row.

    Negative positions become 0 and positions from S on are ignored, as transformers does.

    Args:
        inputs: the collator's batch with `start_positions` and `end_positions` [B], and its tokens.

    Raises:
        DistillError: the batch lacks the positions or the tokens.
    """
    if missing := [name for name in SPAN_LABELS if inputs.get(name) is None]:
        raise DistillError(
            f"The batch has no {' and no '.join(f'`{name}`' for name in missing)}; it has {sorted(inputs)}. Question "
            "answering is distilled for rows with both: use a collator that keeps them."
        )
    num_positions = allowed_positions(inputs).shape[1]
    labels = torch.stack([inputs[name].reshape(-1) for name in SPAN_LABELS], dim=1)
    if labels.is_floating_point():
        raise DistillError(f"{' and '.join(SPAN_LABELS)} have dtype {labels.dtype}: give integer positions.")
    labels = labels.long().clamp(0, num_positions)
    return labels.masked_fill(labels == num_positions, IGNORE_INDEX)


def allowed_positions(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return which positions of each row are no padding, [B, S].

    Raises:
        DistillError: the batch has neither an attention mask nor tokens.
    """
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return mask != 0
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if tokens is None:
        raise DistillError(
            "The batch has neither `attention_mask` nor `input_ids`: one of them gives the positions of each row."
        )
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _top_position(logits: Tensor, targets: Targets) -> Tensor:
    return _without_padding(logits, targets).argmax(-1)


def _without_padding(logits: Tensor, targets: Targets) -> Tensor:
    return logits if targets.allowed is None else logits.masked_fill(~targets.allowed, LOG_ZERO)
