"""Context managers for forwards that measure something and must not change a model's modules.

Modules have more state than parameters: the mode, a router's capacity, the longest sequence so far with its rotary
embedding. A measurement that changes them would change the training that follows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def restored_attributes(model: nn.Module) -> Iterator[None]:
    """Restore all numbers, tensors and buffers of modules that are replaced in the block.

    Values that are changed in place, such as running means, are not restored. Nothing of a model that ZeRO-3 partitions
    is restored, because its modules hold state of DeepSpeed.

    Args:
        model: any model, in either mode.
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
    """Put all modules in eval mode and disable gradients in the block, then restore the mode of each module.

    Args:
        model: any model, in either mode.
    """
    with restored_attributes(model), torch.no_grad():
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


__all__ = ["eval_mode", "restored_attributes"]
