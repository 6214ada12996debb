"""Matrix products of the fused loss: they sum in float32 at least, whatever the dtype of the models.

On a GPU with bf16 models the tensor cores multiply bf16 by bf16 and sum in float32, also the gradients: the gradient
with respect to the logits is rounded to bf16, and the sums over chunks stay in float32. With fp16 models the logits are
computed in the same way, but the gradient stays in float32, because the difference of two probabilities
underflows in fp16. Elsewhere, and on GPUs whose PyTorch cannot return float32, both factors are converted to float32.
"""

from functools import cache

import torch
from torch import Tensor

_TILE_ROWS = 4096  # rows of a factor that are converted to float32 at a time


def rounds_gradient_to_bf16(hidden: Tensor, weight: Tensor) -> bool:
    """Return whether the gradient of the logits `hidden @ weight.T` is rounded to bf16 before its products.

    Args:
        hidden: [T, H].
        weight: [V, H].
    """
    return hidden.dtype == weight.dtype == torch.bfloat16 and _supports_float32_output(hidden.device, hidden.dtype)


def project_matmul(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Write `hidden @ weight.T` into `out` [t, V], in the precision of `out`.

    Args:
        hidden: [t, H].
        weight: [V, H].
        out: [t, V].
    """
    if hidden.dtype == weight.dtype == out.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    if (
        hidden.dtype == weight.dtype
        and out.dtype == torch.float32
        and _supports_float32_output(out.device, hidden.dtype)
    ):
        return _half_mm(hidden, weight.t(), out)
    hidden = hidden.to(out.dtype)
    for v in range(0, len(weight), _TILE_ROWS):
        torch.mm(hidden, weight[v : v + _TILE_ROWS].to(out.dtype).t(), out=out[:, v : v + _TILE_ROWS])
    return out


def accumulate_matmul(a: Tensor, b: Tensor, out: Tensor, keep: bool) -> Tensor:
    """Write `a @ b`, or `out + a @ b`, into `out` [m, n], in the precision of `out`.

    Args:
        a: [m, k].
        b: [k, n].
        out: [m, n].
        keep: whether to add to `out`; otherwise what it holds is not read.
    """
    if a.dtype == b.dtype == out.dtype:
        return out.addmm_(a, b, beta=int(keep))
    if a.dtype == b.dtype and out.dtype == torch.float32 and _supports_float32_output(out.device, a.dtype):
        return _half_addmm(a, b, out, int(keep))
    for k in range(0, len(b), _TILE_ROWS):
        rows = slice(k, k + _TILE_ROWS)
        out.addmm_(a[:, rows].to(out.dtype), b[rows].to(out.dtype), beta=int(keep or k > 0))
    return out


def _half_mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write the product of two half-precision matrices into a float32 `out`."""
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _half_addmm(a: Tensor, b: Tensor, out: Tensor, beta: int) -> Tensor:
    """Write `beta * out` plus the product of two half-precision matrices into a float32 `out`."""
    return torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)


@cache
def _supports_float32_output(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether PyTorch multiplies matrices of a half-precision dtype to a float32 result on a device."""
    if device.type == "cpu":
        return False
    reason = "PyTorch for ROCm was not tested" if torch.version.hip else ""
    if not reason:
        a = torch.ones(16, 16, dtype=dtype, device=device)
        out = torch.zeros(16, 16, device=device)
        try:
            _half_mm(a, a, out)
            _half_addmm(a, a, out, 1)
        except (RuntimeError, TypeError) as error:
            reason = f"torch {torch.__version__} reports: {error}"
    if not reason:
        return True
    from transformers.utils import logging  # here, so that `hf_distill.head` needs torch alone

    logging.get_logger(__name__).warning_once(
        f"The fused loss converts {str(dtype).removeprefix('torch.')} matrices to float32 before it multiplies them on "
        f"{device.type}, which takes several times as long as a product of the models' dtype with a float32 result "
        f"({reason})."
    )
    return False
