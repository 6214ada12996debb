"""Auxiliary losses: what a model's forward adds to its cross entropy, such as router losses, z-losses and AdaLoRA's.

A model adds them if it gets labels, with its own rules and coefficients. So the student's forward gets labels, its
cross entropy is replaced by zero, and the `loss` that it returns is the sum of its auxiliary losses. Two rows of the
first batch are run to measure whether a model adds any, and whether they need the logits of all positions. A model is
refused if its loss fails, or contains losses that cannot be separated from its cross entropy.
"""

import inspect
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import numpy
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.utils import ModelOutput, logging

from ..core.logits import DenseLogits
from ..core.signals import Signals
from ..core.targets import IGNORE_INDEX, Targets, as_int64
from ..errors import DistillError
from ..losses.registry import get_loss
from .image_inputs import without_images
from .model_call import named_outputs
from .model_types import unmeasured_type_of, unwrap_model, unwrap_parallel
from .module_state import restored_attributes

logger = logging.get_logger(__name__)
Forward: TypeAlias = Callable[[dict, bool], ModelOutput]  # see `plan_aux_losses`
_T = TypeVar("_T")
PROBE_ROWS = 2
# No function, or one that also computes auxiliary losses: the first cross entropy inside it is replaced.
_SUMS_OF_LOSSES = (None, LOSS_MAPPING["ForSemanticSegmentation"])
_SWITCH = (bool, int, float)
_LOSS_SETTING = re.compile(
    "loss|coef|router_logits|smoothing|^eps$"
)  # names of config settings that add to a model's loss
_ROUNDING = 2e-5  # of two cross entropies of the same logits: those of a model without training differ by little more
_RELATIVE_TOLERANCE = 1e-3  # between two runs of one forward: a loss that depends on the logits differs by far more


@dataclass(frozen=True)
class AuxPlan:
    """The way in which the auxiliary losses of a model are computed.

    needs_labels: whether the model adds auxiliary losses if it gets labels
    needs_logits: whether it then has to materialize the logits of all positions
    """

    needs_labels: bool = False
    needs_logits: bool = False


