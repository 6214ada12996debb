"""A second device without an accelerator: tensors that say they are on "meta", and hold their values on the CPU.

Within `second_device()`, `tensor.to("meta")` and `model.to("meta")` keep their values, and an operator that gets
tensors of both devices raises an error, as it does for a CPU and a GPU, or for two GPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

SECOND = torch.device("meta")
_aten = torch.ops.aten
_COPIES = {_aten._to_copy.default, _aten.copy_.default}


class SecondDeviceTensor(torch.Tensor):
    """A tensor on the second device; `values` is on the CPU."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=SECOND, requires_grad=values.requires_grad,
        )  # fmt: skip

    def __init__(self, values):
        self.values_on_cpu = values

    def __repr__(self):
        return f"SecondDeviceTensor({self.values_on_cpu})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, [])


class _Mode(TorchDispatchMode):
    def __init__(self, copies):
        super().__init__()
        self.copies = copies

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self.copies)


def _run(func, args, kwargs, copies):
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, SecondDeviceTensor)]
    here = [t for t in tensors if not isinstance(t, SecondDeviceTensor) and t.dim()]
    device = kwargs.get("device")
    to_second = device is not None and torch.device(device) == SECOND
    if func in _COPIES:
        to_second = to_second or (device is None and isinstance(args[0], SecondDeviceTensor))
        source = args[1] if func is _aten.copy_.default else args[0]
        if isinstance(source, SecondDeviceTensor) != to_second:
            copies.append((tuple(source.shape), source.dtype, "to the second device" if to_second else "to the CPU"))
    elif there and here:
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, got shapes {[tuple(t.shape) for t in there]} on "
            f"the second device and {[tuple(t.shape) for t in here]} on the CPU"
        )
    else:
        to_second = to_second or (device is None and bool(there))
    if not there and not to_second:
        return func(*args, **kwargs)
    if to_second and device is not None:
        kwargs = kwargs | {"device": "cpu"}
    originals = {id(t.values_on_cpu): t for t in there}
    args, kwargs = tree_map(lambda t: t.values_on_cpu if isinstance(t, SecondDeviceTensor) else t, (args, kwargs))
    result = func(*args, **kwargs)

    def wrap(t):
        if not isinstance(t, torch.Tensor) or not to_second:
            return t
        return originals[id(t)] if id(t) in originals else SecondDeviceTensor(t)

    return tree_map(wrap, result)


@contextmanager
def second_device() -> Iterator[list]:
    """Emulate a second device; yields a list of the copies between devices: (shape, dtype, direction)."""
    copies: list = []
    with _Mode(copies):
        yield copies
