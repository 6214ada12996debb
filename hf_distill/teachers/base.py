"""The interface of a teacher, and the only base class that a user plugs into."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ..core.logits import DenseLogits, LazyLogits
from ..core.signals import FeatureKey, Signals, Targets
from ..errors import DistillError
from ..losses.objective import Term
from ..models.blocks import LayerStack
from ..models.model_call import input_names


class Teacher(ABC):
    """Something that says, for the asked tokens of a batch, what it would predict.

    kind:                 the name that recipes use; "" for a custom class
    tied_to_student:      whether it works with the student alone that it was prepared for
    model:                the teacher model after `prepare`; None if there is none
    trainable_module:     what is trained of it, as a part of the student's sidecar; None: nothing
    optimizer_overrides:  "lr" and "weight_decay" of `trainable_module`; None: as for the student
    max_grad_norm:        norm to which the gradient of `trainable_module` is clipped; None: clipped with the student's
    provides_soft_labels: whether it gives soft labels for the student, whose weight is alpha
    terms:                the losses of `trainable_module`; their names differ from those of the student's terms
    progress:             of the training, in [0, 1]; the trainer sets it
    """

    kind: str = ""
    tied_to_student: bool = False
    model: Any = None
    trainable_module: nn.Module | None = None
    optimizer_overrides: Mapping[str, float | None] = MappingProxyType({})
    max_grad_norm: float | None = None
    provides_soft_labels: bool = True
    terms: Sequence[Term] = ()
    progress: float = 0.0

    @abstractmethod
    def __call__(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, Targets]) -> Signals:
        """Answer a batch, without gradient.

        Args:
            inputs: the collator's batch, [B, S] tensors on the student's device.
            targets: the asked tokens.
            feature_requests: features to tell, with their tokens; empty where `stack` raises.

        Returns:
            signals whose logits are [T, V_t], with a feature for each tap.
        """

    def layer_stack(self, which: str | None = None) -> LayerStack:
        """The blocks whose features it can tell; see `blocks.stack_of`.

        Raises:
            DistillError: it tells logits alone.
        """
        raise DistillError(
            f"A {type(self).__name__} tells logits and no features: leave the losses on hidden states and attention "
            "out, or use a FrozenTeacher."
        )

    def input_names(self) -> frozenset[str]:
        """Names of the inputs that its model's forward accepts; the trainer keeps columns of these names."""
        return frozenset() if self.model is None else input_names(self.model)

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:  # noqa: B027
        """Be ready for calls; called once, before the first of them.

        Args:
            student: the student, unwrapped.
            device: where the student runs.
            processing_class: the student's tokenizer, if the trainer has one.

        Raises:
            DistillError: this teacher cannot teach this student.
        """

    def check_data(self, rows: Any, name: str) -> None:  # noqa: B027
        """Refuse a data set that it cannot read, before training.

        Args:
            rows: the data set.
            name: `train_dataset` or `eval_dataset`.
        """

    def check_arguments(self, args: TrainingArguments) -> list[str]:
        """Why it cannot teach under these arguments; called after `prepare`."""
        return []

    def get_teacher(self, name: str | None) -> "Teacher":
        """The teacher that a loss follows; `name` is None where it names none.

        Raises:
            DistillError: there is no such teacher.
        """
        if name is not None:
            raise DistillError(
                f"A loss names the teacher {name!r}, but there is one teacher, without a name: leave `teacher` out of "
                "`losses`, or pass several teachers by name."
            )
        return self

    def adapt_objective(self, terms: Sequence[Term]) -> list[Term]:
        """Take the student's objective; a teacher that trains makes `terms` of it.

        Returns:
            the objective with this teacher: a term follows what it can tell, or is left out.

        Raises:
            DistillError: an objective that makes no sense with this teacher.
        """
        for term in terms:
            self.get_teacher(term.teacher)
        return [term for term in terms if self.provides_soft_labels or not term.loss.needs]

    def incompatible_terms(self, terms: Sequence[Term]) -> list[str]:
        """Why some losses of the objective cannot be taken with this teacher; called after `learn`."""
        return []

    def joint_step(
        self,
        inputs: dict,
        targets: Targets,
        feature_requests: Mapping[FeatureKey, Targets],
        num_items: Tensor | int | None,
    ) -> "JointStep | None":
        """What of it runs inside the student's forward, in the place of a call before it; None: nothing.

        Args:
            inputs: as of a call.
            targets: as of a call.
            feature_requests: as of a call.
            num_items: what sums over asked tokens are divided by; None: those of this batch.
        """
        return None

    def transform_student_batch(self, inputs: dict, targets: Targets, training: bool) -> tuple[dict, Targets]:
        """What the student sees of a batch, and the same asked tokens where they stand in it; the batch itself."""
        return inputs, targets

    def on_train_begin(self, step: int) -> None:  # noqa: B027
        """Training begins, or goes on after `load` and so many steps: the student is as its strategy holds it."""

    def on_step_end(self, step: int, updated: bool) -> None:  # noqa: B027
        """Move, if it does: called after each step of the optimizer, never between micro-batches.

        Args:
            step: counted from 1, skipped steps included.
            updated: whether the step changed the student; False where it was skipped.
        """

    def metrics(self) -> dict[str, float]:
        """What training logs say of it."""
        return {}

    def save(self, folder: str, rank: int, write: bool) -> None:  # noqa: B027
        """Write into a checkpoint what a resumed run needs of it; called on every rank.

        Args:
            folder: of the checkpoint.
            rank: of this process.
            write: whether this rank writes what all ranks have.
        """

    def load(self, folder: str, rank: int) -> None:  # noqa: B027
        """Read what `save` wrote; called before the first step of a resumed run."""


class JointStep(ABC):
    """What a teacher does inside the student's forward, once the student's logits are known.

    told:      what it says of the asked tokens, for the student; known after the call
    per_token: name -> [T], of its own terms; known after the call
    """

    teacher_signals: Signals
    per_token: dict[str, Tensor]

    def context(self, student: nn.Module) -> AbstractContextManager:
        """What lasts while the student's forward does."""
        return nullcontext()

    @abstractmethod
    def __call__(self, said: LazyLogits | DenseLogits) -> Tensor:
        """Its own loss, [], given the source of the student's logits, with the graph."""
