"""Progress of a run: progress bars in a terminal, and a line every 30 seconds elsewhere."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from ..cache.writer import CacheProgress
    from ..generation.progress import GenerationProgress

_LINE_SECONDS = 30.0


class RichProgress(TrainerCallback):
    """Shows a progress bar for training steps and one for evaluation batches, the newest losses, and stages as lines.

    If the output is not a terminal (for example a log file), a line every 30 seconds replaces the bars: it has the
    name of the stage, the step, the newest losses and the remaining time.

    Args:
        console: the console to print to.
        clock: returns seconds since any fixed time.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._console, self._clock = console, clock
        self._bars: dict[str, TaskID] = {}
        self._starts: dict[str, tuple[float, float]] = {}  # (seconds, steps done before)
        self._last_line = clock()

    def __enter__(self) -> "RichProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def log_stage(self, text: str) -> None:
        """Print the stage that begins."""
        self._console.print(Text.assemble(("·", "bold"), " ", text))

    def update_cache(self, progress: "CacheProgress") -> None:
        """Show the progress of writing a teacher cache."""
        if "writing" not in self._bars:
            self._start("writing", progress.total_tokens)
        pace = f"{progress.tokens_per_second:,.0f} tokens/s"
        if progress.bytes_per_token:
            pace += f" · {progress.bytes_per_token:.1f} bytes/token"
        self._update("writing", progress.tokens, pace, "tokens", progress.seconds_left)

    def update_generation(self, progress: "GenerationProgress") -> None:
        """Show the progress of a generation."""
        if "generating" not in self._bars:
            self._start("generating", progress.total)
        pace = f"{progress.tokens_per_second:,.0f} tokens/s"
        self._update("generating", progress.completions, pace, "completions", progress.seconds_left)

    def _start(self, name: str, total: int | None, done: int = 0) -> None:
        self._bars[name] = self._progress.add_task(name, total=total, completed=done, losses="")
        self._starts[name] = self._clock(), done

    def _update(
        self, name: str, done: int, losses: str | None = None, unit: str = "", seconds_left: float | None = None
    ) -> None:
        """Advance a bar; without a terminal, print a line if the last one is 30 seconds old."""
        task = next(task for task in self._progress.tasks if task.id == self._bars[name])
        self._progress.update(task.id, completed=done, losses=task.fields["losses"] if losses is None else losses)
        now, is_complete = self._clock(), name in ("writing", "generating") and done == task.total
        if self._console.is_terminal or (now - self._last_line < _LINE_SECONDS and not is_complete):
            return
        self._last_line = now
        start, done_before = self._starts[name]
        if seconds_left is None and task.total and done > done_before:
            seconds_left = (now - start) / (done - done_before) * (task.total - done)
        total = f" of {task.total:,.0f}" if task.total else ""
        left = "" if seconds_left is None else f"{timedelta(seconds=round(seconds_left))} left"
        parts = [f"{name}: {f'{unit} ' if unit else ''}{done:,}{total}", task.fields["losses"], left]
        self.log_stage(" · ".join(part for part in parts if part))

    def _remove(self, name: str) -> None:
        if name in self._bars:
            self._progress.remove_task(self._bars.pop(name))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Show the bar of training steps."""
        self._start("training", state.max_steps, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Advance the bar of training steps."""
        self._update("training", state.global_step, unit="step")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Show the newest losses next to the bar."""
        if logs and "loss" in logs and "training" in self._bars:
            terms = [f"{k.removesuffix('_loss')} {v:.3f}" for k, v in logs.items() if k.endswith("_loss")]
            self._progress.update(
                self._bars["training"], losses=" · ".join([f"loss {float(logs['loss']):.3f}", *terms])
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remove the bar of training steps."""
        self._remove("training")

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: object = None,
        **kwargs: object,
    ) -> None:
        """Show or advance the bar of evaluation batches."""
        if "evaluating" not in self._bars:
            self._start("evaluating", len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None)
            self._batches = 0
        self._batches += 1
        self._update("evaluating", self._batches, unit="batch")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remove the bar of evaluation batches."""
        self._remove("evaluating")
