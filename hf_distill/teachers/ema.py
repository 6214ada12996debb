"""Teachers that are the student's own past: averaged (EMA) or as it was a while ago (snapshot).

One model serves as both. What it was is held beside it in float32, one number for each that is trained, and takes the
weights' place for the teacher's forward. So adapters are all that is held of a student with adapters, tied weights are
held once, and a rank of a sharded student holds its share.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..core.logits import LazyLogits
from ..core.schedule import parse_schedule, value_at
from ..core.signals import Signals
from ..errors import DistillError
from ..models.finite_weights import check_finite
from ..models.model_types import unwrap_model
from ..models.sidecar import strip_sidecar
from .self_teacher import SelfTeacher
from .state import load_state, save_state, state_file
from .weight_drift import WeightDrift, is_sharded, local_shard


class StudentCopyTeacher(SelfTeacher):
    """The student with weights of its own past; see the module. Classes that derive say how these move."""

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Begin as the student is when it is first asked.

        Raises:
            DistillError: nothing of the student is trained in floating point.
        """
        self.model = student
        self._shadow: dict[str, Tensor] = {}
        self._drift = WeightDrift()
        self._is_swapped = self._resharded = False
        if not self._tracked_tensors():
            raise DistillError(
                f"{type(self).__name__}: nothing of the {type(unwrap_model(student)).__name__} is trained, so it has "
                "no past. Wrap a quantised student by peft.get_peft_model, or unfreeze some of its parameters."
            )

    def teacher_mode(self) -> AbstractContextManager[None]:
        """The past's weights are in place."""
        return self.swapped_weights()

    def _told(self, signals: Signals) -> Signals:
        """Where gathering the student's weights again would write over the head's, the head has its own."""
        source = signals.logits
        if not self._resharded or not isinstance(source, LazyLogits):
            return signals
        bias = None if source.bias is None else source.bias.clone()
        return replace(signals, logits=replace(source, weight=source.weight.clone(), bias=bias))

    @contextmanager
    def swapped_weights(self) -> Iterator[None]:
        """While it lasts, the student's weights are those of its past: to evaluate or save them."""
        if self._is_swapped:
            yield
            return
        held = self._ensure_shadow()
        self._is_swapped = True
        now = self._tracked_tensors()
        own = [_swap_in(now[name], value) for name, value in held.items()]
        try:
            yield
        finally:
            for name, value in zip(held, own, strict=True):
                _swap_out(now[name], value)
            self._reshard()
            self._is_swapped = False

    def on_train_begin(self, step: int) -> None:
        """The past begins with the present."""
        self._ensure_shadow()

    @torch.no_grad()
    def on_step_end(self, step: int, updated: bool) -> None:
        """Move, after a step of the optimizer."""
        self._move(
            self._ensure_shadow(), {name: local_shard(t) for name, t in self._tracked_tensors().items()}, step, updated
        )

    @abstractmethod
    def _move(self, held: dict[str, Tensor], now: dict[str, Tensor], step: int, updated: bool) -> None: ...

    def metrics(self) -> dict[str, float]:
        """`teacher_weight_drift`: how far it has moved, as a share of the norm of where it began."""
        return {"teacher_weight_drift": self._drift.to(self._ensure_shadow(), is_sharded(self.model))}

    def save(self, folder: str, rank: int, write: bool) -> None:
        """Write its weights and where they began into a checkpoint; each rank of a sharded student its share.

        Raises:
            RunError: its weights are not finite; nothing is written.
        """
        shared, held = is_sharded(self.model), self._ensure_shadow()
        if not (write or shared):
            return
        file, buffers = state_file(folder, rank, shared), held.keys() - dict(self.model.named_parameters()).keys()
        advice = "Go on from an earlier checkpoint with a smaller learning_rate."
        check_finite(held, file, owner="the teacher, the student's past,", advice=advice, buffers=buffers)
        save_state(file, held=held, start=self._drift.start)

    def load(self, folder: str, rank: int) -> None:
        """Read what `save` wrote.

        Raises:
            DistillError: the checkpoint has none.
        """
        file = state_file(folder, rank, is_sharded(self.model))
        moving = self._tracked_tensors()
        state = load_state(file, local_shard(next(iter(moving.values()))).device, held=moving, start=moving)
        self._shadow, self._drift.start = state["held"], state["start"]

    def _reshard(self) -> None:
        """Of FSDP2, which keeps what it gathered for a forward: the past's weights must not be taken for now's."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                self._resharded = True
                module.reshard()

    def _tracked_tensors(self) -> dict[str, Tensor]:
        """What training changes: trained parameters of the student, and those of its buffers that are saved."""
        self._reshard()
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad and p.is_floating_point()}
        if not trained:
            return {}
        buffers = {
            f"{prefix}.{name}" if prefix else name: buffer
            for prefix, module in self.model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set
        }
        return strip_sidecar({**trained, **buffers})

    @torch.no_grad()
    def _ensure_shadow(self) -> dict[str, Tensor]:
        """The past, in float32; at first the present."""
        if not self._shadow:
            for name, tensor in self._tracked_tensors().items():
                self._shadow[name] = local_shard(tensor).detach().float().clone()
            self._drift.begin(self._shadow)
        return self._shadow


class EMATeacher(StudentCopyTeacher):
    """The moving average of the student (Mean Teacher, 1703.01780).

    After each step that changed the student: held = d * held + (1 - d) * student. With d = 0 it is the student as the
    last step left it.

    Args:
        decay: d, in [0, 1); or points [[progress, d], ...], see `schedule`.
        warmup: steps over which d rises in a straight line from 0; the first steps forget where training began.

    Raises:
        DistillError: a value out of range.
    """

    kind = "ema"

    def __init__(self, decay: Any = 0.999, warmup: int = 0):
        self._decay = parse_schedule(decay, "decay", 0, 1)
        if any(d == 1 for _, d in self._decay):
            raise DistillError(f"decay is {decay!r}; it must lie in [0, 1): with 1 the teacher never moves.")
        if warmup < 0:
            raise DistillError(f"warmup is {warmup}; it must be at least 0 steps")
        self._warmup = warmup

    def decay_at(self, step: int) -> float:
        """d after a number of steps, at the training's progress."""
        return value_at(self._decay, self.progress) * (min(1.0, step / self._warmup) if self._warmup else 1.0)

    def _move(self, held: dict[str, Tensor], now: dict[str, Tensor], step: int, updated: bool) -> None:
        if not updated:
            return
        values = [now[name].detach().to(value.dtype) for name, value in held.items()]
        torch._foreach_lerp_(list(held.values()), values, 1 - self.decay_at(step))
        trained = dict(self.model.named_parameters()).keys()
        for (name, value), new in zip(held.items(), values, strict=True):
            if name not in trained:  # a mask with -inf, whose average with itself is NaN
                value.copy_(new.where(new.isinf(), value))


