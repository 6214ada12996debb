"""`SidecarManager`: what a training does with the sidecar of the student.

The sidecar holds the trained modules that are not part of the student (projectors, layer mixtures, a teacher). It is
optimized and saved in checkpoints, but never exported with the student.
"""

from collections.abc import Mapping
from typing import cast
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import TrainingArguments

from ..errors import DistillError
from ..models.features import Features
from ..models.sidecar import Sidecar, attach, load_sidecar, move_to_param_groups, save_sidecar, sidecar_of
from ..teachers import TrainableTeacher


class SidecarManager:
    """Attaches a sidecar to the student, and optimizes, saves and restores it; without one nothing changes.

    `model` is the student, with or without wrappers, and `args` are the training arguments.
    """

    def __init__(self) -> None:
        self._features = Features()
        self._teacher: TrainableTeacher | None = None
        self._teacher_module: nn.Module | None = None  # the trained module of the teacher
        # Kinds of sidecar parts -> options of their optimizer parameter group.
        self._group_options: dict[tuple[str, ...], Mapping[str, float | None]] = {}
        # Optimizers that have these groups -> their sidecar; an optimizer of an earlier training is not kept in memory.
        self._grouped: WeakKeyDictionary[torch.optim.Optimizer, ReferenceType[Sidecar]] = WeakKeyDictionary()

    def replace(
        self,
        model: nn.Module,
        args: TrainingArguments,
        features: Features,
        teacher: TrainableTeacher | None = None,
        renew: bool = True,
        has_users_scheduler: bool = False,
    ) -> None:
        """Attach a sidecar with the needed parts to a student, in place of an earlier one.

        Args:
            model: the student.
            args: the training arguments.
            features: the terms on features, which say what projectors and layer mixtures are needed.
            teacher: a prepared teacher that is trained with the student.
            renew: whether to replace an earlier sidecar that has the same parts.
            has_users_scheduler: whether the user created the scheduler of the training.

        Raises:
            DistillError: the optimizer or scheduler of the user or of DeepSpeed would ignore options of the sidecar.
        """
        parts_before = (self._features.layout, self._teacher_module)
        self._features, self._teacher = features, teacher
        self._teacher_module = None if teacher is None else teacher.trainable_module
        self._group_options = {("projectors", "mappings"): features.projectors.options}
        if teacher is not None:
            self._group_options[("teacher",)] = teacher.optimizer_overrides
        if renew or (features.layout, self._teacher_module) != parts_before:
            self.attach(model, args)
        if trained_sidecar(model) is not None:
            self._check_optimizers(args, has_users_scheduler)

    def attach(self, model: nn.Module, args: TrainingArguments) -> None:
        """Attach a new sidecar with the needed parts to a model; without parts remove an earlier one."""
        parts: dict[str, dict[str, nn.Module]] = self._features.parts(args.seed) if self._features.terms else {}
        if self._teacher_module is not None:
            parts["teacher"] = {"model": self._teacher_module}
        attach(model, Sidecar(parts).to(args.device) if parts else None)

    def _check_optimizers(self, args: TrainingArguments, has_users_scheduler: bool) -> None:
        """Check that options of the sidecar take effect.

        Raises:
            DistillError: the scheduler of the user or the optimizer of DeepSpeed would ignore them.
        """
        if has_users_scheduler:
            raise DistillError(
                "`optimizers` has a scheduler that does not know the modules that are trained with the student "
                "(projectors, a teacher), so it would not set their learning rate. Pass (optimizer, None), or "
                "`optimizer_cls_and_kwargs`."
            )
        config = getattr(args, "hf_deepspeed_config", None)
        kinds_with_options = [
            kinds[0]
            for kinds, options in self._group_options.items()
            if any(value is not None for value in options.values())
        ]
        if kinds_with_options and config is not None and "optimizer" in config.config:
            raise DistillError(
                f"A learning_rate or weight_decay is set for the {kinds_with_options[0]}, but the `optimizer` section "
                "of the DeepSpeed config would ignore it. Remove that section: the Trainer then creates the optimizer."
            )

    def add_param_groups(self, model: nn.Module, optimizer: torch.optim.Optimizer, is_users_optimizer: bool) -> None:
        """Give the parts of the sidecar separate parameter groups where they have options, once for each optimizer.

        Args:
            model: the student.
            optimizer: the optimizer of the training, which may be that of an earlier training.
            is_users_optimizer: whether the user created it; it may then lack parameters of the sidecar.
        """
        optimizer_inside = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        sidecar, grouped = trained_sidecar(model), self._grouped.get(optimizer_inside)
        if sidecar is None or (grouped is not None and grouped() is sidecar):
            return
        self._grouped[optimizer_inside] = ref(sidecar)
        for kinds, options in self._group_options.items():
            parts = [sidecar.parts[kind] for kind in kinds if kind in sidecar.parts]
            trained = [p for part in parts for p in part.parameters() if p.requires_grad]
            overrides = {key: value for key, value in options.items() if value is not None}
            if overrides or (is_users_optimizer and not _contains_all(optimizer, trained)):
                move_to_param_groups(optimizer, trained, overrides)

    def clip_norm(self, args: TrainingArguments) -> float | None:
        """Return the norm to which a trained teacher is clipped; None if it is clipped with the student."""
        return None if self._teacher is None else self._teacher.clip_norm(args)

    def clip_grad_norm(self, model: nn.Module, max_norm: float, teacher_max_norm: float) -> Tensor:
        """Clip the gradients of the student and of the teacher separately.

        Args:
            model: the student.
            max_norm: `max_grad_norm` of the training arguments.
            teacher_max_norm: the result of `clip_norm`.

        Returns:
            [] the norm of the student's gradient, or the teacher's if that is not finite: then both skip the step.
        """
        assert self._teacher_module is not None
        teacher_parameters = {id(p): p for p in self._teacher_module.parameters()}
        teacher_norm = torch.nn.utils.clip_grad_norm_(teacher_parameters.values(), teacher_max_norm)
        student_parameters = [p for p in model.parameters() if id(p) not in teacher_parameters]
        student_norm = torch.nn.utils.clip_grad_norm_(student_parameters, max_norm)
        return torch.where(teacher_norm.isfinite(), student_norm, teacher_norm)


def trained_sidecar(model: nn.Module) -> Sidecar | None:
    """Return the sidecar of a student; None if it has no parameters."""
    sidecar = sidecar_of(model)
    return sidecar if sidecar is not None and any(True for _ in sidecar.parameters()) else None


def save_trained_sidecar(model: nn.Module, folder: str, write: bool) -> None:
    """Save the sidecar in a checkpoint, if the student has one; call it on every rank.

    Args:
        model: the student.
        folder: the folder of the checkpoint.
        write: whether this rank writes the file.
    """
    if (sidecar := trained_sidecar(model)) is not None:
        save_sidecar(sidecar, folder, write)


def load_trained_sidecar(model: nn.Module, folder: str) -> None:
    """Load the sidecar from a checkpoint, if the student has one; call it on every rank."""
    if (sidecar := trained_sidecar(model)) is not None:
        load_sidecar(sidecar, folder)


def learned_layers(model: nn.Module) -> dict[str, float]:
    """Return for each student layer of a learned mapping the weighted mean of its teacher layers, for the logs."""
    sidecar = trained_sidecar(model)
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
