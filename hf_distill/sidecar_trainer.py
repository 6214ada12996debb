"""The sidecar's life in a Trainer: made with the model, optimized, saved with checkpoints, restored, never exported."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from .errors import DistillError
from .features import Features
from .sidecar import Sidecar, attach, load_sidecar, own_group, save_sidecar, sidecar_of, split

_Base: Any = Trainer if TYPE_CHECKING else object


class SidecarMixin(_Base):
    """For any Trainer whose student may wear a sidecar; without one everything is the Trainer's."""

    _features = Features()

    def wear(self, features: Features) -> None:
        """Attach new projectors and mixtures for these features to the model, in the place of earlier ones.

        Raises:
            DistillError: they would not be optimized as asked.
        """
        self._features = features
        self._attach(self.model)
        if self._sidecar is None:
            return
        if self.optimizer is not None and self.lr_scheduler is not None:
            raise DistillError(
                "`optimizers` brings a scheduler that was made before the projectors, whose learning rate it would not "
                "set: pass (optimizer, None), or `optimizer_cls_and_kwargs`."
            )
        config = getattr(self.args, "hf_deepspeed_config", None)
        if features.projectors.own_group and config is not None and "optimizer" in config.config:
            raise DistillError(
                "projectors have a learning_rate or weight_decay of their own, but DeepSpeed's config makes the "
                "optimizer: remove its `optimizer` section, and the Trainer's optimizer is used."
            )

    @property
    def _sidecar(self) -> Sidecar | None:
        """What the model wears, if there is something in it to train."""
        sidecar = sidecar_of(self.model)
        return sidecar if sidecar is not None and any(True for _ in sidecar.parameters()) else None

    def _attach(self, model: nn.Module) -> None:
        made = self._features.sidecar(self.args.seed).to(self.args.device) if self._features.terms else None
        attach(model, made)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As the Trainer's; each new model gets new projectors."""
        model = super().call_model_init(trial)
        self._attach(model)
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's; projectors get a group of their own where their settings ask for one."""
        brought = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        sidecar, settings = self._sidecar, self._features.projectors
        if sidecar is not None and (settings.own_group or (brought and not _holds(optimizer, sidecar))):
            own_group(optimizer, sidecar, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; a checkpoint also gets the sidecar."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self._sidecar is not None:
            save_sidecar(self._sidecar, output_dir, self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=None if state_dict is None else split(state_dict))

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


def _holds(optimizer: torch.optim.Optimizer, sidecar: Sidecar) -> bool:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return all(id(p) in held for p in sidecar.parameters())
