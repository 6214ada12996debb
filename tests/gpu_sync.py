"""Counts, on a CPU, the operations with which this package would wait for a GPU in a training step.

The host waits for the device when it reads a number of it (`tolist`, `item`, `bool(tensor)`), when the shape of a
result depends on values (`nonzero`, a mask as an index), and when it copies Python numbers to it (`torch.tensor` with a
device). A dispatch mode and a function mode see these calls on any device; the call stack tells whose they are.
"""

import inspect
import traceback
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import hf_distill
from hf_distill.core.logits import SparseLogProbs
from hf_distill.losses import fused, logit_chunks

PACKAGE = f"{Path(hf_distill.__file__).parent}/"
_SITE_PACKAGES = f"{Path(torch.__file__).parents[1]}/"
_READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "unique_dim", "_unique2"}
_READING |= {"bincount", "nonzero_numpy", "is_nonzero", "repeat_interleave"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPYING = (torch.Tensor.tolist, torch.Tensor.cpu)
# Functions that read a number only if its tensor is on the CPU.
CPU_BRANCHES = (fused.ChunkedLoss.__post_init__, fused._scaled, logit_chunks.may_be_masked)
# Functions that are called with tensors on the host, before they are copied to the device.
ON_HOST = (SparseLogProbs.without_ids_from,)


class DeviceReads:
    """Records the reads of this package while its context is active.

    reads: (operation, "file:function") of each read, in order
    """

    def __init__(self) -> None:
        self.reads: list[tuple[str, str]] = []
        self._modes = (_Functions(self), _Operators(self))
        self._on_cpu_only = {_location(inspect.getsourcefile(f), f.__name__) for f in (*CPU_BRANCHES, *ON_HOST)}

    def __enter__(self) -> "DeviceReads":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def record(self, operation: str) -> None:
        """Record an operation if the innermost frame outside of torch is one of this package."""
        for frame in reversed(traceback.extract_stack()[:-1]):
            if frame.filename == __file__ or frame.filename.startswith(f"{_SITE_PACKAGES}torch/"):
                continue
            if frame.filename.startswith(PACKAGE):
                location = _location(frame.filename, frame.name)
                if location not in self._on_cpu_only:
                    self.reads.append((operation, location))
            return


class _Operators(TorchDispatchMode):
    """Sees the operators that read a number, or whose result has a shape that depends on values."""

    def __init__(self, recorder: DeviceReads):
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        has_size = name == "repeat_interleave" and kwargs.get("output_size") is not None
        masks = args[1] if name in _INDEXING else ()
        is_masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in masks)
        if (name in _READING and not has_size) or is_masked:
            self._recorder.record(name)
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Sees the copies between host and device, which are no operators on a CPU."""

    def __init__(self, recorder: DeviceReads):
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_upload = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        if func in _COPYING or (is_upload and not isinstance(args[0], torch.Tensor)):
            self._recorder.record(func.__name__)
        return func(*args, **kwargs)


def _location(file: str | None, function: str) -> str:
    return f"{str(file).removeprefix(PACKAGE)}:{function}"


def reads_of_steps(trainer, accumulation: int = 2) -> tuple[Counter, Counter, Counter]:
    """Train and return the reads of the first micro-step, of a later one, and those that an optimizer step adds.

    Args:
        trainer: a trainer of at least 4 steps that does not log, save or evaluate in them.
        accumulation: its `gradient_accumulation_steps`, at least 2.
    """
    starts: list[int] = []
    step, recorder = trainer.training_step, DeviceReads()

    def training_step(*args, **kwargs):
        starts.append(len(recorder.reads))
        return step(*args, **kwargs)

    trainer.training_step = training_step
    with recorder:
        trainer.train()
    counts = [Counter(recorder.reads[start:end]) for start, end in pairwise(starts)]
    third = 2 * accumulation  # the first micro-step of the third optimizer step
    micro, with_optimizer = counts[third], counts[third + accumulation - 1]
    return counts[0], micro, with_optimizer - micro