class AuxLosses:
    """The auxiliary losses of one batch: within `recorded`, the model's `loss` is their sum, and `of` returns it.

    Args:
        model: as prepared, wrappers and adapters included.
        inputs: the collator's batch.
        plan: whether the model gets the labels; if not, only the losses that adapters add are recorded.
    """

    def __init__(self, model: nn.Module, inputs: dict, plan: AuxPlan):
        self.model, self.plan = model, plan
        self.labels = labels_of(inputs) if plan.needs_labels else None
        self._zero: Tensor | None = None  # replaces the cross entropy of the current forward
        self.replaced = ""  # the replaced function: "loss_function" or "cross_entropy"
        self.is_modified = False  # whether a cross entropy of a class outside transformers has weights of classes
        self.cross_entropies = 0  # number of calls in the last forward
        self.added_by_model: Tensor | None = None  # without the losses that adapters add

    def of(self, outputs: object) -> Tensor | None:
        """Return the sum of the auxiliary losses, [], with its graph; None if there are none."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        return loss if loss is not None and not self._is_untouched_zero(loss) else None

    @contextmanager
    def recorded(self, replace: bool = True) -> Iterator["AuxLosses"]:
        """Replace the cross entropy by zero in forwards of the model, within a `with` block.

        Args:
            replace: False gives the model its labels and keeps the cross entropy in its loss.
        """
        model = unwrap_model(self.model)
        if self.labels is None and model is unwrap_parallel(self.model):
            yield self
            return
        patches: dict[str, object] = {"forward": self._with_labels(model.forward)}
        if replace and self.labels is not None and getattr(model, "loss_function", None) not in _SUMS_OF_LOSSES:
            patches["_loss_function"] = self._zero_first(model.loss_function)
        before = {name: model.__dict__[name] for name in patches if name in model.__dict__}
        model.__dict__.update(patches)
        try:
            # Without logits the full loss function is replaced, so its cross entropy is not called.
            with _ZeroCrossEntropy(self) if replace and self.plan.needs_logits else nullcontext():
                yield self
        finally:
            for name in patches:
                del model.__dict__[name]
            model.__dict__.update(before)

    def zero(self, like: Tensor, replaced: str) -> Tensor:
        """Return a new zero, [] in float32, instead of the cross entropy of this forward.

        Args:
            like: tensor on the device of the result.
            replaced: name of the replaced function.
        """
        with torch.inference_mode(False):
            self._zero, self.replaced = torch.zeros((), device=like.device), replaced
        return self._zero

    @property
    def is_replaced(self) -> bool:
        """Whether the cross entropy of this forward was replaced; later cross entropies are auxiliary losses."""
        return self._zero is not None

    def _is_untouched_zero(self, loss: Tensor) -> bool:
        return self._zero is not None and loss is self._zero and self._zero._version == 0

    def _with_labels(self, forward: Callable) -> Callable:
        @wraps(forward)
        def run(*args: object, **kwargs: object) -> ModelOutput:
            self._zero, self.replaced, self.cross_entropies = None, "", 0
            if self.labels is not None:
                kwargs["labels"] = self.labels.clone()  # some models change them in place
            outputs = named_outputs(forward(*args, **kwargs), self.model)
            self.added_by_model = self.of(outputs)
            if outputs.get("loss") is None:
                outputs["loss"] = self.zero(outputs["logits"], "")  # adapters add their losses to it
            return outputs

        return run

    def _zero_first(self, loss_function: Callable) -> Callable:
        @wraps(loss_function)
        def loss(*args: object, **kwargs: object) -> Tensor:
            self.cross_entropies += 1
            if self.is_replaced:
                return loss_function(*args, **kwargs)
            tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            return self.zero(next(tensors), "loss_function")  # the name of the logits depends on the class

        return loss


class _ZeroCrossEntropy(TorchFunctionMode):
    """Lets the first call of `torch.nn.functional.cross_entropy` in a forward return zero."""

    def __init__(self, losses: AuxLosses):
        super().__init__()
        self.losses = losses
        self._is_users_code = not type(unwrap_model(losses.model)).__module__.startswith("transformers.")

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func is torch.nn.functional.cross_entropy:
            self.losses.cross_entropies += 1
            if self._is_users_code and _is_modified(args, kwargs or {}):
                self.losses.is_modified = True
            elif not self.losses.is_replaced:
                return self.losses.zero(args[0], "cross_entropy")
        return func(*args, **(kwargs or {}))


def _is_modified(args: tuple, kwargs: dict) -> bool:
    """Whether a call of `torch.nn.functional.cross_entropy` has weights of classes or smooths the labels."""
    weight = args[2] if len(args) > 2 else kwargs.get("weight")
    return weight is not None or bool(kwargs.get("label_smoothing", 0.0))


_plans: WeakKeyDictionary[nn.Module, dict[tuple, AuxPlan]] = WeakKeyDictionary()


def plan_aux_losses(model: nn.Module, inputs: dict, forward: Forward, targets: Targets) -> AuxPlan:
    """Return how the auxiliary losses of a model are computed; measured once for each mode and config of the model.

    Args:
        model: as prepared.
        inputs: the collator's batch; its first rows are run.
        forward: called with (rows of the batch, whether the output head is replaced); returns the model's outputs.
        targets: the target tokens of the batch.

    Raises:
        DistillError: the model's loss fails, or contains losses that cannot be separated from its cross entropy.
    """
    inner = unwrap_model(model)
    switches = sorted((name, value) for name, value in inputs.items() if isinstance(value, bool))
    key = (model.training, *switches, *_settings(getattr(inner, "config", None)))
    plans = _plans.setdefault(inner, {})
    if key in plans:
        return plans[key]
    plan = _probe(model, inputs, forward, targets) if _takes_labels(type(inner)) else AuxPlan()
    if plan is None:  # without target tokens it is measured on the next batch
        return AuxPlan()
    plans[key] = plan
    return plan


def labels_of(inputs: dict) -> Tensor:
    """Return the labels of a batch as a model's forward reads them: `shift_labels` are shifted back."""
    labels = inputs.get("labels")
    return pad(inputs["shift_labels"][..., :-1], (1, 0), value=IGNORE_INDEX) if labels is None else as_int64(labels)


