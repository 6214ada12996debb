"""`NonFiniteGuard`: skips, reports and limits steps whose loss or gradient is not finite."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.utils import logging

from ..core import run_files
from ..core.defaults import MAX_CONSECUTIVE_NONFINITE_STEPS
from ..core.io import write_json
from ..errors import RunError
from ..losses.objective import Term
from ..models.model_types import unwrap_parallel
from ..models.sharding import full_tensor, is_sharded
from .checkpoints import latest_complete
from .distiller import StepOutput
from .nonfinite_report import (
    LossSpikeDetector,
    MicroBatchRecord,
    NonFiniteReport,
    locate_nonfinite_tokens,
    merge_reports,
    nonfinite_weight,
)

logger = logging.get_logger(__name__)


class NonFiniteGuard:
    """Skips optimizer steps whose loss or gradient is not finite; if all are finite, training does not change.

    A training step calls `start_micro_batch`, `add_micro_batch` and `add_loss` for each micro-batch, and `check_step`
    once, before the optimizer applies the step; if that returns False, `skip_step`.

    A skipped step counts as a step: the order of the data, the learning rate schedule and the logs continue. With an
    fp16 gradient scaler, the scaler handles gradients that overflow: it skips the step and lowers its scale.

    In its methods, `model` is the student with its sidecar, `args` are the training arguments, `accelerator` is that of
    the training, and `step` is the number of optimizer steps so far.

    Args:
        max_consecutive_steps: training stops after this number of consecutive steps that are not finite.

    Attributes:
        is_finite_step: whether the loss and gradient of the last step were finite.
        loss_sum_before: [] the Trainer's sum of the losses before the current step.
    """

    def __init__(self, max_consecutive_steps: int = MAX_CONSECUTIVE_NONFINITE_STEPS):
        self.max_consecutive_steps = max_consecutive_steps
        self.reset()

    def reset(self) -> None:
        """Start with empty records; also called when training starts again with a smaller batch size."""
        self._micro_batches: list[MicroBatchRecord] = []  # those of the current step, for a report
        self.is_finite_step = True
        self.loss_sum_before = torch.zeros(())
        self._is_finite_loss = True
        self._micro_batch_losses: list[Tensor] = []  # losses of the current step
        self._step_losses: list[Tensor] = []  # losses of the finite steps since the last log
        self._num_skipped = 0  # skipped steps since the last log
        self._reports: list[NonFiniteReport] = []  # reports of the last steps, as far as they were skipped
        self._step_counts = {True: 0, False: 0}  # finite and skipped steps of the training
        self._spike_detector = LossSpikeDetector()

    def add_micro_batch(self, inputs: dict[str, Tensor], step: StepOutput, terms: Iterable[Term]) -> None:
        """Keep the losses of a micro-batch, to locate tokens whose loss turns out not to be finite.

        Args:
            inputs: the batch of the collator.
            step: the output of the step.
            terms: the terms of the objective and of a trained teacher.
        """
        names = [*(term.name for term in terms), "aux", "peer_aux"]
        losses = {name: step.per_token[name] for name in names if name in step.per_token}
        self._micro_batches.append(MicroBatchRecord(inputs, step.targets, losses))

    def start_micro_batch(self, loss_sum: Tensor | None) -> None:
        """Keep the Trainer's sum of the losses before the first micro-batch of a step.

        Args:
            loss_sum: [] the sum of the losses since the last log; None outside of `Trainer.train`.
        """
        if not self._micro_batch_losses and loss_sum is not None:
            self.loss_sum_before = loss_sum.clone()

    def add_loss(self, loss: Tensor) -> None:
        """Record the loss of a micro-batch, []."""
        self._micro_batch_losses.append(loss)

    def check_step(self, grad_norm: Tensor | float | None, accelerator: Accelerator) -> bool | None:
        """Return whether the loss and gradient of the step are finite on all ranks.

        Args:
            grad_norm: [] the norm of the gradient; None if DeepSpeed returns none.
            accelerator: see the class.

        Returns:
            None if no loss was recorded, because a subclass of the Trainer has another `training_step`.
        """
        if not self._micro_batch_losses:
            self._micro_batches = []
            return None
        losses, self._micro_batch_losses = torch.stack(self._micro_batch_losses), []
        flags = torch.stack([losses.isfinite().all(), _norm_is_finite(grad_norm, losses.device)])
        if accelerator.num_processes > 1:  # all ranks skip the same steps
            flags = accelerator.reduce(flags.float(), "sum") >= accelerator.num_processes
        self._is_finite_loss, is_norm_finite = flags.tolist()
        self.is_finite_step = self._is_finite_loss and is_norm_finite
        self._step_counts[self.is_finite_step] += 1
        if self.is_finite_step:
            self._reports, self._micro_batches = [], []
            self._step_losses.append(losses.sum())
        else:
            self._num_skipped += 1
        return self.is_finite_step

    def skip_step(
        self,
        model: nn.Module,
        args: TrainingArguments,
        accelerator: Accelerator,
        step: int,
        learning_rate: float,
        tokenizer: object,
    ) -> None:
        """Drop the gradients of a step and log why, or stop the training; leave an overflow to the fp16 scaler.

        The report has the present learning rate, and the text of tokens if the tokenizer can decode them.

        Raises:
            RunError: `max_consecutive_steps` steps in a row were not finite, a step cannot be skipped, or weights are
                not finite.
        """
        micro_batches, self._micro_batches = self._micro_batches, []
        scaler = accelerator.scaler
        if self._is_finite_loss and scaler is not None and scaler.get_scale() > 1:
            return
        decode = getattr(tokenizer, "decode", None) or (lambda ids: "")
        tokens = locate_nonfinite_tokens(micro_batches, args.process_index, lambda token: decode([token]))
        ranks = gather_object([tokens]) if accelerator.num_processes > 1 else [tokens]
        report = merge_reports(step + 1, self._is_finite_loss, ranks, _nonfinite_gradients(model))
        self._reports.append(report)
        self.check_weights(model, args, accelerator, step, "No further step can be run")
        model.zero_grad()  # an optimizer does not change parameters without a gradient
        optim, deepspeed = str(args.optim), getattr(accelerator.state, "deepspeed_plugin", None)
        is_applied = deepspeed is not None or any(kind in optim for kind in ("lomo", "layerwise"))
        count = len(self._reports)
        if is_applied or count >= self.max_consecutive_steps:
            self._stop_training(args, learning_rate, is_applied)
        in_a_row = f", {count} steps in a row" if count > 1 else ""
        logger.warning(f"Step {report.step} is skipped{in_a_row}: {report}.")

    def check_weights(
        self, model: nn.Module, args: TrainingArguments, accelerator: Accelerator, step: int, consequence: str
    ) -> None:
        """Check the weights of the student, and of the modules that are trained with it; call it on every rank.

        Raises:
            RunError: a weight is NaN or infinite; the message has the consequence, a clause.
        """
        model = unwrap_parallel(model)
        name = nonfinite_weight(model)
        has_shards = is_sharded(model) or getattr(accelerator.state, "fsdp_plugin", None) is not None
        if has_shards and accelerator.num_processes > 1:  # each rank sees its shard, and all ranks must stop
            name = next((each for each in gather_object([name]) if each is not None), None)
        if name is None:
            return
        step = self._reports[0].step - 1 if self._reports else step
        when = f"after step {step}" if step else "before the first step"
        checkpoint = latest_complete(Path(str(args.output_dir)))
        action = f"resume from {checkpoint}, which is complete" if checkpoint else "start again"
        raise RunError(
            f"The weights are not finite {when} (first: {name}). {consequence}. To continue, {action}, with a smaller "
            f"learning_rate (it is {args.learning_rate:.3g}) or max_grad_norm, or a longer warm-up."
        )

    def _stop_training(self, args: TrainingArguments, learning_rate: float, is_applied: bool) -> None:
        """Write the reports of the last steps to the output folder, and raise an error.

        Raises:
            RunError: always; the message says if the optimizer has applied the step already, in the backward.
        """
        folder, reports = Path(str(args.output_dir)), self._reports
        checkpoint = latest_complete(folder)
        if args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            values = {
                "learning_rate": learning_rate,
                "max_grad_norm": args.max_grad_norm,
                "last_checkpoint": checkpoint and checkpoint.name,
                "steps": [each.as_dict() for each in reports],
            }
            write_json(folder / run_files.NONFINITE_STEPS, values)
        applied = "the optimizer runs inside the backward, so the step could not be skipped"
        steps = f"{len(reports)} consecutive steps" if len(reports) > 1 else "1 step"
        why = applied if is_applied else "all of them were skipped"
        action = f"Resume from {checkpoint}, which is complete" if checkpoint else "There is no checkpoint. Start again"
        raise RunError(
            f"Training stops at step {reports[-1].step} after {steps} with a loss or gradient that is not finite "
            f"({why}). The last one: {reports[-1]}. All of them are in {folder / run_files.NONFINITE_STEPS}. "
            f"{action}, with {_suggest_fix(reports[-1])}."
        )

    def train_loss_correction(self) -> float:
        """Return the factor that makes `train_loss` a mean over the steps of the training that were not skipped."""
        return _correction_for_skipped(self._step_counts[True], self._step_counts[False])

    def add_to_log(self, logs: dict[str, float], accelerator: Accelerator, step: int) -> None:
        """Correct `loss` in a training log for skipped steps, and add their number and that of loss spikes, if any."""
        if self._num_skipped:
            logs["skipped_steps"] = self._num_skipped
            logs["loss"] *= _correction_for_skipped(len(self._step_losses), self._num_skipped)
        if spikes := self._count_spikes(accelerator, step):
            logs["loss_spikes"] = spikes
        self._num_skipped = 0

    def _count_spikes(self, accelerator: Accelerator, step: int) -> int:
        """Return the number of loss spikes since the last log, and log a warning for each."""
        if not self._step_losses:
            return 0
        losses = accelerator.reduce(torch.stack(self._step_losses), "mean").tolist()
        self._step_losses, count = [], 0
        for steps_ago, loss in zip(range(len(losses) - 1, -1, -1), losses, strict=True):
            if (median_before := self._spike_detector.update(loss)) is not None:
                count += 1
                logger.warning(
                    f"The loss jumped to {loss:.4g} from {median_before:.4g} (the median of the last steps) at about "
                    f"step {step - steps_ago}."
                )
        return count


def _correction_for_skipped(num_finite: int, num_skipped: int) -> float:
    """Return the factor that turns a mean over all steps into one over the finite steps; NaN if all are skipped.

    The losses of skipped steps are 0 in the Trainer's sum.
    """
    if not num_skipped:
        return 1.0
    return (num_finite + num_skipped) / num_finite if num_finite else math.nan


def _nonfinite_gradients(model: nn.Module) -> list[str]:
    """Return the parameters whose gradient is not finite; empty if all are, as after clipping by a norm of NaN."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    return names if len(names) < len(gradients) else []


def _norm_is_finite(norm: Tensor | float | None, device: torch.device) -> Tensor:
    """Return whether the gradient norm is finite, []; True for None, which DeepSpeed may return."""
    if norm is None:
        return torch.ones((), dtype=torch.bool, device=device)
    norm = full_tensor(torch.as_tensor(norm))
    return norm.isfinite().to(device).reshape(())


def _suggest_fix(report: NonFiniteReport) -> str:
    """Return what to change, as the end of a sentence that begins "Start again, with"."""
    if not report.num_nonfinite_tokens:
        return "a smaller learning_rate or max_grad_norm, a longer warm-up, or bf16 instead of fp16"
    if "hard" in report.finite_terms:
        return (
            f"another teacher or without {' and '.join(sorted(report.nonfinite_terms))}: the cross entropy of the "
            "student is finite for this token, so the teacher's values may not be (a teacher in fp16 can overflow "
            "where one in bf16 does not)"
        )
    return "a smaller learning_rate, bf16 instead of fp16, or without the named examples if they recur"
