"""The student's own base as the teacher: no second model in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import DistillError, raise_if_any, require_package
from ..models.sidecar import strip_sidecar
from .self_teacher import SelfTeacher

_INITS_THAT_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


class AdapterBaseTeacher(SelfTeacher):
    """A student with adapters learns from itself with the adapters switched off.

    It learns its task from the hard labels while the soft ones keep it near the model that it was: the teacher is the
    base in eval mode, and costs its forward but no memory.
    """

    kind = "adapter_base"

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Find the student's adapters.

        Raises:
            DistillError: it has none, or without them it is not a model that stays as it is.
        """
        require_package("peft", "peft", "A teacher that is the student's own base")
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        self.model = student
        self._adapters: Any = [m for m in student.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        if not self._adapters:
            raise DistillError(
                f"The student, a {type(student).__name__}, has no adapters that could be switched off: wrap it by "
                "peft.get_peft_model, set student.lora in a recipe, or use a FrozenTeacher of the same weights."
            )
        raise_if_any(self._changes_of_base(student))

    def _changes_of_base(self, student: nn.Module) -> list[str]:
        """Why the student without its adapters would not be the model that it was."""
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
        statistics = [n for n, m in student.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if statistics:
            problems.append(
                f"{statistics[0]} keeps running statistics, which change while the student trains: {remedy[3:]}"
            )
        for name, config in getattr(student, "peft_config", {}).items():
            init = getattr(config, "init_lora_weights", True)
            if isinstance(init, str) and init.lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
                problems.append(
                    f"the adapter {name!r} was initialised by {init!r}, which takes its part out of the base's "
                    f"weights: use another init_lora_weights, {remedy}"
                )
        return problems

    @contextmanager
    def teacher_mode(self) -> Iterator[None]:
        """The adapters are off."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for layer in self._adapters:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._adapters:
                layer.enable_adapters(True)
            self.model.requires_grad_(False)
            for p in trained:
                p.requires_grad_(True)
