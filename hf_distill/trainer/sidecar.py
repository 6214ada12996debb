"""The sidecar's life in a Trainer: made with the model, optimized, saved with checkpoints, restored, never exported."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
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
from ..teachers import Teacher

_Base: Any = Trainer if TYPE_CHECKING else object


class SidecarMixin(_Base):
    """For any Trainer whose student may wear a sidecar; without one everything is the Trainer's."""

    _features = Features()
    _teacher_module: nn.Module | None = None  # of the teacher
    _teacher_max_grad_norm: float | None = None
    _param_group_options: Mapping[tuple[str, ...], Mapping[str, float | None]] = MappingProxyType(
        {}
    )  # kinds of parts -> options

    def attach_sidecar(self, features: Features, teacher: Teacher | None = None, renew: bool = True) -> None:
        """Attach what is trained beside the model to it, in the place of an earlier sidecar.

        Args:
            features: of which new projectors and mixtures are made.
            teacher: a prepared one, of which something may be trained.
            renew: whether an earlier sidecar with the same parts is replaced, too.

        Raises:
            DistillError: it would not be optimized as asked.
        """
        same = (features.layout, None if teacher is None else teacher.trainable_module) == (
            self._features.layout,
            self._teacher_module,
        )
        self._features = features
        groups: dict[tuple[str, ...], Mapping[str, float | None]] = {}
        groups[("projectors", "mappings")] = features.projectors.options
        self._teacher_module = self._teacher_max_grad_norm = None
        if teacher is not None and teacher.trainable_module is not None:
            self._teacher_module, self._teacher_max_grad_norm = teacher.trainable_module, teacher.max_grad_norm
            groups[("teacher",)] = teacher.optimizer_overrides
        self._param_group_options = groups
        if renew or not same:
            self._attach(self.model)
        if self._sidecar is None:
            return
        if self.optimizer is not None and self.lr_scheduler is not None and not self._created_lr_scheduler:
            raise DistillError(
                "`optimizers` brings a scheduler that was made before what is trained beside the student (projectors, "
                "a teacher), whose learning rate it would not set: pass (optimizer, None), or "
                "`optimizer_cls_and_kwargs`."
            )
        config = getattr(self.args, "hf_deepspeed_config", None)
        own = [
            kinds[0] for kinds, given in self._param_group_options.items() if any(v is not None for v in given.values())
        ]
        if own and config is not None and "optimizer" in config.config:
            raise DistillError(
                f"The {own[0]} has a learning_rate or weight_decay of its own, but DeepSpeed's config makes the "
                "optimizer: remove its `optimizer` section, and the Trainer's optimizer is used."
            )

    @property
    def _sidecar(self) -> Sidecar | None:
        """What the model wears, if there is something in it to train."""
        sidecar = sidecar_of(self.model)
        return sidecar if sidecar is not None and any(True for _ in sidecar.parameters()) else None

    def _attach(self, model: nn.Module) -> None:
        parts: dict[str, dict[str, nn.Module]] = self._features.parts(self.args.seed) if self._features.terms else {}
        if self._teacher_module is not None:
            parts["teacher"] = {"model": self._teacher_module}
        attach(model, Sidecar(parts).to(self.args.device) if parts else None)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As the Trainer's; each new model gets new projectors."""
        model = super().call_model_init(trial)
        self._attach(model)
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's; what hangs in the sidecar gets groups of its own where its settings ask for them."""
        brought = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        sidecar = self._sidecar
        for kinds, options in self._param_group_options.items():
            if sidecar is None:
                break
            parts = [sidecar.parts[kind] for kind in kinds if kind in sidecar.parts]
            trained = [p for part in parts for p in part.parameters() if p.requires_grad]
            given = {key: value for key, value in options.items() if value is not None}
            if given or (brought and not _contains_all(optimizer, trained)):
                move_to_param_groups(optimizer, trained, given)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As the Trainer's; a teacher may be clipped apart, so that neither model's gradient scales the other's."""
        if self._teacher_max_grad_norm is None or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        assert self._teacher_module is not None
        apart = {id(p): p for p in self._teacher_module.parameters()}
        self.accelerator.unscale_gradients()
        its = torch.nn.utils.clip_grad_norm_(apart.values(), self._teacher_max_grad_norm)
        own = [p for p in model.parameters() if id(p) not in apart]
        norm = torch.nn.utils.clip_grad_norm_(own, self.args.max_grad_norm)
        return torch.where(its.isfinite(), norm, its)  # the step is skipped for both

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; a checkpoint also gets the sidecar."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self._sidecar is not None:
            save_sidecar(self._sidecar, output_dir, self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=None if state_dict is None else strip_sidecar(state_dict))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Called on resume under every strategy, after the model has been loaded."""
        if checkpoint is not None and self._sidecar is not None:
            load_sidecar(self._sidecar, checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._sidecar is not None:
            load_sidecar(self._sidecar, str(self.state.best_model_checkpoint))

    def learned_layers(self) -> dict[str, float]:
        """Of learned mappings: for each student layer the mean of the teacher layers that it learns from."""
        sidecar = self._sidecar
        if sidecar is None or "mappings" not in sidecar.parts:
            return {}
        found: dict[str, float] = {}
        for name, mixture in sidecar.parts["mappings"].items():
            shares: Any = mixture.shares
            means = shares @ torch.arange(shares.shape[1], dtype=shares.dtype, device=shares.device)
            found |= {f"{name}_layer_{i}": value for i, value in enumerate(means.tolist())}
        return found


def _contains_all(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> bool:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return all(id(p) in held for p in parameters)
