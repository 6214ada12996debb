"""A Trainer that takes no step whose loss or gradient is not finite, says which one it was, and stops after some."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer
from transformers.utils import logging

from ..core.io import write_json
from ..errors import RunError
from ..models.model_types import unwrap_parallel
from ..teachers.state import is_sharded
from .checkpoints import latest_complete
from .nonfinite_report import (
    LossSpikeDetector,
    MicroBatchRecord,
    NonFiniteReport,
    locate_nonfinite_tokens,
    merge_reports,
    nonfinite_weight,
)

logger = logging.get_logger(__name__)
_Base: Any = Trainer if TYPE_CHECKING else object
FILE = "nonfinite_steps.json"


class NonFiniteMixin(_Base):
    """For any Trainer; where all is finite it changes nothing.

    A step that is skipped counts as one: the order of the data, the schedule and the log go on as they would. Under an
    fp16 scaler a gradient that overflows is the scaler's own affair: it skips, and tries a smaller scale.
    """

    max_consecutive_nonfinite_steps: int
    _total_loss_scalar: float  # of the Trainer: losses of the steps that were logged,
    _tr_loss: Tensor  # and of those since then

    def __init__(self, *args: Any, **kwargs: Any):
        self._micro_batches: list[MicroBatchRecord] = []
        self._losses: list[Tensor] = []  # of this step's micro-batches
        self._taken: list[Tensor] = []  # of each step since the last log
        self._skipped = 0  # since the last log
        self._in_a_row: list[NonFiniteReport] = []
        self._is_taken = True  # whether the last step's loss and gradient were finite
        self._counts = {True: 0, False: 0}  # of the training: steps that were, and that were not
        self._leaps = LossSpikeDetector()
        super().__init__(*args, **kwargs)

    def commit_step(self, taken: bool) -> None:
        """A step is over: whether it was taken, or skipped. For whoever keeps numbers of it."""

    @property
    def updated_student(self) -> bool:
        """Whether the last step changed the student: it was finite, and no gradient scaler skipped it."""
        return self._is_taken and not self.accelerator.optimizer_step_was_skipped

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; called again with a smaller batch after one that did not fit into memory."""
        self._losses, self._micro_batches, self._taken, self._in_a_row = [], [], [], []
        self._skipped, self._leaps, self._is_taken = 0, LossSpikeDetector(), True
        self._counts = {True: 0, False: 0}
        return super()._inner_training_loop(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, whose `train_loss` would be 0 if no step was taken."""
        if self._counts[False]:
            factor = _mean_of_taken(self._counts[True], self._counts[False])
            self._total_loss_scalar, self._tr_loss = self._total_loss_scalar * factor, self._tr_loss * factor
        output = super()._finalize_training(*args, **kwargs)
        if self._has_trained:
            return output
        metrics = {name: value for name, value in output.metrics.items() if name != "train_loss"}
        return output._replace(training_loss=math.nan, metrics=metrics)

    @property
    def _has_trained(self) -> bool:
        """Whether this call of `train` took a step; one that resumes a finished training does not."""
        return self.state.global_step > self._initial_global_step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's."""
        if not self._losses and hasattr(self, "_tr_loss"):
            self._loss_before = self._tr_loss.clone()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once a step, before the optimizer's.

        Raises:
            RunError: `max_consecutive_nonfinite_steps` were skipped, or a step cannot be skipped.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if not self._losses:  # of a Trainer with a step of its own
            return norm
        losses, self._losses = torch.stack(self._losses), []
        seen, self._micro_batches = self._micro_batches, []
        whole = self._all_ranks(torch.stack([losses.isfinite().all(), _norm_is_finite(norm, losses.device)]))
        self._is_taken = all(whole)
        self._counts[self._is_taken] += 1
        self.commit_step(self._is_taken)
        if all(whole):
            self._in_a_row = []
            self._taken.append(losses.sum())
            return norm
        self._skipped += 1
        self._tr_loss = self._loss_before  # a Trainer counts a mean of earlier steps in the place of this one, or NaN
        scaler = self.accelerator.scaler
        if not (whole[0] and scaler is not None and scaler.get_scale() > 1):
            self._skip(model, seen, whole[0])
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; checkpoints, exports and pushes pass here.

        Raises:
            RunError: weights are not finite; nothing is written.
        """
        self._check_weights(f"Nothing is written to {output_dir or self.args.output_dir}")
        super().save_model(output_dir, _internal_call)

    def _check_weights(self, consequence: str) -> None:
        """Raise a RunError where weights of the student, or of what is trained with it, are not finite."""
        model = unwrap_parallel(self.model)
        name = nonfinite_weight(model)
        if (
            is_sharded(model) or self.is_fsdp_enabled
        ) and self.accelerator.num_processes > 1:  # shards differ, and all ranks save together
            name = next((each for each in gather_object([name]) if each is not None), None)
        if name is None:
            return
        step = self._in_a_row[0].step - 1 if self._in_a_row else self.state.global_step
        when = f"after step {step}" if step else "before the first step"
        whole = latest_complete(Path(self._get_output_dir(trial=None)))
        go_on = f"resume from {whole}, which is complete" if whole else "start again"
        raise RunError(
            f"The weights are not finite {when} (first: {name}). {consequence}. To go on, {go_on}, with a smaller "
            f"learning_rate (it is {self.args.learning_rate:.3g}) or max_grad_norm, or a longer warm-up."
        )

    def _all_ranks(self, flags: Tensor) -> list[bool]:
        """Whether they are true on all ranks: what one skips, all skip."""
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(flags.float(), "sum") >= self.accelerator.num_processes
        return flags.tolist()

    def _skip(self, model: Any, seen: list[MicroBatchRecord], loss: bool) -> None:
        found = self._found(model, seen, loss)
        self._in_a_row.append(found)
        self._check_weights("No further step can be taken")
        model.zero_grad()  # an optimizer leaves parameters without a gradient as they are
        moved = self.is_deepspeed_enabled or any(word in str(self.args.optim) for word in ("lomo", "layerwise"))
        if moved or len(self._in_a_row) >= self.max_consecutive_nonfinite_steps:
            self._stop(found, moved)
        row = f", {len(self._in_a_row)} steps in a row" if len(self._in_a_row) > 1 else ""
        logger.warning(f"Step {found.step} is skipped{row}: {found}.")

    def _found(self, model: Any, seen: list[MicroBatchRecord], loss: bool) -> NonFiniteReport:
        tokenizer: Any = getattr(self, "processing_class", None)

        def text(token: int) -> str:
            return tokenizer.decode([token]) if hasattr(tokenizer, "decode") else ""

        own = locate_nonfinite_tokens(seen, self.args.process_index, text)
        ranks = gather_object([own]) if self.accelerator.num_processes > 1 else [own]
        learnt = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        broken = [name for name, grad in learnt.items() if not grad.isfinite().all()]
        # Clipping by a norm that is NaN makes all of them NaN: then they tell nothing.
        return merge_reports(self.state.global_step + 1, loss, ranks, broken if len(broken) < len(learnt) else [])

    def _stop(self, found: NonFiniteReport, moved: bool) -> None:
        folder = Path(self._get_output_dir(trial=None))
        whole = latest_complete(folder)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            told = {"learning_rate": self._get_learning_rate(), "max_grad_norm": self.args.max_grad_norm}
            told |= {"last_checkpoint": whole and whole.name, "steps": [each.as_dict() for each in self._in_a_row]}
            write_json(folder / FILE, told)
        why = "its optimizer steps inside the backward, so that it could not be skipped" if moved else "none was taken"
        go_on = f"{whole} is whole: resume from it" if whole else "There is no checkpoint: start again"
        raise RunError(
            f"Training stops at step {found.step}: {len(self._in_a_row)} in a row with a loss or gradient that is not "
            f"finite ({why}). The last: {found}. All of them are in {folder / FILE}. "
            f"{go_on}, with {_suggest_fix(found)}."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; training logs tell `skipped_steps` and `loss_spikes` since the last one, where not 0."""
        if "train_loss" in logs and not self._has_trained:
            del logs["train_loss"]  # a Trainer reports 0
        if "loss" in logs:
            if self._skipped:
                logs["skipped_steps"] = self._skipped
                logs["loss"] *= _mean_of_taken(len(self._taken), self._skipped)
            if spikes := self._spikes():
                logs["loss_spikes"] = spikes
            self._skipped = 0
        super().log(logs, start_time)

    def _spikes(self) -> int:
        """How many of the steps since the last log leapt; each is told."""
        if not self._taken:
            return 0
        losses, self._taken, count = self.accelerator.reduce(torch.stack(self._taken), "mean").tolist(), [], 0
        for back, loss in zip(range(len(losses) - 1, -1, -1), losses, strict=True):
            if (before := self._leaps.update(loss)) is not None:
                count += 1
                logger.warning(
                    f"The loss leapt to {loss:.4g}, from {before:.4g} (median of the last steps), about step "
                    f"{self.state.global_step - back}."
                )
        return count


def _mean_of_taken(taken: int, skipped: int) -> float:
    """What a sum over all steps, divided by their number, is multiplied by for the mean of those that were taken."""
    return (taken + skipped) / taken if taken else math.nan


def _norm_is_finite(norm: Any, device: torch.device) -> Tensor:
    """Whether a gradient's norm is finite; DeepSpeed may not know one."""
    if norm is None:
        return torch.tensor(True, device=device)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
    return norm.isfinite().to(device).reshape(())


def _suggest_fix(found: NonFiniteReport) -> str:
    if not found.count:
        return "a smaller learning_rate or max_grad_norm, a longer warm-up, or bf16 in the place of fp16"
    if "hard" in found.finite:
        return (
            "another look at the teacher: the student's own loss is finite there, so what the teacher says is not "
            "(a teacher in fp16 overflows where bf16 does not)"
        )
    return "a smaller learning_rate, bf16 in the place of fp16, or without the examples that are named, if they recur"
