"""A teacher that is trained together with the student, by the same optimizer and in the same backward."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..core.logits import DenseLogits, LazyLogits
from ..core.signals import FeatureKey, Signals
from ..core.targets import FeatureTokens, Targets
from ..errors import DistillError, raise_if_any
from ..losses.fused import ChunkedLoss
from ..losses.objective import Term
from ..models.blocks import LayerStack, get_layer_stack
from ..models.declared_types import type_as_teacher
from ..models.feature_capture import capture_features
from ..models.finite_weights import check_finite
from ..models.forward import extract_signals, forward_with_loss, measure_before_student_loss
from ..models.model_call import accepted_inputs
from ..models.model_types import model_type_of, unwrap_model
from ..models.module_state import eval_mode
from ..models.sidecar import gathered_state_dict
from .base import JointStep
from .compatibility import check_model_types, check_teacher_student
from .input_limits import InputLimits, check_data
from .pretrained import as_path, check_checkpoint, hub_options, load_pretrained, read_config
from .trainable import TrainableTeacher

logger = logging.get_logger(__name__)


class PeerTeacher(TrainableTeacher):
    """A second model that is trained while it teaches: online distillation, or mutual learning (arXiv 1706.00384).

    online: the peer is trained by cross entropy with the labels, and the student's losses do not change it.
    mutual: the peer is trained like the student, by alpha * T^2 * divergence + (1 - alpha) * cross entropy, with the
        student as its teacher. Each model uses the other's logits without gradients.

    Args:
        model: a model, or the path or id of one, which is loaded in float32.
        mutual: whether the peer also learns from the student.
        learning_rate: learning rate of the peer; None: that of the run.
        weight_decay: weight decay of the peer; None: that of the run.
        max_grad_norm: norm to which the peer's gradient is clipped, separately from the student's; None: that of the
            run.
        freeze_at_progress: progress of the training, in (0, 1], from which on the peer is frozen; None: never.
        processing_class: the peer's tokenizer, which is compared with the student's; None: the tokenizer in the model's
            folder.
        init_kwargs: passed to `from_pretrained`.

    Raises:
        DistillError: a value is out of range; the message lists all such values.
    """

    reads_teacher_inputs = True
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
        **init_kwargs: Any,
    ):
        problems: list[str] = []
        for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
            if value is not None and not value >= 0:
                problems.append(f"{name} of the peer is {value}; it must be 0 or more")
        if max_grad_norm is not None and not max_grad_norm > 0:
            problems.append(f"max_grad_norm of the peer is {max_grad_norm}; it must be more than 0")
        if freeze_at_progress is not None and not 0 < freeze_at_progress <= 1:
            problems.append(
                f"freeze_at_progress is {freeze_at_progress}; it must be a progress of the training, in (0, 1]"
            )
        if not isinstance(model, str) and init_kwargs:
            problems.append(
                f"{sorted(init_kwargs)} say how to load a model, but the peer is a model that is already loaded: leave "
                "them out, or give the model's id or path"
            )
        raise_if_any(problems)
        model = as_path(model)
        super().__init__()
        self._init_kwargs, self._mutual = init_kwargs, mutual
        self._model_or_path = model
        self._path = model if isinstance(model, str) else None
        self.kind = "mutual" if mutual else "online"
        self.optimizer_overrides = {"lr": learning_rate, "weight_decay": weight_decay}
        self._max_grad_norm, self.freeze_at_progress = max_grad_norm, freeze_at_progress
        self.processing_class = processing_class

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Check that the model fits the student, and load it if it is a path or id.

        Raises:
            DistillError: the model does not fit the student, or has no parameters that can be trained.
        """
        model_type, options = model_type_of(student), self._init_kwargs
        model_or_config: Any = self._model_or_path
        if isinstance(self._model_or_path, str):
            model_or_config = read_config(self._model_or_path, options)
            check_checkpoint(self._model_or_path, model_type, model_or_config)
        self.other_tokens = check_teacher_student(
            model_or_config,
            student,
            self.processing_class,
            processing_class,
            str(self._path or ""),
            **hub_options(options),
        )
        if self.model is None and self._path is None:
            self.model = self._model_or_path
        elif self.model is None:
            kwargs = {"dtype": torch.float32, **options}
            self.model = load_pretrained(str(self._path), model_type, student, model_or_config, kwargs)
            check_model_types(type_as_teacher(self.model, student), model_type)
        self._limits = InputLimits.of(self.model, student, self.other_tokens is not None)
        if not any(p.requires_grad and p.is_floating_point() for p in self.model.parameters()):
            raise DistillError(
                f"The peer, a {type(unwrap_model(self.model)).__name__}, has no floating-point parameter that requires "
                "a gradient, so it cannot be trained: load it in float32 with trainable parameters, or use a "
                "FrozenTeacher."
            )
        self.trainable_module = self.model

    def check_data(self, rows: Any, name: str) -> None:
        """Check that the peer has an embedding for every id of a data set."""
        check_data(self._limits, rows, name)

    def check_arguments(self, args: TrainingArguments) -> list[str]:
        """Return what the strategy or the arguments of the run do not support."""
        problems = []
        if args.fsdp or any(hasattr(p, "to_local") for p in self.model.parameters()):
            problems.append(
                "a peer is trained as a part of the student, and FSDP does not shard it: use DDP or DeepSpeed"
            )
        if args.deepspeed and self._max_grad_norm is not None:
            problems.append(
                "DeepSpeed clips the gradients of student and peer together: leave the peer's max_grad_norm out"
            )
        if args.deepspeed and self.freeze_at_progress is not None:
            problems.append(
                "DeepSpeed updates parameters without a gradient too: leave freeze_at_progress out, or use DDP"
            )
        if self._max_grad_norm is not None and not args.max_grad_norm:
            problems.append(
                "max_grad_norm of the run is 0, which disables clipping: set it, or leave the peer's max_grad_norm out"
            )
        return problems

    def clip_norm(self, args: TrainingArguments) -> float:
        """Return the peer's `max_grad_norm`, or that of the run: the peer is clipped separately."""
        return self._max_grad_norm or args.max_grad_norm

    def adjust_arguments(self, args: TrainingArguments) -> None:
        """Let DDP look for unused parameters if the peer is frozen at some point and the run does not say."""
        if self.freeze_at_progress is not None and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = args.world_size > 1 or None

    def derive_terms(self, soft: Term, hard: Term) -> list[Term]:
        """Return `peer_hard`, and `peer_soft` with mutual learning."""
        if not self._mutual:
            return [replace(hard, name="peer_hard", weight=1.0)]
        if hard.weight == 0:
            logger.warning(
                "Mutual learning with alpha=1: the two models learn only from each other, and no loss uses the "
                "labels of the data. Set alpha below 1."
            )
        return [replace(soft, name="peer_soft"), replace(hard, name="peer_hard")]

    def layer_stack(self, which: str | None = None) -> LayerStack:
        """The peer's layers."""
        return get_layer_stack(self.model, which)

    def numbers_to_read(self, inputs: dict, shift: bool) -> dict[str, Tensor]:
        """Return the numbers that the check of ids and positions needs."""
        return self._limits.numbers_to_read(inputs)

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Run the peer once in eval mode, outside the student's forward."""
        with eval_mode(self.model):
            return extract_signals(
                self.model,
                self._limits.readable(accepted_inputs(self.model, inputs), targets.numbers),
                targets,
                feature_requests,
            )

    def joint_step(
        self,
        inputs: dict,
        targets: Targets,
        feature_requests: Mapping[FeatureKey, FeatureTokens],
        num_items: Tensor | int | None,
        terms: Sequence[Term],
    ) -> JointStep:
        """Return a step that runs the peer and computes its loss."""
        is_frozen = self.freeze_at_progress is not None and self.progress >= self.freeze_at_progress
        inputs = self._limits.readable(accepted_inputs(self.model, inputs), targets.numbers)
        if is_frozen:
            self.model.eval()
        measure_before_student_loss(self.model, inputs, targets)
        return _PeerStep(self.model, terms, is_frozen, inputs, targets, feature_requests, num_items)

    def save_pretrained(self, folder: str | Path, write: bool = True) -> None:
        """Save the peer so that `from_pretrained` can load it; the state dict of a module outside transformers.

        Args:
            folder: the folder to write.
            write: whether this rank writes; every rank must call the method.

        Raises:
            RunError: some weights are not finite; nothing is written.
        """
        state = gathered_state_dict(self.model)
        buffers = state.keys() - dict(self.model.named_parameters()).keys()
        advice = "Resume from a checkpoint with a smaller learning_rate of the peer."
        check_finite(state, folder, owner="the peer", advice=advice, buffers=buffers)
        if write:
            if hasattr(self.model, "save_pretrained"):
                self.model.save_pretrained(folder, state_dict=state)
            else:  # a module outside transformers is saved as the Trainer saves a student
                Path(folder).mkdir(parents=True, exist_ok=True)
                save_file(state, Path(folder) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)


