"""A teacher that is trained beside the student, by the same optimizer, in one backward."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.utils import logging

from ..core.logits import DenseLogits, LazyLogits
from ..core.signals import FeatureKey, Signals
from ..core.targets import Targets
from ..errors import DistillError, raise_if_any
from ..losses.fused import ChunkedLoss
from ..losses.objective import Term
from ..models.blocks import LayerStack, get_layer_stack
from ..models.feature_capture import capture_features
from ..models.features import FeatureLoss
from ..models.finite_weights import check_finite
from ..models.forward import StepLosses, extract_signals, forward_with_loss, measure_before_student_loss
from ..models.model_call import accepted_inputs
from ..models.model_types import model_type_of, unwrap_model
from ..models.module_state import eval_mode
from ..models.sidecar import gathered_state_dict
from .base import JointStep
from .compatibility import check_kinds, check_teacher_student
from .input_limits import InputLimits, check_data
from .pretrained import as_path, check_checkpoint, hub_options, load_pretrained, read_config
from .trainable import TrainableTeacher

logger = logging.get_logger(__name__)


class PeerTeacher(TrainableTeacher):
    """A second model that learns while it teaches: online distillation, or mutual learning (1706.00384).

    online: the peer learns by cross entropy with the labels, and no loss of the student reaches it.
    mutual: the peer learns as the student does, alpha * T^2 * divergence + (1 - alpha) * cross entropy, and the student
        is its teacher: each model learns from what the other one says, without gradient through that.

    Args:
        model: a model to be trained, or the path or id of one, loaded in the student's auto class in float32.
        mutual: whether the peer learns from the student, too.
        learning_rate: of the peer; None: the run's.
        weight_decay: of the peer; None: the run's.
        max_grad_norm: the peer's gradient is clipped apart from the student's, to this; None: the run's.
        freeze_at_progress: progress of the training, in (0, 1], from which the peer is frozen; None: never.
        processing_class: its tokenizer, compared with the student's; None: the one beside the model's files.
        init_kwargs: passed to `from_pretrained`.

    Raises:
        DistillError: a value out of range.
    """

    model: Any = None

    def __init__(
        self,
        model: nn.Module | str,
        *,
        mutual: bool = False,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        max_grad_norm: float | None = None,
        freeze_at_progress: float | None = None,
        processing_class: Any = None,
        **init_kwargs,
    ):
        problems: list[str] = []
        for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
            if value is not None and not value >= 0:
                problems.append(f"{name} of the peer is {value}; it must be 0 or more")
        if max_grad_norm is not None and not max_grad_norm > 0:
            problems.append(f"max_grad_norm of the peer is {max_grad_norm}; it must be more than 0")
        if freeze_at_progress is not None and not 0 < freeze_at_progress <= 1:
            problems.append(f"freeze_at_progress is {freeze_at_progress}; it is a progress of the training, in (0, 1]")
        if not isinstance(model, str) and init_kwargs:
            problems.append(f"{sorted(init_kwargs)} were given beside a model that is loaded already: leave them out")
        raise_if_any(problems)
        model = as_path(model)
        super().__init__()
        self._given, self._init_kwargs, self._mutual = model, init_kwargs, mutual
        self._path = model if isinstance(model, str) else None
        self.kind = "mutual" if mutual else "online"
        self.optimizer_overrides = {"lr": learning_rate, "weight_decay": weight_decay}
        self._max_grad_norm, self.freeze_at_progress = max_grad_norm, freeze_at_progress
        self.processing_class = processing_class

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Check that the model fits the student, and load it if need be.

        Raises:
            DistillError: it does not fit, or nothing of it can be trained.
        """
        task, options = model_type_of(student), self._init_kwargs
        given: Any = self._given
        if isinstance(given, str):
            given = read_config(given, options)
            check_checkpoint(self._given, task, given)
        check_teacher_student(
            given, student, self.processing_class, processing_class, str(self._path or ""), **hub_options(options)
        )
        if self.model is None and self._path is None:
            self.model = self._given
        elif self.model is None:
            kwargs = {"dtype": torch.float32, **options}
            self.model = load_pretrained(str(self._path), task, student, given, kwargs)
            check_kinds(model_type_of(self.model), task)
        self._limits = InputLimits.of(self.model, student)
        if not any(p.requires_grad and p.is_floating_point() for p in self.model.parameters()):
            raise DistillError(
                f"Nothing of the peer, a {type(unwrap_model(self.model)).__name__}, can be trained: load it in "
                "float32, with parameters that require gradients, or use a FrozenTeacher."
            )
        self.trainable_module = self.model

    def check_data(self, rows: Any, name: str) -> None:
        """Refuse rows with ids beyond the peer's embedding."""
        check_data(self._limits, rows, name)

    def check_arguments(self, args: TrainingArguments) -> list[str]:
        """What the strategy or the run's arguments would not do for the peer."""
        self.max_grad_norm, problems = self._max_grad_norm or args.max_grad_norm, []
        if args.fsdp or any(hasattr(p, "to_local") for p in self.model.parameters()):
            problems.append("a peer is trained inside the student and not sharded by FSDP: use DDP or DeepSpeed")
        if args.deepspeed and self._max_grad_norm is not None:
            problems.append("DeepSpeed clips all gradients together: leave the peer's max_grad_norm out")
        if args.deepspeed and self.freeze_at_progress is not None:
            problems.append("DeepSpeed goes on moving what has no gradient: leave freeze_at_progress out, or use DDP")
        if self._max_grad_norm is not None and not args.max_grad_norm:
            problems.append("max_grad_norm of the run is 0, which clips nothing: set it, or leave the peer's out")
        if self.freeze_at_progress is not None and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = args.world_size > 1 or None  # of a peer that is frozen by then
        return problems

    def adapt_objective(self, terms: Sequence[Term]) -> list[Term]:
        """Make the peer's terms of the student's: `peer_hard`, and `peer_soft` of a mutual one."""
        soft, hard = (next(term for term in terms if term.name == name) for name in ("soft", "hard"))
        self.terms = [replace(hard, name="peer_hard", weight=hard.weight if self._mutual else 1.0)]
        if self._mutual:
            self.terms = [replace(soft, name="peer_soft"), *self.terms]
            if hard.weight == 0:
                logger.warning(
                    "Mutual learning with alpha 1: each model learns from the other alone, and nothing anchors the "
                    "pair to the data. Set alpha below 1."
                )
        return super().adapt_objective(terms)

    def layer_stack(self, which: str | None = None) -> LayerStack:
        """The peer's blocks."""
        return get_layer_stack(self.model, which)

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, Targets]) -> Signals:
        """One forward of the peer as it is, outside of the student's."""
        with eval_mode(self.model):
            return extract_signals(
                self.model, self._limits.readable(accepted_inputs(self.model, inputs)), targets, feature_requests
            )

    def joint_step(
        self,
        inputs: dict,
        targets: Targets,
        feature_requests: Mapping[FeatureKey, Targets],
        num_items: Tensor | int | None,
    ) -> JointStep:
        """The peer's forward and its own loss."""
        frozen = self.freeze_at_progress is not None and self.progress >= self.freeze_at_progress
        inputs = self._limits.readable(accepted_inputs(self.model, inputs))
        if frozen:
            self.model.eval()
        measure_before_student_loss(self.model, inputs, targets)
        return _PeerStep(self.model, self.terms, frozen, inputs, targets, feature_requests, num_items)

    def save_pretrained(self, folder: str | Path, write: bool = True) -> None:
        """Write the peer as a folder of its own, as `from_pretrained` loads it.

        Args:
            folder: where to.
            write: whether this rank writes; every rank has to call.

        Raises:
            RunError: its weights are not finite; nothing is written.
        """
        state = gathered_state_dict(self.model)
        buffers = state.keys() - dict(self.model.named_parameters()).keys()
        advice = "Go on from a checkpoint with a smaller learning_rate of the peer."
        check_finite(state, folder, owner="the peer", advice=advice, buffers=buffers)
        if write:
            self.model.save_pretrained(folder, state_dict=state)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)


