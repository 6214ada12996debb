"""The precision in which teachers run: accelerate's autocast wraps the forward of the student only."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..core.logits import enabled_autocast_dtype
from .model_types import is_zero3_partitioned

# accelerate's mixed precision -> dtype in which teachers run
MIXED_PRECISION_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def teacher_autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Return the autocast in which a teacher runs.

    Args:
        device: the student's device.
        dtype: the dtype of the student's mixed precision; None: that of an autocast that is enabled already, if any.
    """
    dtype = dtype or enabled_autocast_dtype(device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def autocast_like(student_device: torch.device, device: torch.device, enabled: bool) -> AbstractContextManager[object]:
    """Return an autocast with the dtype of the one that is enabled for the student's device; nothing if there is none.

    Args:
        student_device: the student's device.
        device: the device of the model that runs in the context.
        enabled: whether the model runs under autocast; otherwise autocast is disabled.
    """
    dtype = enabled_autocast_dtype(student_device)
    if dtype is None or not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype, enabled=enabled)


def computes_in_float32(model: nn.Module) -> bool:
    """Whether a model without autocast computes its matrix products in float32, because most weights have this dtype.

    A quantized model computes in the dtype that it was loaded with.
    """
    if getattr(model, "quantization_method", None) is not None:
        return False
    num_float32 = num_other = 0
    for p in model.parameters():
        size = p.ds_numel if hasattr(p, "ds_numel") else p.numel()
        if p.dtype == torch.float32:
            num_float32 += size
        else:
            num_other += size
    return num_float32 > num_other


def in_dtype_of(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a model in half precision in its dtype: not all models convert images or audio.

    Args:
        model: a model that runs without autocast.
        inputs: its batch; labels stay as they are.
    """
    dtype = next((p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
    if dtype is None:
        return dict(inputs)
    # DeepSpeed gives real numbers the dtype of the student.
    real = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return {name: value.to(dtype) if name in real - {"labels"} else value for name, value in inputs.items()}


def has_float32_weights(model: nn.Module) -> bool:
    """Whether a parameter is in float32, as that of a student that is trained under autocast, or its adapters."""
    return any(p.dtype == torch.float32 for p in model.parameters())


def is_deepspeed_engine(model: nn.Module) -> bool:
    """Whether a model is in a DeepSpeed engine, which disables the autocast around it."""
    return hasattr(model, "module") and is_zero3_partitioned(model)