class SnapshotTeacher(StudentCopyTeacher):
    """The student as it was: taken anew every so many steps (temporal self-distillation).

    Args:
        interval_steps: steps between two snapshots; None: it stays as it begins.
        path: a folder or id of weights to begin with, of the student's own class; None: the student as it begins.

    Raises:
        DistillError: neither is given, so that the teacher would be the start for ever; or `interval_steps` is below 1.
    """

    kind = "snapshot"

    def __init__(self, interval_steps: int | None = None, path: str | None = None):
        if interval_steps is None and path is None:
            raise DistillError("A snapshot needs `every`, the steps between two of them, or the `path` of one.")
        if interval_steps is not None and interval_steps < 1:
            raise DistillError(f"interval_steps is {interval_steps}; it must be at least 1 step")
        self._interval_steps, self._path = interval_steps, path

    @torch.no_grad()
    def _ensure_shadow(self) -> dict[str, Tensor]:
        fresh = not self._shadow
        held = super()._ensure_shadow()
        if fresh and self._path is not None:
            if is_sharded(self.model):
                raise DistillError(
                    f"{self._path} holds whole weights and the student is sharded: leave the path out and give "
                    "`every`, or use a FrozenTeacher of the path, which can be sharded."
                )
            past, loading = type(unwrap_model(self.model)).from_pretrained(self._path, output_loading_info=True)
            then = self._tracked_tensors_of(past)
            wrong = [name for name in loading["missing_keys"] if name in held]  # which were made up at random
            wrong += [name for name in held if name not in then or then[name].shape != held[name].shape]
            if wrong:
                self._shadow.clear()
                raise DistillError(
                    f"{self._path} does not hold the student's weights: {wrong[0]} is missing or differs."
                )
            for name, value in held.items():
                value.copy_(then[name])
            self._drift.begin(held)
        return held

    def _tracked_tensors_of(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: t.detach() for part in (model.named_parameters(), model.named_buffers()) for name, t in part}

    def _move(self, held: dict[str, Tensor], now: dict[str, Tensor], step: int, updated: bool) -> None:
        if self._interval_steps is not None and step % self._interval_steps == 0:
            for name, value in held.items():
                value.copy_(now[name])


def _swap_in(tensor: Any, value: Tensor) -> Tensor:
    """Put a value in a tensor's place; returns what was there."""
    mine = local_shard(tensor)
    if mine is tensor:
        own = tensor.data
        tensor.data = value.to(own.dtype)
        return own
    own = mine.detach().clone()
    _write(tensor, value)
    return own


def _swap_out(tensor: Any, own: Tensor) -> None:
    if local_shard(tensor) is tensor:
        tensor.data = own
    else:
        _write(tensor, own)


@torch.no_grad()
def _write(tensor: Any, value: Tensor) -> None:
    """Into a rank's share; ZeRO-3 forgets what it had gathered of the tensor."""
    local_shard(tensor).copy_(value)
    if hasattr(tensor, "ds_tensor") and tensor.ds_status.name == "AVAILABLE":
        tensor.partition()
