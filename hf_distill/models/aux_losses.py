"""Auxiliary losses: what a model's own forward adds to its cross entropy, such as router losses, z-losses, AdaLoRA's.

A model adds them where it gets labels, by its own rules and coefficients. So the student's forward gets labels, its
cross entropy is replaced by zero, and the `loss` that it returns is the sum of its auxiliary losses. Whether a model
adds any, and whether they can be had without the logits of all positions, is found by running it on two rows of the
first batch.
"""

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import numpy
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from .model_call import named_outputs
from .model_types import unwrap_model, unwrap_parallel
from .module_state import kept_attributes

logger = logging.get_logger(__name__)
PROBE_ROWS = 2
_RELATIVE_TOLERANCE = 1e-3  # between two runs of one forward: a loss that depends on the logits differs by far more


@dataclass(frozen=True)
class AuxPlan:
    """How the auxiliary losses of a model are had.

    needs_labels:  whether the model adds losses where it gets labels
    needs_logits:  whether it must then make the logits of all positions
    """

    needs_labels: bool = False
    needs_logits: bool = False


class AuxLosses:
    """Within `recorded`, the model's `loss` is what it adds to its cross entropy; `of(outputs)` returns that.

    Args:
        model: as prepared, wrappers and adapters included.
        inputs: the collator's batch.
        plan: whether its labels are given to the model; without, only what adapters around the model add is recorded.
    """

    def __init__(self, model: nn.Module, inputs: dict, plan: AuxPlan):
        self.model, self.plan = model, plan
        self.labels = labels_of(inputs) if plan.needs_labels else None
        self._zero: Tensor | None = None  # stands for the cross entropy of the forward that runs
        self.replaced = ""  # what was replaced by zero: "loss_function" or "cross_entropy"
        self.model_adds = False  # whether the model itself, inside its adapters, added something

    def of(self, outputs: Any) -> Tensor | None:
        """The sum of the auxiliary losses, [], with its graph; None: there are none."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        return loss if loss is not None and not self._is_untouched_zero(loss) else None

    @contextmanager
    def recorded(self) -> Iterator["AuxLosses"]:
        """Replace the cross entropy by zero while it lasts, for forwards of the model."""
        model = unwrap_model(self.model)
        if self.labels is None and model is unwrap_parallel(self.model):
            yield self
            return
        patches: dict[str, Any] = {"forward": self._with_labels(model.forward)}
        if self.labels is not None and hasattr(model, "loss_function"):
            patches["_loss_function"] = self._zero_first(model.loss_function)
        before = {name: model.__dict__[name] for name in patches if name in model.__dict__}
        model.__dict__.update(patches)
        try:
            # Of a model whose logits are not made the loss function is replaced as a whole.
            with _ZeroCrossEntropy(self) if self.plan.needs_logits else nullcontext():
                yield self
        finally:
            for name in patches:
                del model.__dict__[name]
            model.__dict__.update(before)

    def zero(self, like: Tensor, replaced: str) -> Tensor:
        """What is returned for the cross entropy, [] in float32: a new one for each forward."""
        with torch.inference_mode(False):
            self._zero, self.replaced = torch.zeros((), device=like.device), replaced
        return self._zero

    @property
    def is_replaced(self) -> bool:
        """Whether this forward's cross entropy has been replaced; later ones are auxiliary losses themselves."""
        return self._zero is not None

    def _is_untouched_zero(self, loss: Tensor) -> bool:
        return self._zero is not None and loss is self._zero and self._zero._version == 0

    def _with_labels(self, forward: Callable) -> Callable:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._zero, self.replaced = None, ""
            if self.labels is not None:
                kwargs["labels"] = self.labels
            outputs = named_outputs(forward(*args, **kwargs), self.model)
            self.model_adds = self.of(outputs) is not None
            if outputs.get("loss") is None:
                outputs["loss"] = self.zero(outputs["logits"], "")  # adapters add theirs to it
            return outputs

        return run

    def _zero_first(self, loss_function: Callable) -> Callable:
        @wraps(loss_function)
        def loss(*args: Any, **kwargs: Any) -> Any:
            if self.is_replaced:
                return loss_function(*args, **kwargs)
            return self.zero(kwargs["logits"] if "logits" in kwargs else args[0], "loss_function")

        return loss