def _takes_labels(cls: type[nn.Module]) -> bool:
    """Whether labels reach the forward of a class, or that of a base class to which its `**kwargs` are passed."""
    for base in cls.__mro__:
        if "forward" not in vars(base) or base is nn.Module:
            continue
        parameters = inspect.signature(vars(base)["forward"]).parameters
        if "labels" in parameters:
            return True
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return False
    return False


def _probe(model: nn.Module, inputs: dict, forward: Forward, targets: Targets) -> AuxPlan | None:
    """Return the plan; None if the batch has no target tokens, without which it cannot be measured."""
    placeholders = unmeasured_type_of(model).placeholders
    first = first_rows(without_images(inputs, placeholders), PROBE_ROWS)
    for rows in [first] if first is inputs else [first, inputs]:  # some models read several rows as one example
        try:
            return _probe_rows(model, rows, forward, targets)
        except _ModelLossError as error:
            failure = error
    if not len(targets):
        return None
    inner = unwrap_model(model)
    raise DistillError(
        f"{type(inner).__name__} cannot compute its own loss from the batch ({failure}). What a model adds to its "
        "cross entropy, such as router losses, is part of the objective, and it cannot be measured here. Use a "
        f"collator that makes the inputs and labels that its loss needs. {_how_to_disable_model_loss(inner)}"
    ) from failure


def _probe_rows(model: nn.Module, rows: dict, forward: Forward, targets: Targets) -> AuxPlan | None:
    plan = AuxPlan(needs_labels=True, needs_logits=True)
    losses = AuxLosses(model, rows, plan)
    added = _run_with_labels(model, losses, lambda: losses.of(forward(rows, False)))
    replaced = losses.replaced
    if losses.added_by_model is None:
        return AuxPlan()
    if (is_separable := _is_separable(model, losses, rows, forward, targets)) is not True:
        return None if is_separable is None else AuxPlan()
    if replaced == "loss_function":
        fused = _run_with_labels(model, losses, lambda: losses.of(forward(rows, True)))
        if (
            fused is not None
            and added is not None
            and torch.allclose(fused, added, rtol=_RELATIVE_TOLERANCE, equal_nan=True)
        ):
            return AuxPlan(needs_labels=True)
    if targets.grid is None:  # the logits of images are always materialized
        logger.warning_once(
            f"{type(unwrap_model(model)).__name__} adds auxiliary losses to its cross entropy that need its logits: "
            "the logits of all positions are materialized. The objective is the same; each step takes more memory."
        )
    return plan


class _ModelLossError(Exception):
    """The forward of a model fails with the labels of the batch."""


def _run_with_labels(model: nn.Module, losses: AuxLosses, call: Callable[[], _T], replace: bool = True) -> _T:
    """Return `call()`, which runs the model's forward with labels.

    Raises:
        _ModelLossError: the forward fails.
    """
    with (
        torch.no_grad(),
        losses.recorded(replace),
        _unchanged(model),
        torch.compiler.set_stance("force_eager"),  # a few rows would make the shapes of compiled layers dynamic
    ):
        try:
            return call()
        except Exception as error:
            if isinstance(error, DistillError) or should_reduce_batch_size(error):  # out of memory
                raise
            raise _ModelLossError(f"{type(error).__name__}: {error}") from error


