"""The base class of teachers that are trained with the student, as a part of its sidecar."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn
from transformers import TrainingArguments

from ..core.signals import FeatureKey
from ..core.targets import FeatureTokens, Targets
from ..losses.objective import Term
from ..models.sharding import is_sharded
from .base import JointStep, Teacher
from .state import WeightDrift, load_state, save_state, state_file


class TrainableTeacher(Teacher):
    """A teacher whose `trainable_module` is trained by the student's optimizer, in the student's forward and backward.

    The sidecar holds the weights. This class logs how far they have moved, and holds a sample of their initial values.

    trainable_module:    the module that is trained; `prepare` sets it
    optimizer_overrides: "lr" and "weight_decay" of `trainable_module`; None: those of the student
    """

    tied_to_student = True
    reads_teacher_inputs = reads_teacher_labels = False
    trainable_module: nn.Module
    optimizer_overrides: Mapping[str, float | None] = MappingProxyType({})

    def __init__(self) -> None:
        self._drift = WeightDrift()

    @abstractmethod
    def derive_terms(self, soft: Term, hard: Term) -> list[Term]:
        """Return the losses of `trainable_module`, under names that no term of the student has.

        Args:
            soft: the student's divergence from this teacher.
            hard: the student's cross entropy with the labels.
        """

    @abstractmethod
    def joint_step(
        self,
        inputs: dict,
        targets: Targets,
        feature_requests: Mapping[FeatureKey, FeatureTokens],
        num_items: Tensor | int | None,
        terms: Sequence[Term],
    ) -> JointStep:
        """Return the step that runs in the student's forward, in place of `forward`.

        Args:
            inputs: as in `forward`.
            targets: as in `forward`.
            feature_requests: as in `forward`.
            num_items: divisor of sums over target tokens; None: the number of target tokens of this batch.
            terms: those of `derive_terms`.
        """

    def check_arguments(self, args: TrainingArguments) -> list[str]:
        """Return the reasons why the teacher cannot be trained with these arguments; called after `prepare`."""
        return []

    def adjust_arguments(self, args: TrainingArguments) -> None:
        """Set arguments of the run that the training of this teacher needs; called after `check_arguments`."""

    def clip_norm(self, args: TrainingArguments) -> float | None:
        """Return the norm to which the gradient of `trainable_module` is clipped; None clips it with the student's."""
        return None

    def on_train_begin(self, step: int) -> None:
        """Sample the initial weights, unless `load` has read them."""
        if not self._drift.start:
            self._drift.begin(dict(self.trainable_module.named_parameters()))

    def metrics(self) -> dict[str, float]:
        """Return `teacher_weight_drift`: ||weights - initial weights|| / ||initial weights||, from a sample."""
        parameters = dict(self.trainable_module.named_parameters())
        return {"teacher_weight_drift": self._drift.relative_to_start(parameters, is_sharded(self.trainable_module))}

    def save(self, folder: str, rank: int, write: bool) -> None:
        """Write the sampled initial weights."""
        sharded = is_sharded(self.trainable_module)
        if write or sharded:
            save_state(state_file(folder, rank, sharded), start=self._drift.start)

    def load(self, folder: str, rank: int) -> None:
        """Read what `save` wrote.

        Raises:
            DistillError: the checkpoint has no state of such a teacher.
        """
        file = state_file(folder, rank, is_sharded(self.trainable_module))
        parameters = dict(self.trainable_module.named_parameters())
        state = load_state(file, next(iter(parameters.values())).device, start=parameters)
        self._drift.start = state["start"]
