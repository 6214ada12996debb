"""Teachers whose weights are earlier weights of the student: their moving average (EMA) or a snapshot.

There is one model. A float32 copy of the trained weights, the shadow, is kept and replaces the student's weights during
the teacher's forward. The shadow holds only the adapters of a student with adapters, tied weights once, and on each
rank of a sharded student the shards of that rank.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.logits import LazyLogits
from ..core.schedule import parse_schedule, value_at
from ..core.signals import Signals
from ..errors import DistillError
from ..models.checkpoint_weights import read_weights
from ..models.finite_weights import check_finite
from ..models.model_types import unwrap_model
from ..models.output_head import check_head_stays_gathered
from ..models.sharding import is_sharded, local_shard, reshard
from ..models.sidecar import strip_sidecar
from .pretrained import as_path, read_config
from .self_teacher import SelfTeacher
from .state import WeightDrift, load_state, save_state, state_file

_BUCKET_BYTES = 256 * 2**20  # of float32 copies of the student's weights that exist at a time
_Pair: TypeAlias = tuple[Tensor, Tensor]
_SHADOW = "held"  # name of the group of the shadow's tensors in a checkpoint


class StudentCopyTeacher(SelfTeacher):
    """The student with a copy of its weights, the shadow, which derived classes update in `_move`."""

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Find the weights that training changes; the shadow is copied from them when it is first needed.

        Raises:
            DistillError: no floating-point parameter of the student is trained.
        """
        check_head_stays_gathered(student)
        self.model = student
        self._shadow: dict[str, Tensor] = {}
        self._drift = WeightDrift()
        self._is_swapped = self._resharded = False
        if not self._tracked_tensors():
            raise DistillError(
                f"{type(self).__name__} copies the weights that are trained, and no parameter of the "
                f"{type(unwrap_model(student)).__name__} is trained. Wrap a quantized student with "
                "peft.get_peft_model, or unfreeze some of its parameters."
            )

    def teacher_mode(self) -> AbstractContextManager[None]:
        """Put the shadow in place of the student's weights."""
        return self.swapped_weights()

    def _detach_from_weights(self, signals: Signals) -> Signals:
        """Copy the head's weights under FSDP2, which writes over them when it gathers the student's weights again."""
        source = signals.logits
        if not self._resharded or not isinstance(source, LazyLogits):
            return signals
        source.check_weight()
        bias = None if source.bias is None else source.bias.clone()
        return replace(signals, logits=replace(source, weight=source.weight.clone(), bias=bias))

    @contextmanager
    def swapped_weights(self) -> Iterator[None]:
        """Put the teacher's weights into the student while the context lasts, to evaluate or save the teacher."""
        if self._is_swapped:
            yield
            return
        shadow, student = self._ensure_shadow(), self._tracked_tensors()
        student_values: dict[str, Tensor] = {}
        self._is_swapped = True
        try:
            for name, value in shadow.items():  # a cast may not fit into memory
                student_values[name] = _swap_in(student[name], value)
            torch.clear_autocast_cache()  # it holds casts of parameters, whose values are replaced
            yield
        finally:
            for name, value in student_values.items():
                _swap_out(student[name], value)
            torch.clear_autocast_cache()
            self._reshard()
            self._is_swapped = False

    def on_train_begin(self, step: int) -> None:
        """Copy the shadow from the student, unless `load` has read it."""
        self._ensure_shadow()

    @torch.no_grad()
    def on_step_end(self, step: int, updated: bool) -> None:
        """Update the shadow after an optimizer step."""
        self._move(
            self._ensure_shadow(), {name: local_shard(t) for name, t in self._tracked_tensors().items()}, step, updated
        )

    @abstractmethod
    def _move(self, shadow: dict[str, Tensor], student: dict[str, Tensor], step: int, updated: bool) -> None:
        """Update the shadow in place; see `on_step_end`.

        Args:
            shadow: name -> tensor of the teacher, float32, this rank's shard.
            student: name -> tensor of the student, this rank's shard.
            step: number of the optimizer step, counted from 1.
            updated: whether the step changed the student.
        """

    def metrics(self) -> dict[str, float]:
        """Return `teacher_weight_drift`: ||weights - initial weights|| / ||initial weights||, from a sample."""
        return {"teacher_weight_drift": self._drift.relative_to_start(self._ensure_shadow(), is_sharded(self.model))}

    def save(self, folder: str, rank: int, write: bool) -> None:
        """Write the shadow and the sampled initial weights; each rank of a sharded student writes its shards.

        Raises:
            RunError: some weights are not finite; nothing is written.
        """
        sharded, shadow = is_sharded(self.model), self._ensure_shadow()
        if not (write or sharded):
            return
        file, buffers = state_file(folder, rank, sharded), shadow.keys() - dict(self.model.named_parameters()).keys()
        advice = "Resume from an earlier checkpoint with a smaller learning_rate."
        check_finite(shadow, file, owner="the teacher, a copy of the student,", advice=advice, buffers=buffers)
        save_state(file, **{_SHADOW: shadow, "start": self._drift.start})

    def load(self, folder: str, rank: int) -> None:
        """Read what `save` wrote.

        Raises:
            DistillError: the checkpoint has no state of such a teacher.
        """
        file = state_file(folder, rank, is_sharded(self.model))
        tracked = self._tracked_tensors()
        device = local_shard(next(iter(tracked.values()))).device
        state = load_state(file, device, **{_SHADOW: tracked, "start": tracked})
        self._shadow, self._drift.start = state[_SHADOW], state["start"]

    def _reshard(self) -> None:
        """Free the weights that FSDP2 gathered for a forward, so that it does not use the shadow's for the student."""
        if reshard(self.model):
            self._resharded = True

    def _tracked_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that training changes: trained parameters of the student, and its persistent buffers."""
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
        """Return the shadow, float32; it is copied from the student's weights when it does not exist yet."""
        if not self._shadow:
            for name, tensor in self._tracked_tensors().items():
                self._shadow[name] = local_shard(tensor).detach().to(torch.float32, copy=True)
            self._drift.begin(self._shadow)
        return self._shadow


