"""What teachers have in common of which something is trained, in the student's sidecar."""

from torch import nn

from .base import Teacher
from .state import load_state, save_state, state_file
from .weight_drift import WeightDrift, is_sharded


class TrainableTeacher(Teacher):
    """Classes which derive set `trained` in `prepare`. Its weights are the sidecar's; where they began is kept here."""

    tied_to_student = True

    def __init__(self):
        self._drift = WeightDrift()

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        assert self.trainable_module is not None, "prepare() has not been called"
        return self.trainable_module

    def on_train_begin(self, step: int) -> None:
        """Note where it begins."""
        if not self._drift.start:
            self._drift.begin(dict(self.module.named_parameters()))

    def metrics(self) -> dict[str, float]:
        """`teacher_weight_drift`: how far it has moved, as a share of the norm of where it began."""
        return {"teacher_weight_drift": self._drift.to(dict(self.module.named_parameters()), is_sharded(self.module))}

    def save(self, folder: str, rank: int, write: bool) -> None:
        """Write where it began."""
        shared = is_sharded(self.module)
        if write or shared:
            save_state(state_file(folder, rank, shared), start=self._drift.start)

    def load(self, folder: str, rank: int) -> None:
        """Read what `save` wrote.

        Raises:
            DistillError: the checkpoint has none.
        """
        file = state_file(folder, rank, is_sharded(self.module))
        parameters = dict(self.module.named_parameters())
        state = load_state(file, next(iter(parameters.values())).device, start=parameters)
        self._drift.start = state["start"]