class _PeerStep(JointStep):
    """One forward of the peer inside the student's."""

    def __init__(self, model, terms, frozen, inputs, targets, feature_requests, num_items):
        self.model, self.terms, self.frozen = model, terms, frozen
        self.inputs, self.targets, self.feature_requests, self.num_items = inputs, targets, feature_requests, num_items

    def __call__(self, said: LazyLogits | DenseLogits) -> Tensor:
        own: list[LazyLogits | DenseLogits] = []
        learns = any(term.loss.needs for term in self.terms)

        def jobs(its: LazyLogits | DenseLogits) -> StepLosses:
            own.append(its.detach())
            job = ChunkedLoss(said.detach() if learns else None, self.targets, self.terms, num_items=self.num_items)
            return StepLosses(job, FeatureLoss([], {}, {}, self.targets))

        learning = torch.is_grad_enabled() and not self.frozen
        with torch.set_grad_enabled(learning), capture_features(self.model, self.feature_requests) as found:
            loss, _, done = forward_with_loss(self.model, self.inputs, self.targets, {}, jobs)
        self.teacher_signals = Signals(own[-1], {tap: feature.detach() for tap, feature in found.items()})
        names = {"aux": "peer_aux"}
        self.per_token = {names.get(name, name): values for name, values in done.head.per_token.items()}
        return loss