class EMATeacher(StudentCopyTeacher):
    """Exponential moving average of the student's weights (Mean Teacher, arXiv 1703.01780).

    After each step that changed the student: teacher = d * teacher + (1 - d) * student. With d = 0 the teacher has the
    student's weights after the last step.

    Args:
        decay: d, in [0, 1); or a schedule [[progress, d], ...], see `core.schedule`.
        warmup: number of steps in which d rises linearly from 0, so that the initial weights are soon forgotten.

    Raises:
        DistillError: a value is out of range.
    """

    kind = "ema"

    def __init__(self, decay: Any = 0.999, warmup: int = 0):
        self._decay = parse_schedule(decay, "decay", 0, 1)
        if any(d == 1 for _, d in self._decay):
            raise DistillError(f"decay is {decay!r}; it must lie in [0, 1): with 1 the teacher never changes.")
        if type(warmup) is not int or warmup < 0:
            raise DistillError(f"warmup is {warmup!r}; it must be a whole number of at least 0 steps")
        self._warmup = warmup

    def decay_at(self, step: int) -> float:
        """Return d after a number of steps, at the present progress of the training."""
        return value_at(self._decay, self.progress) * (min(1.0, step / self._warmup) if self._warmup else 1.0)

    def _move(self, shadow: dict[str, Tensor], student: dict[str, Tensor], step: int, updated: bool) -> None:
        if not updated:
            return
        parameters, weight = dict(self.model.named_parameters()).keys(), 1 - self.decay_at(step)
        averaged = [(value, student[name].detach()) for name, value in shadow.items() if name in parameters]
        for bucket in _buckets(averaged, _BUCKET_BYTES):
            values = [value for value, _ in bucket]
            torch._foreach_lerp_(values, [new.to(value.dtype) for value, new in bucket], weight)
        buffers = [(value, student[name].detach()) for name, value in shadow.items() if name not in parameters]
        for value, new in (pair for bucket in _buckets(buffers, _BUCKET_BYTES // 4) for pair in bucket):
            new = new.to(value.dtype)
            value.copy_(new.where(new.isinf(), value.lerp_(new, weight)))  # inf of a mask: inf - inf would be NaN


def _buckets(pairs: Iterable[_Pair], max_bytes: int) -> Iterator[list[_Pair]]:
    """Divide pairs of (teacher's tensor, student's tensor) into buckets of similar size.

    Args:
        pairs: tensors of one shape each, the teacher's in float32.
        max_bytes: size of a bucket in bytes of float32; larger tensors are divided into views. A pair of which both are
            float32 needs no copy and counts as nothing.

    Returns:
        lists of pairs; each element of each tensor is in one of them.
    """
    bucket, num_bytes = list[_Pair](), 0
    for piece in chain.from_iterable(_pieces(pair, max_bytes) for pair in pairs):
        size = _copied_bytes(piece)
        if bucket and num_bytes + size > max_bytes:
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(piece)
        num_bytes += size
    if bucket:
        yield bucket


def _pieces(pair: _Pair, max_bytes: int) -> Iterator[_Pair]:
    """Divide a pair into halves until its copy has at most `max_bytes`."""
    if _copied_bytes(pair) <= max_bytes or pair[0].numel() == 1:
        yield pair
        return
    dim = next(dim for dim, size in enumerate(pair[0].shape) if size > 1)
    halves = (tensor.split((tensor.shape[dim] + 1) // 2, dim) for tensor in pair)
    for teacher_half, student_half in zip(*halves, strict=True):
        yield from _pieces((teacher_half, student_half), max_bytes)


def _copied_bytes(pair: _Pair) -> int:
    value, new = pair
    return 0 if new.dtype == value.dtype else value.numel() * value.element_size()


class SnapshotTeacher(StudentCopyTeacher):
    """A snapshot of the student's weights, taken again after every `interval_steps` steps (temporal self-distillation).

    Args:
        interval_steps: optimizer steps between two snapshots; None: the first snapshot stays.
        path: folder or Hub id of the first snapshot, a model of the student's class; None: the initial student.

    Raises:
        DistillError: neither is given, so the teacher would always be the initial student; or `interval_steps` is
            below 1.
    """

    kind = "snapshot"

    def __init__(self, interval_steps: int | None = None, path: str | None = None):
        if interval_steps is None and path is None:
            raise DistillError(
                "SnapshotTeacher was given neither `interval_steps`, the optimizer steps between two snapshots, nor "
                "`path`, the folder or id of a snapshot: give at least one of them."
            )
        if interval_steps is not None and (type(interval_steps) is not int or interval_steps < 1):
            raise DistillError(f"interval_steps is {interval_steps!r}; it must be a whole number of at least 1 step")
        self._interval_steps, self._path = interval_steps, path

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Find the weights that training changes, and check that the snapshot is a model with the same ones.

        Raises:
            DistillError: no parameter of the student is trained; or there is no model at `path`, or another one.
        """
        super().prepare(student, device, processing_class)
        model = unwrap_model(student)
        if self._path is None or is_sharded(student) or not isinstance(model, PreTrainedModel):
            return
        config = read_config(as_path(self._path), {})
        with torch.device("meta"):
            snapshot = type(model)(config)
        self._check_shapes(self._tracked_tensors(), self._tensors_of(snapshot), [])

    def _check_shapes(self, student: dict[str, Tensor], snapshot: dict[str, Tensor], missing: list[str]) -> None:
        """Check that a snapshot has the weights of the student.

        Args:
            student: name -> tensor of the student that training changes.
            snapshot: name -> tensor of the snapshot.
            missing: names that its checkpoint does not have, whose values are random.

        Raises:
            DistillError: it has not.
        """
        wrong = [name for name in missing if name in student]
        wrong += [name for name in student if name not in snapshot or snapshot[name].shape != student[name].shape]
        if wrong:
            raise DistillError(
                f"{self._path} does not hold the student's weights: {wrong[0]} is missing or has another shape. "
                "Give a checkpoint of a model with the student's class and config."
            )

    @torch.no_grad()
    def _ensure_shadow(self) -> dict[str, Tensor]:
        if self._shadow or self._path is None:
            return super()._ensure_shadow()
        if is_sharded(self.model):
            raise DistillError(
                f"{self._path} holds unsharded weights and the student is sharded: leave `path` out and give "
                "`interval_steps`, or use a FrozenTeacher of the path, which can be sharded."
            )
        tensors, missing = self._read_snapshot()  # it may fail, and must leave no shadow then
        self._check_shapes(self._tracked_tensors(), tensors, missing)
        shadow = super()._ensure_shadow()
        for name, value in shadow.items():
            value.copy_(tensors[name])
        self._drift.begin(shadow)
        return shadow

    def _read_snapshot(self) -> tuple[dict[str, Tensor], list[str]]:
        """Return the tensors of the snapshot by name, and the names that its checkpoint does not have."""
        model = unwrap_model(self.model)
        if not isinstance(model, PreTrainedModel):  # the checkpoint of a Trainer has the state dict
            return read_weights(Path(str(self._path))), []
        snapshot, report = cast(Any, type(model)).from_pretrained(self._path, output_loading_info=True)
        return self._tensors_of(snapshot), report["missing_keys"]

    def _tensors_of(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: t.detach() for part in (model.named_parameters(), model.named_buffers()) for name, t in part}

    def _move(self, shadow: dict[str, Tensor], student: dict[str, Tensor], step: int, updated: bool) -> None:
        if self._interval_steps is not None and step % self._interval_steps == 0:
            for name, value in shadow.items():
                value.copy_(student[name])


def _swap_in(tensor: Any, value: Tensor) -> Tensor:
    """Write a value into a tensor, or this rank's shard of one, and return the value that it had."""
    shard = local_shard(tensor)
    if shard is tensor:
        student_value = tensor.data
        tensor.data = value.to(student_value.dtype)
        return student_value
    student_value = shard.detach().clone()
    _write(tensor, value)
    return student_value


def _swap_out(tensor: Any, student_value: Tensor) -> None:
    if local_shard(tensor) is tensor:
        tensor.data = student_value
    else:
        _write(tensor, student_value)


@torch.no_grad()
def _write(tensor: Any, value: Tensor) -> None:
    """Write into this rank's shard; weights that ZeRO-3 gathered before are partitioned again."""
    local_shard(tensor).copy_(value)
    if hasattr(tensor, "ds_tensor") and tensor.ds_status.name == "AVAILABLE":
        tensor.partition()
