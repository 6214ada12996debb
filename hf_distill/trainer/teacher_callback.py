"""What a Trainer tells its teacher at each step."""

from collections.abc import Callable

from transformers import IntervalStrategy, TrainerCallback

from ..teachers import Teacher


class TeacherCallback(TrainerCallback):
    """Tells a teacher how far training is, and has what was measured since the last log logged where training ends."""

    def __init__(self, teacher: Teacher, updated: Callable[[], bool]):
        self.teacher, self.updated = teacher, updated

    def on_train_begin(self, args, state, control, **kwargs):
        """The teacher begins, or goes on."""
        self.teacher.progress = state.global_step / max(state.max_steps, 1)
        self.teacher.on_train_begin(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        """The teacher moves, if it does."""
        self.teacher.progress = state.global_step / max(state.max_steps, 1)
        self.teacher.on_step_end(state.global_step, self.updated())
        self._log_at_the_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Training ends here too where an evaluation or another callback stopped it."""
        self._log_at_the_end(args, state, control)

    def _log_at_the_end(self, args, state, control) -> None:
        ends = control.should_training_stop or state.global_step >= state.max_steps
        if ends and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True
