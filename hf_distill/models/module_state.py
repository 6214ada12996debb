"""Forwards that are only measurements: they leave a model's modules as they were.

Modules keep more than parameters between forwards: the mode, a router's capacity, the longest sequence so far with the
rotary embedding for it. A measurement that changed these would change the training that follows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """Put back every number, tensor and buffer that a module holds and that was replaced while this lasts.

    Values that change in place, such as running means, are not put back; neither is anything of a model that ZeRO-3
    partitions, whose modules hold state of DeepSpeed's.

    Args:
        model: any; in either mode.
    """
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        yield
        return
    before = [
        (module, {k: v for k, v in vars(module).items() if _is_value(k, v)}, dict(module._buffers))
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, values, buffers in before:
            vars(module).update(values)
            module._buffers.update(buffers)


def _is_value(name: str, value: object) -> bool:
    return not name.startswith("_") and (value is None or isinstance(value, int | float | Tensor))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """While it lasts, every module is in eval mode and there are no gradients; then each is as it was."""
    with kept_attributes(model), torch.no_grad():
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


__all__ = ["eval_mode", "kept_attributes"]
