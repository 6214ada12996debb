"""`SidecarMixin`: a Trainer that trains a sidecar with the student.

The sidecar holds the trained modules that are not part of the student (projectors, layer mixtures, a teacher). It is
optimized and saved in checkpoints, but never exported with the student.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..errors import DistillError
from ..models.features import Features
from ..models.sidecar import (
    Sidecar,
    attach,
    load_sidecar,
    move_to_param_groups,
    save_sidecar,
    sidecar_of,
    strip_sidecar,
)
from ..teachers import TrainableTeacher

_Base: Any = Trainer if TYPE_CHECKING else object


class SidecarMixin(_Base):
    """Attaches a sidecar to the student, optimizes, saves and restores it; without one nothing changes."""

    _features = Features()
    _trained_teacher: TrainableTeacher | None = None
    _teacher_module: nn.Module | None = None  # the trained module of the teacher
    # Kinds of sidecar parts -> options of their optimizer parameter group.
    _param_group_options: Mapping[tuple[str, ...], Mapping[str, float | None]] = MappingProxyType({})

    def attach_sidecar(self, features: Features, teacher: TrainableTeacher | None = None, renew: bool = True) -> None:
        """Attach a sidecar to the student, in place of an earlier one.

        Args:
            features: the terms on features, which say what projectors and layer mixtures are needed.
            teacher: a prepared teacher that is trained with the student.
            renew: whether to replace an earlier sidecar that has the same parts.

        Raises:
            DistillError: the optimizer or scheduler of the user or of DeepSpeed would ignore options of the sidecar.
        """
        trainable_module = None if teacher is None else teacher.trainable_module
        has_same_parts = (features.layout, trainable_module) == (self._features.layout, self._teacher_module)
        self._features = features
        groups: dict[tuple[str, ...], Mapping[str, float | None]] = {}
        groups[("projectors", "mappings")] = features.projectors.options
        self._trained_teacher, self._teacher_module = teacher, trainable_module
        if teacher is not None:
            groups[("teacher",)] = teacher.optimizer_overrides
        self._param_group_options = groups
        if renew or not has_same_parts:
            self._attach(self.model)
        if self._sidecar is None:
            return
        if self.optimizer is not None and self.lr_scheduler is not None and not self._created_lr_scheduler:
            raise DistillError(
                "`optimizers` has a scheduler that does not know the modules that are trained with the student "
                "(projectors, a teacher), so it would not set their learning rate. Pass (optimizer, None), or "
                "`optimizer_cls_and_kwargs`."
            )
        config = getattr(self.args, "hf_deepspeed_config", None)
        kinds_with_options = [
            kinds[0]
            for kinds, options in self._param_group_options.items()
            if any(value is not None for value in options.values())
        ]
        if kinds_with_options and config is not None and "optimizer" in config.config:
            raise DistillError(
                f"A learning_rate or weight_decay is set for the {kinds_with_options[0]}, but the `optimizer` section "
                "of the DeepSpeed config would ignore it. Remove that section: the Trainer then creates the optimizer."
            )

    @property
    def _sidecar(self) -> Sidecar | None:
        """The sidecar of the student; None if it has no parameters."""
        sidecar = sidecar_of(self.model)
        return sidecar if sidecar is not None and any(True for _ in sidecar.parameters()) else None

    def _attach(self, model: nn.Module) -> None:
        """Attach a new sidecar with the needed parts to a model; without parts remove an earlier one."""
        parts: dict[str, dict[str, nn.Module]] = self._features.parts(self.args.seed) if self._features.terms else {}
        if self._teacher_module is not None:
            parts["teacher"] = {"model": self._teacher_module}
        attach(model, Sidecar(parts).to(self.args.device) if parts else None)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Create a model as the Trainer does, and attach new projectors to it."""
        model = super().call_model_init(trial)
        self._attach(model)
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, and give the parts of the sidecar separate parameter groups where they have options."""
        is_users_optimizer = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        sidecar = self._sidecar
        for kinds, options in self._param_group_options.items():
            if sidecar is None:
                break
            parts = [sidecar.parts[kind] for kind in kinds if kind in sidecar.parts]
            trained = [p for part in parts for p in part.parameters() if p.requires_grad]
            overrides = {key: value for key, value in options.items() if value is not None}
            if overrides or (is_users_optimizer and not _contains_all(optimizer, trained)):
                move_to_param_groups(optimizer, trained, overrides)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the gradients; a teacher that has a `clip_norm` is clipped separately from the student.

        Returns:
            [] the norm of the student's gradient, or the teacher's if that is not finite: then both skip the step.
        """
        max_norm = None if self._trained_teacher is None else self._trained_teacher.clip_norm(self.args)
        if max_norm is None or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        assert self._teacher_module is not None
        teacher_parameters = {id(p): p for p in self._teacher_module.parameters()}
        self.accelerator.unscale_gradients()
        teacher_norm = torch.nn.utils.clip_grad_norm_(teacher_parameters.values(), max_norm)
        student_parameters = [p for p in model.parameters() if id(p) not in teacher_parameters]
        student_norm = torch.nn.utils.clip_grad_norm_(student_parameters, self.args.max_grad_norm)
        return torch.where(teacher_norm.isfinite(), student_norm, teacher_norm)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer.save_model` does; a checkpoint also gets the sidecar."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self._sidecar is not None:
            save_sidecar(self._sidecar, output_dir, self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=None if state_dict is None else strip_sidecar(state_dict))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the sidecar too; the Trainer calls this when it resumes, after it loaded the model."""
        if checkpoint is not None and self._sidecar is not None:
            load_sidecar(self._sidecar, checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._sidecar is not None:
            load_sidecar(self._sidecar, str(self.state.best_model_checkpoint))

    def learned_layers(self) -> dict[str, float]:
        """Return for each student layer of a learned mapping the weighted mean of its teacher layers, for the logs."""
        sidecar = self._sidecar
        if sidecar is None or "mappings" not in sidecar.parts:
            return {}
        mean_layers: dict[str, float] = {}
        for name, mixture in cast(nn.ModuleDict, sidecar.parts["mappings"]).items():
            shares = cast(Tensor, mixture.shares)
            means = shares @ torch.arange(shares.shape[1], dtype=shares.dtype, device=shares.device)
            mean_layers |= {f"{name}_layer_{i}": value for i, value in enumerate(means.tolist())}
        return mean_layers


def _contains_all(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> bool:
    """Return whether the optimizer has all these parameters."""
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return all(id(p) in in_optimizer for p in parameters)
