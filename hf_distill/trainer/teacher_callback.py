"""`TeacherCallback`: calls the teacher at the start of training and after each optimizer step."""

from collections.abc import Callable

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..teachers import Teacher
from .teacher_failure import TeacherFailureGuard


class TeacherCallback(TrainerCallback):
    """Sets the teacher's `progress` and calls its hooks; also requests a last log where training ends.

    Args:
        teacher: the teacher of the trainer.
        is_student_updated: returns whether the last step changed the student.
        failure_guard: keeps the state at the end of each step of a teacher that can fail.
    """

    def __init__(self, teacher: Teacher, is_student_updated: Callable[[], bool], failure_guard: TeacherFailureGuard):
        self.teacher, self.is_student_updated, self.failure_guard = teacher, is_student_updated, failure_guard

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Call `Teacher.on_train_begin`, with the step that a resumed training continues from."""
        self.teacher.progress = state.global_step / max(state.max_steps, 1)
        self.teacher.on_train_begin(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Call `Teacher.on_step_end`, in which an EMA or snapshot teacher updates its weights."""
        self.teacher.progress = state.global_step / max(state.max_steps, 1)
        self.teacher.on_step_end(state.global_step, self.is_student_updated())
        self._log_at_the_end(args, state, control)
        if self.teacher.can_fail:
            self.failure_guard.remember()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Request the last log here too, where an evaluation or another callback stopped training."""
        self._log_at_the_end(args, state, control)

    def _log_at_the_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        is_last_step = control.should_training_stop or state.global_step >= state.max_steps
        if is_last_step and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True
