"""The base class of teachers that are trained with the student, as a part of its sidecar."""

from torch import nn

from .base import Teacher
from .state import WeightDrift, is_sharded, load_state, save_state, state_file


class TrainableTeacher(Teacher):
    """Logs and saves how far the trained weights have moved; derived classes set `trainable_module` in `prepare`.

    The sidecar holds the weights. This class holds a sample of their initial values.
    """

    tied_to_student = True

    def __init__(self):
        self._drift = WeightDrift()

    @property
    def module(self) -> nn.Module:
        """The module that is trained."""
        assert self.trainable_module is not None, "prepare() has not been called"
        return self.trainable_module

    def on_train_begin(self, step: int) -> None:
        """Sample the initial weights, unless `load` has read them."""
        if not self._drift.start:
            self._drift.begin(dict(self.module.named_parameters()))

    def metrics(self) -> dict[str, float]:
        """Return `teacher_weight_drift`: ||weights - initial weights|| / ||initial weights||, from a sample."""
        return {
            "teacher_weight_drift": self._drift.relative_to_start(
                dict(self.module.named_parameters()), is_sharded(self.module)
            )
        }

    def save(self, folder: str, rank: int, write: bool) -> None:
        """Write the sampled initial weights."""
        sharded = is_sharded(self.module)
        if write or sharded:
            save_state(state_file(folder, rank, sharded), start=self._drift.start)

    def load(self, folder: str, rank: int) -> None:
        """Read what `save` wrote.

        Raises:
            DistillError: the checkpoint has no state of such a teacher.
        """
        file = state_file(folder, rank, is_sharded(self.module))
        parameters = dict(self.module.named_parameters())
        state = load_state(file, next(iter(parameters.values())).device, start=parameters)
        self._drift.start = state["start"]