class _ZeroCrossEntropy(TorchFunctionMode):
    """The first call of `torch.nn.functional.cross_entropy` in a forward returns zero."""

    def __init__(self, losses: AuxLosses):
        super().__init__()
        self.losses = losses

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.cross_entropy and not self.losses.is_replaced:
            return self.losses.zero(args[0], "cross_entropy")
        return func(*args, **(kwargs or {}))


_plans: WeakKeyDictionary[nn.Module, dict[Any, AuxPlan]] = WeakKeyDictionary()


def plan_aux_losses(model: nn.Module, inputs: dict, forward: Callable[[dict, bool], Any]) -> AuxPlan:
    """How the auxiliary losses of a model are had; found once for each mode and config, on the first rows of a batch.

    Args:
        model: as prepared.
        inputs: the collator's batch.
        forward: called with (rows of the batch, whether the output head is replaced); returns the model's outputs.
    """
    inner = unwrap_model(model)
    switches = sorted((name, value) for name, value in inputs.items() if isinstance(value, bool))
    key = (model.training, *switches, *_settings(inner.config))
    plans = _plans.setdefault(inner, {})
    if key not in plans:
        takes_labels = "labels" in inspect.signature(type(inner).forward).parameters
        plans[key] = _probe(model, first_rows(inputs, PROBE_ROWS), forward) if takes_labels else AuxPlan()
    return plans[key]


def labels_of(inputs: dict) -> Tensor:
    """The labels of a batch, also where a collator shifted them: auxiliary losses do not look at their values."""
    labels = inputs.get("labels")
    return inputs["shift_labels"] if labels is None else labels


def _probe(model: nn.Module, rows: dict, forward: Callable[[dict, bool], Any]) -> AuxPlan:
    losses = AuxLosses(model, rows, AuxPlan(needs_labels=True, needs_logits=True))
    name = type(unwrap_model(model)).__name__
    with torch.no_grad(), losses.recorded():
        try:
            with _unchanged(model):
                added = losses.of(forward(rows, False))
        except Exception as error:
            if should_reduce_batch_size(error):  # out of memory
                raise
            logger.warning_once(
                f"{name} cannot compute its own loss from the labels of the batch ({error}): what it may add to its "
                "cross entropy is left out."
            )
            return AuxPlan()
        if added is None or not losses.model_adds:
            return AuxPlan()
        if not losses.replaced:
            logger.warning_once(
                f"{name} computes a loss of its own that is no cross entropy of torch or transformers. The hard labels "
                "are learnt by cross entropy, and auxiliary losses that its own loss may contain are left out."
            )
            return AuxPlan()
        if losses.replaced == "loss_function":
            with _unchanged(model):
                fused = losses.of(forward(rows, True))
            if fused is not None and torch.allclose(fused, added, rtol=_RELATIVE_TOLERANCE, equal_nan=True):
                return AuxPlan(needs_labels=True)
    logger.warning_once(
        f"{name} adds auxiliary losses to its cross entropy that need its logits: the logits of all positions are "
        "made. The objective is the same; the memory is not."
    )
    return AuxPlan(needs_labels=True, needs_logits=True)


def first_rows(inputs: dict, count: int) -> dict:
    """The first rows of a batch; all of it where a tensor does not have one entry for each row."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    size = len(labels_of(inputs))
    if any(value.dim() == 0 or len(value) != size for value in tensors.values()):
        return inputs
    return inputs | {name: value[:count] for name, value in tensors.items()}


def _settings(config: Any) -> tuple:
    """The switches and coefficients of a config, which decide what a model adds to its loss.

    Texts are left out: saving a model writes some into the config, and only on the process that writes. The processes
    of a sharded model have to probe together.
    """
    parts = (config, config.get_text_config()) if hasattr(config, "get_text_config") else (config,)
    return tuple(value for part in parts for value in vars(part).values() if isinstance(value, bool | int | float))


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """A forward in training mode that leaves random states, what modules keep and the config as they were."""
    config = vars(unwrap_model(model).config)
    before, python, of_numpy = dict(config), random.getstate(), numpy.random.get_state()
    devices = {p.device for p in model.parameters() if p.is_cuda}
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    for norm in norms:
        norm.eval()
    try:
        with torch.random.fork_rng(devices=list(devices)), kept_attributes(model):
            yield
    finally:
        for norm in norms:
            norm.train()
        random.setstate(python)
        numpy.random.set_state(of_numpy)
        config.clear()
        config.update(before)


__all__ = ["AuxLosses", "AuxPlan", "first_rows", "labels_of", "plan_aux_losses"]
