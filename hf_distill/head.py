"""The fused head as a function, for loops of one's own."""

import torch
from torch import Tensor

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
    divergence: str | dict = "forward_kl",
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
    """Distillation loss from hidden states, for your own loop; logits never exist whole.

    alpha * T^2 * divergence + (1 - alpha) * cross entropy, summed over asked tokens / (num_items or asked tokens)

    Args:
        student_hidden: [N, H_s].
        student_weight: [V_s, H_s], of the output head.
        teacher_hidden: [N, H_t]; no gradient reaches it.
        teacher_weight: [V_t, H_t].
        labels: [N] ids, already shifted; -100: not asked.
        divergence: name of a loss, or `{name, **options}`.
        temperature: T, divides both logits.
        alpha: weight of the divergence, in [0, 1].
        num_items: asked tokens of the global batch, under accumulation or DDP.
        chunk_tokens: asked tokens a chunk, a knob for memory and not for accuracy; None: 150 MiB on a CPU.
        student_bias: [V_s].
        teacher_bias: [V_t].
        student_scaling: what follows the student's head.
        teacher_scaling: what follows the teacher's head.
        debug: on a GPU too, look for NaN and inf in the hidden states where the loss is not finite (a CPU always does).

    Returns:
        [] with gradients for hidden states, weight and bias of the student; 0 with a graph where nothing is asked.

    Raises:
        DistillError: shapes, devices or labels that do not fit, a value out of range, hidden states not finite.
    """
    _check(student_hidden, student_weight, student_bias, labels, "student")
    _check(teacher_hidden, teacher_weight, teacher_bias, labels, "teacher")
    targets = Targets.from_batch({"labels": labels}, shift=False)
    targets.check_ids(len(student_weight))
    terms = [term for term in objective(alpha, temperature, divergence) if term.weight]
    told = LazyLogits(
        targets.gather(teacher_hidden.detach()), teacher_weight.detach(), _detached(teacher_bias), teacher_scaling
    )
    job = ChunkedLoss(told, targets, terms, chunk_tokens=chunk_tokens, num_items=num_items)
    said = LazyLogits(targets.gather(student_hidden), student_weight, student_bias, student_scaling)
    loss = job.from_hidden(said)
    if (debug or not loss.is_cuda) and not torch.isfinite(loss):
        _name_not_finite(labels, student=student_hidden, teacher=teacher_hidden)
    return loss


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, who: str) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise DistillError(
            f"{who}_hidden {tuple(hidden.shape)} and {who}_weight {tuple(weight.shape)} do not fit: give [N, H] and "
            "[V, H]."
        )
    if labels.shape != hidden.shape[:1]:
        raise DistillError(
            f"labels have shape {tuple(labels.shape)} and {who}_hidden {tuple(hidden.shape)}: give one label a row, "
            "[N], already shifted."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise DistillError(f"{who}_bias {tuple(bias.shape)} does not fit {who}_weight {tuple(weight.shape)}: give [V].")
    if len({hidden.device, weight.device, labels.device}) > 1:
        raise DistillError(
            f"{who}_hidden is on {hidden.device}, {who}_weight on {weight.device} and labels on {labels.device}: move "
            "them to one device."
        )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _name_not_finite(labels: Tensor, **hidden: Tensor) -> None:
    for who, states in hidden.items():
        bad = ~torch.isfinite(states).all(-1) & (labels != IGNORE_INDEX)
        if bad.any():
            raise DistillError(f"The {who}'s hidden state of token {int(bad.nonzero()[0])} is not finite.")