class _PeerStep(JointStep):
    """One forward of the peer inside the student's forward."""

    def __init__(
        self,
        model: nn.Module,
        terms: Sequence[Term],
        is_frozen: bool,
        inputs: dict,
        targets: Targets,
        feature_requests: Mapping[FeatureKey, FeatureTokens],
        num_items: Tensor | int | None,
    ) -> None:
        self.model, self.terms, self.is_frozen = model, terms, is_frozen
        self.inputs, self.targets, self.feature_requests, self.num_items = inputs, targets, feature_requests, num_items

    def __call__(self, student_logits: LazyLogits | DenseLogits) -> Tensor:
        peer_logits: list[LazyLogits | DenseLogits] = []
        is_mutual = any(term.loss.compares for term in self.terms)

        def before_loss(logits: LazyLogits | DenseLogits) -> None:
            peer_logits.append(logits.detach())

        teacher_logits = student_logits.detach() if is_mutual else None
        chunked_loss = ChunkedLoss(teacher_logits, self.targets, self.terms, num_items=self.num_items)
        is_trained = torch.is_grad_enabled() and not self.is_frozen
        with torch.set_grad_enabled(is_trained), capture_features(self.model, self.feature_requests) as features:
            loss, _ = forward_with_loss(self.model, self.inputs, chunked_loss, before_loss=before_loss)
        self.teacher_signals = Signals(peer_logits[-1], {key: feature.detach() for key, feature in features.items()})
        names = {"aux": "peer_aux"}
        self.per_token = {names.get(name, name): values for name, values in chunked_loss.per_token.items()}
        return loss
