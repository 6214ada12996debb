"""`NonFiniteMixin`: a Trainer that skips, reports and limits steps whose loss or gradient is not finite."""

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
REPORT_FILE = "nonfinite_steps.json"


class NonFiniteMixin(_Base):
    """Skips optimizer steps whose loss or gradient is not finite; if all are finite, training does not change.

    A skipped step counts as a step: the order of the data, the learning rate schedule and the logs continue. With an
    fp16 gradient scaler, the scaler handles gradients that overflow: it skips the step and lowers its scale.
    """

    max_consecutive_nonfinite_steps: int
    _total_loss_scalar: float  # the Trainer's sum of the losses up to the last log
    _tr_loss: Tensor  # the Trainer's sum of the losses since the last log

    def __init__(self, *args: Any, **kwargs: Any):
        self._reset_nonfinite_state()
        super().__init__(*args, **kwargs)

    def _reset_nonfinite_state(self) -> None:
        self._micro_batches: list[MicroBatchRecord] = []  # micro-batches of the current step
        self._micro_batch_losses: list[Tensor] = []  # losses of the current step
        self._step_losses: list[Tensor] = []  # losses of the finite steps since the last log
        self._num_skipped = 0  # skipped steps since the last log
        self._consecutive_reports: list[NonFiniteReport] = []  # reports of the last steps, as far as they were skipped
        self._is_finite_step = True  # whether the loss and gradient of the last step were finite
        self._step_counts = {True: 0, False: 0}  # finite and skipped steps of the training
        self._spike_detector = LossSpikeDetector()

    def commit_step(self, applied: bool) -> None:
        """Called when a step ends; subclasses that record values of the step override it.

        Args:
            applied: whether loss and gradient were finite; False if the step is skipped.
        """

    @property
    def updated_student(self) -> bool:
        """Whether the last step changed the student: it was finite, and no gradient scaler skipped it."""
        return self._is_finite_step and not self.accelerator.optimizer_step_was_skipped

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Start with empty records; `auto_find_batch_size` calls this again after a batch did not fit into memory."""
        self._reset_nonfinite_state()
        return super()._inner_training_loop(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Make `train_loss` the mean over the steps that were not skipped, NaN if all were skipped."""
        if self._step_counts[False]:
            factor = _correction_for_skipped(self._step_counts[True], self._step_counts[False])
            self._total_loss_scalar, self._tr_loss = self._total_loss_scalar * factor, self._tr_loss * factor
        output = super()._finalize_training(*args, **kwargs)
        if self._has_trained:
            return output
        metrics = {name: value for name, value in output.metrics.items() if name != "train_loss"}
        return output._replace(training_loss=math.nan, metrics=metrics)

    @property
    def _has_trained(self) -> bool:
        """Whether this call of `train` ran a step; if it resumes a finished training, it runs none."""
        return self.state.global_step > self._initial_global_step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run the Trainer's step on a micro-batch, and record its loss."""
        if not self._micro_batch_losses and hasattr(self, "_tr_loss"):
            self._loss_before = self._tr_loss.clone()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_batch_losses.append(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Check the step before the optimizer applies it; the Trainer calls this once for each optimizer step.

        Raises:
            RunError: `max_consecutive_nonfinite_steps` steps in a row were not finite, or a step cannot be skipped.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if not self._micro_batch_losses:  # the subclass does not call `training_step` of this class
            return norm
        losses, self._micro_batch_losses = torch.stack(self._micro_batch_losses), []
        micro_batches, self._micro_batches = self._micro_batches, []
        flags = torch.stack([losses.isfinite().all(), _norm_is_finite(norm, losses.device)])
        is_loss_finite, is_norm_finite = self._all_ranks(flags)
        self._is_finite_step = is_loss_finite and is_norm_finite
        self._step_counts[self._is_finite_step] += 1
        self.commit_step(self._is_finite_step)
        if self._is_finite_step:
            self._consecutive_reports = []
            self._step_losses.append(losses.sum())
            return norm
        self._num_skipped += 1
        # The Trainer has added this step's loss: NaN, or with logging_nan_inf_filter the mean of earlier steps.
        self._tr_loss = self._loss_before
        scaler = self.accelerator.scaler
        if not (is_loss_finite and scaler is not None and scaler.get_scale() > 1):
            self._skip_step(model, micro_batches, is_loss_finite)
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model if its weights are finite; checkpoints, exports and pushes all call this.

        Raises:
            RunError: weights are not finite; nothing is written.
        """
        self._check_weights(f"Nothing was written to {output_dir or self.args.output_dir}")
        super().save_model(output_dir, _internal_call)

    def _check_weights(self, consequence: str) -> None:
        """Check the weights of the student, and of the modules that are trained with it.

        Args:
            consequence: a clause for the message: what does not happen because of this.

        Raises:
            RunError: a weight is NaN or infinite.
        """
        model = unwrap_parallel(self.model)
        name = nonfinite_weight(model)
        has_shards = is_sharded(model) or self.is_fsdp_enabled
        if has_shards and self.accelerator.num_processes > 1:  # each rank sees its shard, and all ranks must stop
            name = next((each for each in gather_object([name]) if each is not None), None)
        if name is None:
            return
        reports = self._consecutive_reports
        step = reports[0].step - 1 if reports else self.state.global_step
        when = f"after step {step}" if step else "before the first step"
        checkpoint = latest_complete(Path(self._get_output_dir(trial=None)))
        action = f"resume from {checkpoint}, which is complete" if checkpoint else "start again"
        raise RunError(
            f"The weights are not finite {when} (first: {name}). {consequence}. To continue, {action}, with a smaller "
            f"learning_rate (it is {self.args.learning_rate:.3g}) or max_grad_norm, or a longer warm-up."
        )

    def _all_ranks(self, flags: Tensor) -> list[bool]:
        """Return for each flag whether it is true on all ranks, so that all ranks skip the same steps."""
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(flags.float(), "sum") >= self.accelerator.num_processes
        return flags.tolist()

    def _skip_step(self, model: Any, micro_batches: list[MicroBatchRecord], is_loss_finite: bool) -> None:
        """Drop the gradients of a step and log why, or stop the training.

        Raises:
            RunError: see `_get_grad_norm`; or weights are not finite.
        """
        report = self._make_report(model, micro_batches, is_loss_finite)
        self._consecutive_reports.append(report)
        self._check_weights("No further step can be run")
        model.zero_grad()  # an optimizer does not change parameters without a gradient
        optim = str(self.args.optim)
        is_applied = self.is_deepspeed_enabled or any(kind in optim for kind in ("lomo", "layerwise"))
        count = len(self._consecutive_reports)
        if is_applied or count >= self.max_consecutive_nonfinite_steps:
            self._stop_training(report, is_applied)
        in_a_row = f", {count} steps in a row" if count > 1 else ""
        logger.warning(f"Step {report.step} is skipped{in_a_row}: {report}.")

    def _make_report(self, model: Any, micro_batches: list[MicroBatchRecord], is_loss_finite: bool) -> NonFiniteReport:
        tokenizer: Any = getattr(self, "processing_class", None)

        def decode(token: int) -> str:
            return tokenizer.decode([token]) if hasattr(tokenizer, "decode") else ""

        tokens = locate_nonfinite_tokens(micro_batches, self.args.process_index, decode)
        ranks = gather_object([tokens]) if self.accelerator.num_processes > 1 else [tokens]
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        nonfinite = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        # Clipping by a norm that is NaN makes every gradient NaN; the names would say nothing then.
        names = nonfinite if len(nonfinite) < len(gradients) else []
        return merge_reports(self.state.global_step + 1, is_loss_finite, ranks, names)

    def _stop_training(self, report: NonFiniteReport, is_applied: bool) -> None:
        """Write the reports of the last steps to the output folder, and raise an error.

        Args:
            report: the report of the last step.
            is_applied: whether the optimizer has applied the step already, in the backward.

        Raises:
            RunError: always.
        """
        folder = Path(self._get_output_dir(trial=None))
        checkpoint, reports = latest_complete(folder), self._consecutive_reports
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            values = {
                "learning_rate": self._get_learning_rate(),
                "max_grad_norm": self.args.max_grad_norm,
                "last_checkpoint": checkpoint and checkpoint.name,
                "steps": [each.as_dict() for each in reports],
            }
            write_json(folder / REPORT_FILE, values)
        applied = "the optimizer runs inside the backward, so the step could not be skipped"
        steps = f"{len(reports)} consecutive steps" if len(reports) > 1 else "1 step"
        why = applied if is_applied else "all of them were skipped"
        action = f"Resume from {checkpoint}, which is complete" if checkpoint else "There is no checkpoint. Start again"
        raise RunError(
            f"Training stops at step {report.step} after {steps} with a loss or gradient that is not finite "
            f"({why}). The last one: {report}. All of them are in {folder / REPORT_FILE}. "
            f"{action}, with {_suggest_fix(report)}."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, and add `skipped_steps` and `loss_spikes` since the last log, if there are any."""
        if "train_loss" in logs and not self._has_trained:
            del logs["train_loss"]  # the Trainer reports 0
        if "loss" in logs:
            if self._num_skipped:
                logs["skipped_steps"] = self._num_skipped
                logs["loss"] *= _correction_for_skipped(len(self._step_losses), self._num_skipped)
            if spikes := self._count_spikes():
                logs["loss_spikes"] = spikes
            self._num_skipped = 0
        super().log(logs, start_time)

    def _count_spikes(self) -> int:
        """Return the number of loss spikes since the last log, and log a warning for each."""
        if not self._step_losses:
            return 0
        losses = self.accelerator.reduce(torch.stack(self._step_losses), "mean").tolist()
        self._step_losses, count = [], 0
        for steps_ago, loss in zip(range(len(losses) - 1, -1, -1), losses, strict=True):
            if (median_before := self._spike_detector.update(loss)) is not None:
                count += 1
                logger.warning(
                    f"The loss jumped to {loss:.4g} from {median_before:.4g} (the median of the last steps) at about "
                    f"step {self.state.global_step - steps_ago}."
                )
        return count


def _correction_for_skipped(num_finite: int, num_skipped: int) -> float:
    """Return the factor that turns a mean over all steps into one over the finite steps; NaN if there are none.

    The losses of skipped steps are 0 in the Trainer's sum.
    """
    return (num_finite + num_skipped) / num_finite if num_finite else math.nan


def _norm_is_finite(norm: Any, device: torch.device) -> Tensor:
    """Return whether the gradient norm is finite, []; True for None, which DeepSpeed may return."""
    if norm is None:
        return torch.tensor(True, device=device)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
    return norm.isfinite().to(device).reshape(())


def _suggest_fix(report: NonFiniteReport) -> str:
    """Return what to change, as the end of a sentence that begins "Start again, with"."""
    if not report.count:
        return "a smaller learning_rate or max_grad_norm, a longer warm-up, or bf16 instead of fp16"
    if "hard" in report.finite:
        return (
            "a teacher whose logits are finite: the cross entropy of the student is finite for this token, so the "
            "teacher's logits are not (a teacher in fp16 can overflow where one in bf16 does not)"
        )
    return "a smaller learning_rate, bf16 instead of fp16, or without the named examples if they recur"
