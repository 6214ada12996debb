"""Losses that `gpu.py` compares: this package, other packages, dense logits, and a reference in float64."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_distill.core.logits import LazyLogits, LogitScaling
from hf_distill.head import fused_distillation_loss


@dataclass
class Tensors:
    """Hidden states, output heads and labels of a batch of N target tokens.

    hidden: [N, H_s]; weight: [V_s, H_s]; teacher_hidden: [N, H_t]; teacher_weight: [V_t, H_t]; labels: [N]
    bias: [V_s] or None; scaling: scale and soft cap of the student's logits
    """

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    scaling: LogitScaling = field(default_factory=LogitScaling)

    def trained(self) -> list[Tensor]:
        """Return the tensors that get gradients, if they are trained."""
        return [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])

    def clear_gradients(self) -> None:
        """Remove the gradients."""
        for tensor in self.trained():
            tensor.grad = None

    def double(self) -> "Tensors":
        """Return the same values in float64."""
        hidden, weight, bias = (
            None if x is None else x.detach().double().requires_grad_(x.requires_grad)
            for x in (self.hidden, self.weight, self.bias)
        )
        return Tensors(
            hidden, weight, self.teacher_hidden.double(), self.teacher_weight.double(), self.labels, bias, self.scaling
        )

    def student_logits(self) -> LazyLogits:
        """Return the student's logits of all tokens, not computed."""
        return LazyLogits(self.hidden, self.weight, self.bias, self.scaling)

    def teacher_logits(self) -> LazyLogits:
        """Return the teacher's logits of all tokens, not computed."""
        return LazyLogits(self.teacher_hidden, self.teacher_weight)


def tensors(
    device: torch.device,
    tokens: int,
    vocab: int,
    hidden: int,
    teacher_hidden: int,
    *,
    teacher_vocab: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
    frozen: bool = False,
    ignored: float = 0.0,
) -> Tensors:
    """Make random tensors whose logits have a standard deviation of 3."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * scale).to(dtype)

    inputs = Tensors(
        normal(tokens, hidden).requires_grad_(),
        normal(vocab, hidden, scale=3 / hidden**0.5).requires_grad_(not frozen),
        normal(tokens, teacher_hidden),
        normal(teacher_vocab or vocab, teacher_hidden, scale=3 / teacher_hidden**0.5),
        torch.randint(0, vocab, (tokens,), generator=generator, device=device),
        normal(vocab).requires_grad_(not frozen) if bias else None,
        LogitScaling(scale, softcap),
    )
    inputs.labels[: int(tokens * ignored)] = -100
    return inputs


def matrix_products(inputs: Tensors, chunk_tokens: int = 2048) -> None:
    """Compute the logits of both models and the gradients of hidden states and weight, and nothing else."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    accumulates = hidden.is_cuda
    dtype = torch.float32 if accumulates else hidden.dtype
    grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=weight.device)
    size = min(chunk_tokens, len(hidden))
    options = {"out_dtype": torch.float32} if accumulates else {}
    student = torch.empty(size, len(weight), dtype=dtype, device=weight.device)
    teacher = torch.empty(size, len(inputs.teacher_weight), dtype=dtype, device=weight.device)
    gradient = torch.empty(size, len(weight), dtype=hidden.dtype, device=weight.device)
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        count = rows.stop - rows.start
        torch.mm(hidden[rows], weight.t(), out=student[:count], **options)
        torch.mm(inputs.teacher_hidden[rows], inputs.teacher_weight.t(), out=teacher[:count], **options)
        torch.mm(gradient[:count], weight, out=grad_hidden[rows], **options)
        torch.addmm(grad_weight, gradient[:count].t(), hidden[rows], out=grad_weight, **options)


def ours(
    inputs: Tensors,
    divergence: str,
    alpha: float,
    temperature: float,
    chunk_tokens: int | None = None,
    loss_scale: float = 1.0,
) -> Tensor:
    """The fused loss of this package, forward and backward of `loss_scale` times the loss."""
    inputs.clear_gradients()
    loss = fused_distillation_loss(
        inputs.hidden,
        inputs.weight,
        inputs.teacher_hidden,
        inputs.teacher_weight,
        inputs.labels,
        divergence=divergence,
        alpha=alpha,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        student_bias=inputs.bias,
        student_scaling=inputs.scaling,
    )
    (loss * loss_scale).backward()
    return loss.detach()


def reference(inputs: Tensors, divergence: str, alpha: float, temperature: float) -> Tensor:
    """The same objective from the logits of all tokens, by the formulas of the papers."""
    logits = inputs.hidden @ inputs.weight.t()
    if inputs.bias is not None:
        logits = logits + inputs.bias
    logits = logits * inputs.scaling.scale
    if inputs.scaling.softcap is not None:
        logits = inputs.scaling.softcap * torch.tanh(logits / inputs.scaling.softcap)
    teacher = inputs.teacher_hidden @ inputs.teacher_weight.t()
    shared = min(logits.shape[1], teacher.shape[1])
    p = torch.softmax(logits[:, :shared] / temperature, -1)
    q = torch.softmax(teacher[:, :shared] / temperature, -1)
    p, q = p.clamp(min=1e-300), q.clamp(min=1e-300)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    values = {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "js": lambda: 0.5 * kl(q, (p + q) / 2) + 0.5 * kl(p, (p + q) / 2),
        "skew_kl": lambda: kl(q, 0.1 * q + 0.9 * p),
        "skew_reverse_kl": lambda: kl(p, 0.9 * q + 0.1 * p),
        "total_variation": lambda: 0.5 * (p - q).abs().sum(-1),
    }[divergence]()
    keep = inputs.labels != -100
    cross_entropy = torch.nn.functional.cross_entropy(logits, inputs.labels, reduction="sum", ignore_index=-100)
    count = keep.sum().clamp(min=1)
    loss = (alpha * temperature**2 * values[keep].sum() + (1 - alpha) * cross_entropy) / count
    loss.backward()
    return loss.detach()


def dense(inputs: Tensors, divergence: str) -> None:
    """Logits of all tokens at once in float32, as a Trainer without a fused loss computes them."""
    inputs.clear_gradients()
    student = torch.log_softmax((inputs.hidden @ inputs.weight.t()).float(), -1)
    with torch.no_grad():
        teacher = torch.log_softmax((inputs.teacher_hidden @ inputs.teacher_weight.t()).float(), -1)
    torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean").backward()


def trl(inputs: Tensors, beta: float) -> None:
    """TRL's chunked divergence: Triton kernels on a GPU."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    inputs.clear_gradients()
    values = ChunkedDivergenceFunction.apply(
        inputs.hidden, inputs.weight, None, inputs.teacher_hidden, inputs.teacher_weight, None, beta
    )[0]
    values.mean().backward()


def liger_chunked(inputs: Tensors, beta: float) -> None:
    """Liger's chunked JSD from hidden states, compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    inputs.clear_gradients()
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=inputs.hidden.is_cuda, chunk_size=1024
    )
    loss(inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.labels).backward()


def liger_kernel_jsd(inputs: Tensors, beta: float) -> None:
    """Liger's fused linear JSD: a Triton kernel."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    inputs.clear_gradients()
    LigerFusedLinearJSD(jsd_beta=beta)(
        inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.labels
    ).backward()


# Name -> the call, and the values of beta that it supports (0 is forward KL, 0.5 Jensen-Shannon).
PEERS = {
    "TRL": (trl, (0.0, 0.5)),
    "Liger chunked_loss": (liger_chunked, (0.0, 0.5)),
    "Liger fused_linear_jsd": (liger_kernel_jsd, (0.0, 0.5)),
}
