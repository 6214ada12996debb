"""Teachers that are the student itself in another state, so no second model is in memory.

`SelfTeacher` is the base class; `AdapterBaseTeacher` is the student without its adapters. EMA and snapshot teachers
(`ema.py`) and the multi-view teacher derive from the same base class.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.signals import FeatureKey, Signals
from ..core.targets import FeatureTokens, Targets
from ..errors import DistillError, raise_if_any, require_package
from ..models.blocks import LayerStack, get_layer_stack
from ..models.forward import extract_signals, measure_output_head
from ..models.module_state import eval_mode
from ..models.precision import autocast_like, has_float32_weights
from ..models.sidecar import strip_sidecar
from .base import Teacher

_INITS_THAT_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


class SelfTeacher(Teacher):
    """The student in eval mode and in the state that `teacher_mode` sets; `prepare` sets `model` to the student."""

    tied_to_student = True

    @abstractmethod
    def teacher_mode(self) -> AbstractContextManager[None]:
        """Return a context in which the student is in the teacher's state."""

    def layer_stack(self, which: str | None = None) -> LayerStack:
        """The student's layers."""
        return get_layer_stack(self.model, which)

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Run the student once, in the teacher's state and in the precision in which it is trained.

        accelerate enables its autocast in the forward of the student. DeepSpeed casts the weights and uses none.
        """
        device = targets.labels.device
        with autocast_like(device, device, enabled=has_float32_weights(self.model)):
            return self._run(inputs, targets, feature_requests)

    def _run(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        measure_output_head(self.model, inputs)
        with eval_mode(self.model), self.teacher_mode():
            return self._detach_from_weights(extract_signals(self.model, inputs, targets, feature_requests))

    def _detach_from_weights(self, signals: Signals) -> Signals:
        """Copy weights in the signals that the end of `teacher_mode` overwrites; by default there are none."""
        return signals


class AdapterBaseTeacher(SelfTeacher):
    """The student with its adapters disabled.

    The student learns its task from the hard labels, and the soft labels keep it close to its base model. The teacher
    is that base in eval mode: it costs one forward and no memory.
    """

    kind = "adapter_base"

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Find the student's adapters.

        Raises:
            DistillError: the student has no adapters, or its base changes during training.
        """
        require_package("peft", "peft", "A teacher that is the student's base without adapters")
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        self.model = student
        self._adapters: Any = [
            module for module in student.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        ]
        if not self._adapters:
            raise DistillError(
                f"The student, a {type(student).__name__}, has no adapters to disable: wrap it with "
                "peft.get_peft_model, set student.lora in a recipe, or use a FrozenTeacher of the same weights."
            )
        raise_if_any(self._changes_of_base(student))

    def _changes_of_base(self, student: nn.Module) -> list[str]:
        """Return the reasons why the student without its adapters does not stay the base model."""
        adapters = {
            id(p)
            for layer in self._adapters
            for name, p in layer.named_parameters()
            if name.split(".")[0] not in ("base_layer", "original_module")
        }
        parameters = strip_sidecar(dict(student.named_parameters()))
        trained = [name for name, p in parameters.items() if p.requires_grad and id(p) not in adapters]
        problems, remedy = [], "or use a FrozenTeacher of the same weights"
        if trained:
            problems.append(
                f"{len(trained)} parameters outside the adapters are trained ({', '.join(trained[:3])}), so the base "
                f"changes while it teaches: freeze them (bias='none' in a LoraConfig), train them by modules_to_save, "
                f"{remedy}"
            )
        batch_norms = [
            name
            for name, module in student.named_modules()
            if isinstance(module, _BatchNorm) and module.track_running_stats
        ]
        if batch_norms:
            problems.append(
                f"{batch_norms[0]} has running statistics, which change while the student trains: {remedy[3:]}"
            )
        for name, config in getattr(student, "peft_config", {}).items():
            init = getattr(config, "init_lora_weights", True)
            if isinstance(init, str) and init.lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
                problems.append(
                    f"the adapter {name!r} was initialized by {init!r}, which subtracts the adapter from the base's "
                    f"weights: use another init_lora_weights, {remedy}"
                )
        return problems

    @contextmanager
    def teacher_mode(self) -> Iterator[None]:
        """Disable the adapters; afterwards they are enabled and the same parameters are trained as before."""
        before = {name: (p, p.requires_grad) for name, p in self.model.named_parameters(remove_duplicate=False)}
        for layer in self._adapters:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._adapters:
                layer.enable_adapters(True)
            # After a forward under FSDP2, some modules hold gathered parameters in place of their shards.
            for name, p in self.model.named_parameters(remove_duplicate=False):
                shard, is_trained = before[name]
                p.requires_grad_(is_trained)
                shard.requires_grad_(is_trained)
