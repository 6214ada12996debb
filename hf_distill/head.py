"""The fused loss as a function, for custom training loops."""

import torch
from torch import Tensor

from .core.defaults import DIVERGENCE
from .core.logits import LazyLogits, LogitScaling
from .core.targets import IGNORE_INDEX, Targets
from .errors import DistillError
from .losses.fused import ChunkedLoss
from .losses.objective import objective


def fused_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    divergence: str | dict = DIVERGENCE,
    temperature: float = 1.0,
    alpha: float = 1.0,
    num_items: Tensor | int | None = None,
    chunk_tokens: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_scaling: LogitScaling = LogitScaling(),  # noqa: B008
    teacher_scaling: LogitScaling = LogitScaling(),  # noqa: B008
    debug: bool = False,
) -> Tensor:
    """Distillation loss from hidden states and output heads, without materializing the logits of all tokens.

    (alpha * T^2 * sum_i divergence_i + (1 - alpha) * sum_i cross_entropy_i) / num_items, over target tokens i

    Under autocast the logits are computed as autocast computes a linear layer, and the losses in float32.

    Args:
        student_hidden: [N, H_s].
        student_weight: [V_s, H_s] of the output head.
        teacher_hidden: [N, H_t]; no gradient reaches it.
        teacher_weight: [V_t, H_t] of the output head.
        labels: [N] ids, already shifted; tokens with label -100 are no target tokens.
        divergence: name of a loss, or `{name, **options}`.
        temperature: T, divides the logits of both models.
        alpha: weight of the divergence, in [0, 1].
        num_items: number of target tokens of the global batch, under gradient accumulation or DDP; None for those of
            `labels`.
        chunk_tokens: target tokens in a chunk; it changes the memory, not the result. None chooses it
            from the sizes of the vocabularies.
        student_bias: [V_s] of the output head.
        teacher_bias: [V_t] of the output head.
        student_scaling: scale and soft cap of the student logits.
        teacher_scaling: scale and soft cap of the teacher logits.
        debug: on a GPU, check the hidden states for NaN and infinity if the loss is not finite; on a CPU they are
            always checked.

    Returns:
        [], with gradients for the student's hidden states, weight and bias; 0, with a graph, without target tokens.

    Raises:
        DistillError: shapes, devices or labels do not fit, a value is out of range, or hidden states are not finite.
    """
    _check_shapes(student_hidden, student_weight, student_bias, labels, "student")
    _check_shapes(teacher_hidden, teacher_weight, teacher_bias, labels, "teacher")
    targets = Targets.from_batch({"labels": labels}, shift=False)
    targets.check_ids(len(student_weight))
    terms = [term for term in objective(alpha, temperature, divergence) if term.weight]
    teacher_logits = LazyLogits.of_head(
        targets.gather(teacher_hidden.detach()), teacher_weight.detach(), _detached(teacher_bias), teacher_scaling
    )
    student_logits = LazyLogits.of_head(targets.gather(student_hidden), student_weight, student_bias, student_scaling)
    chunked_loss = ChunkedLoss(teacher_logits, targets, terms, chunk_tokens=chunk_tokens, num_items=num_items)
    loss = chunked_loss.from_hidden(student_logits)
    if (debug or not loss.is_cuda) and not torch.isfinite(loss):
        _check_finite(labels, student=student_hidden, teacher=teacher_hidden)
    return loss


def _check_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, role: str) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise DistillError(
            f"{role}_hidden {tuple(hidden.shape)} and {role}_weight {tuple(weight.shape)} do not fit: give [N, H] and "
            "[V, H] with the same H."
        )
    if labels.shape != hidden.shape[:1]:
        raise DistillError(
            f"labels have shape {tuple(labels.shape)} and {role}_hidden {tuple(hidden.shape)}: give one label for each "
            "row, [N], already shifted."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise DistillError(
            f"{role}_bias {tuple(bias.shape)} does not fit {role}_weight {tuple(weight.shape)}: give [V]."
        )
    if len({hidden.device, weight.device, labels.device}) > 1:
        raise DistillError(
            f"{role}_hidden is on {hidden.device}, {role}_weight on {weight.device} and labels on {labels.device}: "
            "move them to one device."
        )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _check_finite(labels: Tensor, **hidden: Tensor) -> None:
    for role, states in hidden.items():
        is_bad = ~torch.isfinite(states).all(-1) & (labels != IGNORE_INDEX)
        if is_bad.any():
            raise DistillError(
                f"The {role}'s hidden state of token {int(is_bad.nonzero()[0])} is not finite: look for NaN and "
                "infinity in its inputs and weights."
            )
