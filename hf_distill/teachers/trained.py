"""What teachers have in common of which something is trained, in the student's sidecar."""

from torch import nn

from .base import Teacher
from .state import load_state, save_state, state_file
from .weight_drift import Distance, is_shared


class TrainedTeacher(Teacher):
    """Classes which derive set `trained` in `prepare`. Its weights are the sidecar's; where they began is kept here."""

    bound = True

    def __init__(self):
        self._distance = Distance()

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        assert self.trained is not None, "prepare() has not been called"
        return self.trained

    def begin(self, step: int) -> None:
        """Note where it begins."""
        if not self._distance.start:
            self._distance.begin(dict(self.module.named_parameters()))

    def metrics(self) -> dict[str, float]:
        """`teacher_distance`: how far it has moved, as a share of the norm of where it began."""
        return {"teacher_distance": self._distance.to(dict(self.module.named_parameters()), is_shared(self.module))}

    def save(self, folder: str, rank: int, write: bool) -> None:
        """Write where it began."""
        shared = is_shared(self.module)
        if write or shared:
            save_state(state_file(folder, rank, shared), start=self._distance.start)

    def load(self, folder: str, rank: int) -> None:
        """Read what `save` wrote.

        Raises:
            DistillError: the checkpoint has none.
        """
        file = state_file(folder, rank, is_shared(self.module))
        parameters = dict(self.module.named_parameters())
        state = load_state(file, next(iter(parameters.values())).device, start=parameters)
        self._distance.start = state["start"]
