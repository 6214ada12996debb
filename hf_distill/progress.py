"""A training's progress in a terminal."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback


class RichProgress(TrainerCallback):
    """A bar for training steps and one for evaluation batches, with the newest losses; lines for stages."""

    def __init__(self, console: Console):
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
            transient=True,
        )
        self._console = console
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> "RichProgress":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        """Say what begins."""
        self._console.print(f"[bold]·[/bold] {escape(text)}")

    def stored(self, progress: Any) -> None:
        """Show how far a cache is; see `cache.capture.Progress`."""
        if "writing" not in self._bars:
            self._start("writing", progress.of)
        pace = f"{progress.tokens_per_second:,.0f} tokens/s · {progress.bytes_per_token:.1f} bytes/token"
        self._progress.update(self._bars["writing"], completed=progress.tokens, losses=pace)
        if not self._console.is_terminal:
            left = f"{progress.seconds_left:,.0f} s left"
            self.stage(f"{progress.tokens:,} of {progress.of:,} tokens · {pace} · {left}")

    def _start(self, name: str, total: int | None) -> None:
        self._bars[name] = self._progress.add_task(name, total=total, losses="")

    def _remove(self, name: str) -> None:
        if name in self._bars:
            self._progress.remove_task(self._bars.pop(name))

    def on_train_begin(self, args, state, control, **kwargs):
        """Show the bar of training steps."""
        self._start("training", state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        """Advance it."""
        self._progress.update(self._bars["training"], completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the newest losses beside it."""
        if logs and "loss" in logs and "training" in self._bars:
            terms = (f"{k.removesuffix('_loss')} {v:.3f}" for k, v in logs.items() if k.endswith("_loss"))
            self._progress.update(self._bars["training"], losses=" · ".join(terms))

    def on_train_end(self, args, state, control, **kwargs):
        """Take the bar away."""
        self._remove("training")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """Show or advance the bar of evaluation batches."""
        if "evaluating" not in self._bars:
            self._start("evaluating", len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None)
        self._progress.advance(self._bars["evaluating"])

    def on_evaluate(self, args, state, control, **kwargs):
        """Take the bar away."""
        self._remove("evaluating")