def _is_separable(model: nn.Module, losses: AuxLosses, rows: dict, forward: Forward, targets: Targets) -> bool | None:
    """Return whether a model's loss is its cross entropy plus the recorded losses; False if it is only the former.

    Some models sum several cross entropies whose mean is that of their logits, or compute it by a log-softmax.

    Returns:
        None if the rows have no target tokens and no cross entropy was recognized.

    Raises:
        DistillError: the loss contains other losses, or another cross entropy.
    """
    added, replaced, count = losses.added_by_model, losses.replaced, losses.cross_entropies
    assert added is not None
    outputs = _run_with_labels(model, losses, lambda: forward(rows, False), replace=False)
    first_targets = targets.first_rows(len(labels_of(rows)))
    if not len(first_targets):
        return True if replaced else None
    logits, model_loss = first_targets.gather_logits(outputs["logits"]), losses.added_by_model
    assert model_loss is not None
    name = unmeasured_type_of(model).output_type.hard_loss
    assert name is not None, "a model without labels has no loss"
    hard_loss = get_loss(name)
    signals = Signals(DenseLogits(logits.double().to(first_targets.labels.device)))
    plain = float(hard_loss.function(signals, None, first_targets).mean())
    precision = max(torch.finfo(dtype).eps for dtype in (model_loss.dtype, outputs["logits"].dtype))
    rounding = max(_ROUNDING, 8 * precision) * abs(plain)  # a loss in float32 can be computed from logits in bfloat16
    value, recorded = float(model_loss), float(added)
    if not (math.isfinite(value) and math.isfinite(plain)):  # the step reports what is not finite
        return True if replaced else None
    if replaced and abs(value - plain - recorded) <= max(rounding, _RELATIVE_TOLERANCE * (abs(value) + abs(recorded))):
        return True
    if abs(value - plain) <= rounding and not losses.is_modified:  # weights do not change a few rows of one class
        return False
    if replaced and count == 1:  # a cross entropy over other positions, such as masked ones
        return True
    inner = unwrap_model(model)
    raise DistillError(
        f"The own loss of {type(inner).__name__} is {value:.6g} for the first rows, and the cross entropy of its "
        f"logits with the labels is {plain:.6g}: it contains losses that cannot be separated from the cross entropy, "
        f"so the objective would miss them. {_how_to_disable_model_loss(inner)}"
    )


def _how_to_disable_model_loss(model: nn.Module) -> str:
    """Return how to train a model without the losses that its forward adds, for an error message."""
    if not isinstance(model, PreTrainedModel):
        return (
            "To train with the loss of the model type, let its forward take no `labels`. To train with its own loss, "
            "register this loss and a model type whose hard_loss it is (hf_distill.register_model_type)."
        )
    config = getattr(model, "config", None)
    parts = (config, config.get_text_config()) if isinstance(config, PretrainedConfig) else ()
    settings = {name: value for part in parts for name, value in vars(part).items() if _LOSS_SETTING.search(name)}
    values = ", ".join(f"{name}={value!r}" for name, value in sorted(settings.items()) if isinstance(value, _SWITCH))
    turn_off = f"disable them in its config (it has {values}); or " if values else ""
    return (
        f"To train without such losses, {turn_off}derive a class from {type(model).__name__} whose forward has no "
        "`labels` and no `**kwargs`, so it computes no loss."
    )


def first_rows(inputs: dict, count: int) -> dict:
    """Return the first rows of a batch; the full batch if a tensor does not have one entry for each row."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    size = len(labels_of(inputs))
    if any(value.dim() == 0 or len(value) != size for value in tensors.values()):
        return inputs
    return inputs | {name: value[:count] for name, value in tensors.items()}


def _settings(config: object) -> tuple:
    """Return the numbers and booleans of a config, if a model has one, which decide what a model adds to its loss.

    Strings are excluded: saving a model changes some of them, and only on the process that writes, while all processes
    of a sharded model have to measure at the same step.
    """
    parts = (config, config.get_text_config()) if isinstance(config, PretrainedConfig) else ()
    return tuple(value for part in parts for value in vars(part).values() if isinstance(value, _SWITCH))


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore random states, attributes of modules and the config after a forward in training mode."""
    described = getattr(unwrap_model(model), "config", None)
    config = vars(described) if isinstance(described, PretrainedConfig) else {}
    before, python_state, numpy_state = dict(config), random.getstate(), numpy.random.get_state()
    devices = {p.device for p in model.parameters() if p.is_cuda}
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    for norm in norms:
        norm.eval()
    try:
        with torch.random.fork_rng(devices=list(devices)), restored_attributes(model):
            yield
    finally:
        for norm in norms:
            norm.train()
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        config.clear()
        config.update(before)


__all__ = ["AuxLosses", "AuxPlan", "first_rows", "labels_of", "plan_aux_losses"]
