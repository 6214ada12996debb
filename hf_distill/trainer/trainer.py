"""`DistillTrainer`, and `DistillMixin`, which adds distillation to `transformers.Trainer` and its subclasses.

A training step is `compute_loss`: it removes what the models do not read from the batch, calls the `Distiller`
(targets, teacher signals, student logits, loss), and records the metrics of the step. Each other override calls one of
the objects that `DistillMixin` creates before or after the method of the Trainer.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from ..core.aligned_inputs import aligned_names
from ..core.deepspeed_config import enable_zero3_gather_on_save
from ..core.logits import to_host
from ..core.row_values import ORIGIN, WEIGHT
from ..core.targets import SECOND_VIEW_KEYS, TEACHER_INDEX, TEACHER_PREFIX
from ..core.teacher_inputs import TEACHER_LABELS, is_teacher_key, without_teacher_inputs
from ..data.row_values import check_no_weights, has_row_value
from ..errors import DistillError, RunError, raise_if_any
from ..losses.objective import Term
from ..models.checkpoint_weights import tied_once
from ..models.declared_types import check_type_name, declare_model_type
from ..models.features import Features
from ..models.image_inputs import without_placeholder_labels
from ..models.model_call import input_names, without_foreign_inputs
from ..models.model_types import model_type_of, unwrap_parallel
from ..models.precision import MIXED_PRECISION_DTYPES
from ..models.projectors import ProjectorConfig
from ..models.sharding import reshard
from ..models.sidecar import strip_sidecar
from ..teachers import NullTeacher, RoutedTeacher, Teacher, TrainableTeacher
from ..teachers.group import find_trained_teacher, teachers_by_name
from ..teachers.input_keys import foreign_key_problem
from ..teachers.input_limits import check_ids
from .batch_columns import SOURCE, with_origin, with_teacher_index
from .changed_arguments import changed_arguments, objective_arguments
from .checkpoint_loading import load_checkpoint_weights
from .checkpointing import Checkpointer
from .compilation import compile_frozen_teachers, compile_student, incompatible_features, whole_model_uncompiled
from .config import DistillArguments, DistillConfig
from .distiller import Distiller
from .hub import CardOptions, ModelCardWriter, pushes_checkpoint
from .metrics import (
    TRAIN_STATISTICS_EVERY,
    MetricAccumulator,
    average_metrics,
    correct_greater_is_better,
    evaluation_metrics,
)
from .nonfinite import NonFiniteGuard
from .packed_batches import collator_for_models, dispatch_problems
from .prefetch import ANNOUNCED_INPUTS, BatchPrefetcher
from .self_check import SelfCheck
from .sidecar import SidecarManager, learned_layers, load_trained_sidecar, save_trained_sidecar
from .signal_handling import stop_on_signal
from .source_metrics import ORIGIN_LABELS, split_by_source
from .step_inputs import StepInputs
from .teacher_argument import (
    OneTeacher,
    TeacherArgument,
    choose_teacher,
    incompatible_teacher,
    leave_devices_to_teacher,
    prepare_teacher,
)
from .teacher_callback import TeacherCallback
from .teacher_failure import TeacherFailureGuard
from .terms import build_objective
from .upstream import TRAINER, check_upstream
from .validation import (
    incompatible_arguments,
    incompatible_sidecar,
    nothing_to_train,
    replaced_loss_problem,
    wrong_arguments,
)

check_upstream("transformers", Trainer, TRAINER)
_Base: Any = Trainer if TYPE_CHECKING else object
LossOutput = Tensor | tuple[Tensor, Any]  # the loss, and the outputs of the student if they are requested


class DistillMixin(_Base):
    """Adds a teacher to a Trainer: the loss becomes the distillation objective, and the rest stays the Trainer's.

    Without a teacher, or with alpha = 0 and no other losses, training is bit-identical to that of the Trainer, as long
    as every loss and gradient is finite.

    distiller:          computes the loss of a batch
    metric_accumulator: sums of metrics for the logs and evaluations
    nonfinite_guard:    skips steps whose loss or gradient is not finite
    sidecar_manager:    trained modules that are not part of the student
    checkpointer:       marks, verifies and rotates checkpoints
    failure_guard:      ends training with a checkpoint if a teacher's server fails
    """

    distiller: Distiller
    teacher: Teacher  # None if the trainer does not distill
    loss_is_scaled_for_ga: Any  # transformers and TRL declare different types
    loads_models = False  # whether `model` may be a Hub id or a path
    collates_batches = True  # whether `data_collator` returns batches, and not rows of which the trainer makes them
    drops_teacher_inputs = False  # whether batches may have inputs of a teacher although there is none
    sources: tuple[str, ...] = ()  # names of the sources of a mixture, if the collator has none
    keep_logits = False  # whether the running evaluation returns logits
    _has_computed_loss = False  # whether the current micro-batch reached `compute_loss`
    _signature_columns: Any  # transformers and TRL declare different types
    _total_loss_scalar: float  # the sum of the losses up to the last log
    _tr_loss: Tensor  # [] the sum of the losses since the last log

    def __init__(
        self,
        model: nn.Module | str | None = None,
        args: TrainingArguments | None = None,
        *trainer_args: object,
        teacher: TeacherArgument | None = None,
        teachers: Mapping[str, OneTeacher] | None = None,
        model_type: str | None = None,
        **kwargs: object,
    ):
        raise_if_any(wrong_arguments(type(self), self.loads_models, model, args))
        check_type_name(model_type)
        self._model_type = model_type
        if isinstance(model, nn.Module):
            declare_model_type(model, model_type)
        distill_args = args if isinstance(args, DistillArguments) else DistillArguments()
        has_weights = has_row_value(WEIGHT, *trainer_args, kwargs.get("train_dataset"))
        self.teacher = cast(Teacher, choose_teacher(teacher, teachers, distill_args, has_weights))
        self.is_distilling, self._is_self_check_pending = self.teacher is not None, False
        self._distill_args = distill_args
        self.drops_teacher_inputs = teacher is not None or teachers is not None  # with alpha=0 there is no teacher
        if self.is_distilling:
            enable_zero3_gather_on_save(args)
            leave_devices_to_teacher(self.teacher, args)
        self.metric_accumulator, self.checkpointer = MetricAccumulator(), Checkpointer()
        self.nonfinite_guard = NonFiniteGuard(distill_args.max_consecutive_nonfinite_steps)
        self.sidecar_manager, self._card_writer = SidecarManager(), ModelCardWriter()
        self.failure_guard, self._prefetcher = TeacherFailureGuard(), BatchPrefetcher()
        super().__init__(model, args, *trainer_args, **kwargs)
        self._objective_args = objective_arguments(self.args)
        if self.is_distilling:
            correct_greater_is_better(self.args)
            self.setup_distillation(self.teacher, distill_args)
        else:
            self.attach_sidecar(Features())
            self.data_collator = collator_for_models(self)

    # The step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> LossOutput:
        """Return the distillation loss of a batch: the sum over target tokens / `num_items_in_batch`.

        Without a teacher it is the Trainer's loss. See `Distiller` for the steps.
        """
        self._has_computed_loss = True
        source = inputs.get(SOURCE)
        if self.reads_origins:
            inputs = with_origin(inputs, self._source_names, self.model.training)
        inputs = with_teacher_index(inputs, self.teacher, self._source_names)
        if not self.is_distilling:
            check_no_weights(inputs, model.training)
            inputs = self._without_teacher_inputs(inputs)
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        is_training = model.training
        if not is_training:  # evaluations are not weighted
            inputs = {name: value for name, value in inputs.items() if name != WEIGHT}
        if self._is_self_check_pending:
            self.distiller.pre_loss_hook = SelfCheck.prepare(self._distill_args, inputs, model, self.teacher)
        try:
            step = self.distiller(
                model,
                self.teacher,
                inputs,
                num_items=num_items_in_batch,
                keep_logits=return_outputs if is_training else self.keep_logits,
                statistics_every=TRAIN_STATISTICS_EVERY if is_training else 1,
            )
        except IndexError:  # an id outside the student's embeddings; this check names it
            check_ids(self.model, inputs)
            raise
        self._is_self_check_pending, self.distiller.pre_loss_hook = False, None
        step.per_token.update(split_by_source(step, source, self._source_names))
        step.per_token.update(split_by_source(step, inputs.get(TEACHER_INDEX), self._teacher_names))
        step.per_token.update(split_by_source(step, inputs.get(ORIGIN), ORIGIN_LABELS))
        if is_training:
            self.metric_accumulator.add_micro_batch(step)
            self.nonfinite_guard.add_micro_batch(inputs, step, self._terms)
        else:
            gather = self.accelerator.gather_for_metrics
            self.metric_accumulator.add_evaluation_batch(step, gather, model_type_of(self.model))
        loss = step.loss
        if is_training and num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The loss is divided by the target tokens of all processes, and DDP averages gradients over processes.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, step.outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run the Trainer's step on a micro-batch, record its loss, and count the steps with target tokens.

        Raises:
            DistillError: a subclass replaces `compute_loss`, so the teacher is ignored.
        """
        self.nonfinite_guard.start_micro_batch(getattr(self, "_tr_loss", None))
        self._has_computed_loss = False
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.is_distilling and not self._has_computed_loss:
            raise DistillError(replaced_loss_problem(type(self)))
        self.nonfinite_guard.add_loss(loss)
        if self.is_distilling and self.accelerator.sync_gradients and num_items_in_batch is not None:
            self.metric_accumulator.count_step(num_items_in_batch, loss.device)
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | int | None]:
        """Return the micro-batches of a step as the Trainer does; the teacher may start on later ones."""
        if self.is_distilling and self.teacher.prefetch:
            steps_after = self.state.max_steps - self.state.global_step - 1
            num_ahead = min(self.teacher.prefetch, steps_after * self.args.gradient_accumulation_steps)
            epoch_iterator = self._prefetcher.take(epoch_iterator, num_batches, num_ahead, self._announce_batch)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _announce_batch(self, batch: object) -> None:
        """Announce a batch to the teacher; prompts, whose completions are not known yet, are not announced."""
        if not isinstance(batch, Mapping) or "labels" not in batch or "input_ids" not in batch:
            return
        names = [name for name in batch if name in ANNOUNCED_INPUTS or name in aligned_names(batch)]
        if any(is_teacher_key(name) and name not in names for name in batch):
            return  # a teacher with further inputs does not start early
        on_host = map(torch.from_numpy, to_host(*(batch[name] for name in names)))
        inputs = with_teacher_index(dict(zip(names, on_host, strict=True)), self.teacher, self._source_names)
        step = StepInputs.read(inputs, self.teacher, self.distiller.features, model_type_of(self.model))
        self.teacher.start_batch(step.teacher_inputs, step.teacher_targets, step.feature_requests)

    def _without_teacher_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a batch without what only a teacher reads.

        Raises:
            DistillError: the batch has inputs of a teacher, and the trainer was created without one.
        """
        inputs = {name: value for name, value in inputs.items() if name not in SECOND_VIEW_KEYS}
        if self.is_distilling:
            inputs = without_teacher_inputs(inputs, self.teacher.readable_inputs())
            return without_foreign_inputs(self.model, inputs, self.teacher.input_names())
        if not self.drops_teacher_inputs and (problem := foreign_key_problem(inputs, self.model)):
            raise DistillError(problem)
        return without_teacher_inputs(inputs, input_names(self.model))

    @property
    def reads_origins(self) -> bool:
        """Whether the losses depend on the author of the target tokens."""
        return self.is_distilling and bool(self._distill_args.by_origin)

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Tensor]], device: torch.device
    ) -> Tensor | int | None:
        """Shift the labels and count the target tokens of the global batch; the step reads the same `shift_labels`."""
        if self.is_distilling:
            model_type = model_type_of(self.model)
            shift, count = model_type.shifts_labels, model_type.output_type.countable_labels
            for i, batch in enumerate(batch_samples):
                if all(name in batch for name in model_type.output_type.label_names):
                    batch = without_placeholder_labels(batch, model_type.placeholders)
                    labels = count(batch, shift)
                    batch_samples[i] = {**batch, "shift_labels": labels, "labels": batch.get("labels", labels)}
        return super()._get_num_items_in_batch(batch_samples, device)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradients; a trained teacher may be clipped separately from the student."""
        teacher_max_norm = self.sidecar_manager.clip_norm(self.args)
        if teacher_max_norm is None or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return self.sidecar_manager.clip_grad_norm(model, self.args.max_grad_norm, teacher_max_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """Check the step before the optimizer applies it; the Trainer calls this once for each optimizer step.

        Raises:
            RunError: too many steps in a row were not finite, or a step cannot be skipped.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        is_finite = self.nonfinite_guard.check_step(norm, self.accelerator)
        if is_finite is None:
            return norm
        self.metric_accumulator.commit_step(is_applied=is_finite)
        if not is_finite:
            # The Trainer has added this step's loss: NaN, or with logging_nan_inf_filter the mean of earlier steps.
            self._tr_loss = self.nonfinite_guard.loss_sum_before
            step, learning_rate = self.state.global_step, self._get_learning_rate()
            self.nonfinite_guard.skip_step(
                model, self.args, self.accelerator, step, learning_rate, self.processing_class
            )
        return norm

    @property
    def updated_student(self) -> bool:
        """Whether the last step changed the student: it was finite, and no gradient scaler skipped it."""
        return self.nonfinite_guard.is_finite_step and not self.accelerator.optimizer_step_was_skipped

    @property
    def _terms(self) -> list[Term]:
        return [*self.distiller.terms, *self.distiller.teacher_terms]

    @property
    def _source_names(self) -> tuple[str, ...]:
        return self.sources or getattr(self.data_collator, "sources", ())

    @property
    def _teacher_names(self) -> tuple[str, ...]:
        """Names in the logs of teachers that have their own rows."""
        names = self.teacher.names if isinstance(self.teacher, RoutedTeacher) else ()
        return tuple(f"teacher_{name}" for name in names)

    # Teacher and objective

    def setup_distillation(self, teacher: Teacher, distill_args: DistillArguments) -> None:
        """Use this teacher and objective for training and evaluation from now on.

        Args:
            teacher: the teacher; this method prepares it.
            distill_args: the arguments of the objective.

        Raises:
            DistillError: teacher and student do not fit together, or an argument does not work with distillation.
        """
        self.is_distilling, self.teacher = True, teacher
        raise_if_any(self.incompatible_arguments())
        self.pop_callback(TeacherCallback)
        self.add_callback(TeacherCallback(teacher, lambda: self.updated_student, self.failure_guard))
        datasets = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        makes_students = self.model_init is not None
        prepare_teacher(
            teacher, self.model, self.args, self.processing_class, datasets, makes_students, self.data_collator
        )
        compile_frozen_teachers(teacher, self.args)
        self._set_objective(distill_args, renew=True)
        self.data_collator = collator_for_models(self)
        output_type = model_type_of(self.model).output_type
        self.label_names = [*output_type.label_names]  # the Trainer derives others from the forward, or none
        self.can_return_loss |= output_type.hard_loss is None  # the Trainer then evaluates a loss without labels

    def _set_objective(self, distill_args: DistillArguments, renew: bool) -> None:
        """Build the objective and the distiller for the prepared teacher, whose state stays as it is.

        Args:
            distill_args: the arguments of the objective.
            renew: whether projectors are initialized again even if the objective needs the same ones as before.
        """
        output_type = model_type_of(self.model).output_type
        objective = build_objective(distill_args, self.teacher, self.args.label_smoothing_factor, output_type)
        raise_if_any(incompatible_features(objective.student, self.model, self.teacher, self.args))
        compile_student(self.model, self.args)
        teachers = teachers_by_name(self.teacher)
        features = Features.match(
            objective.student,
            self.model,
            lambda term: teachers[term.teacher].layer_stack(term.stack),
            ProjectorConfig.of(distill_args.projectors),
        )
        autocast_dtype = MIXED_PRECISION_DTYPES.get(self.accelerator.mixed_precision)
        self.distiller = Distiller(
            objective.student, distill_args.chunk_tokens, features, objective.teacher, autocast_dtype
        )
        if self.teacher.can_fail:
            self.distiller.agree_on_failure = lambda failure: self.failure_guard.agree(failure, self.accelerator)
        self._is_self_check_pending = distill_args.self_check
        # The distillation loss is divided by the target tokens of the global batch, whatever the model's forward does.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._signature_columns = None  # the columns of an earlier teacher do not apply
        self.attach_sidecar(features, find_trained_teacher(self.teacher), renew)
        self._distill_args = distill_args

    def _hp_search_setup(self, trial: object) -> None:
        """Apply an objective that a trial or the user changed in `args`; the Trainer calls this before each training.

        Raises:
            DistillError: an argument changed that cannot be changed after the trainer was created.
        """
        super()._hp_search_setup(trial)
        changed = changed_arguments(self.args, self._objective_args, self.is_distilling)
        makes_students = self.model_init is not None
        if self.is_distilling:
            correct_greater_is_better(self.args)
            problems = incompatible_teacher(self.teacher, self.args, makes_students)
            raise_if_any(self.incompatible_arguments() + problems)
        if "max_consecutive_nonfinite_steps" in changed:
            self.nonfinite_guard.max_consecutive_steps = self.args.max_consecutive_nonfinite_steps
        distill_args = self._distill_args
        if {*changed} - {"max_consecutive_nonfinite_steps"}:
            distill_args = self.args if isinstance(self.args, DistillArguments) else DistillArguments()
        if self.is_distilling and (changed or makes_students):  # model_init created a new student
            self._set_objective(distill_args, renew=makes_students)
        if self.is_distilling:
            raise_if_any(nothing_to_train(self.model))
        self._objective_args = objective_arguments(self.args)

    def incompatible_arguments(self) -> list[str]:
        """Return why this trainer cannot distill with its arguments; subclasses add their reasons."""
        return incompatible_arguments(self) + dispatch_problems(self)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the teacher or the student reads; each model gets those that its forward accepts."""
        super()._set_signature_columns_if_needed()
        if self.is_distilling:
            of_teacher = self.teacher.input_names()
            model_inputs = of_teacher | input_names(self.model) | {f"{TEACHER_PREFIX}{name}" for name in of_teacher}
            self._keep_columns(model_inputs | {TEACHER_LABELS, WEIGHT} | ({ORIGIN} if self.reads_origins else set()))
        self._keep_columns(getattr(self.data_collator, "raw_columns", ()))

    def _keep_columns(self, names: Iterable[str]) -> None:
        new_columns = sorted({*names} - {*self._signature_columns})
        self._signature_columns = [*self._signature_columns, *new_columns]

    def attach_sidecar(self, features: Features, teacher: TrainableTeacher | None = None, renew: bool = True) -> None:
        """Attach a sidecar to the student, in place of an earlier one; see `SidecarManager.replace`."""
        has_scheduler = self.optimizer is not None and self.lr_scheduler is not None
        has_users_scheduler = has_scheduler and not self._created_lr_scheduler
        self.sidecar_manager.replace(self.model, self.args, features, teacher, renew, has_users_scheduler)
        raise_if_any(incompatible_sidecar(self))

    def call_model_init(self, trial: object = None) -> nn.Module:
        """Create a model as the Trainer does, and attach new projectors to it."""
        model = super().call_model_init(trial)
        declare_model_type(model, self._model_type)
        self.sidecar_manager.attach(model, self.args)
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, and give the parts of the sidecar separate parameter groups where they have options."""
        is_users_optimizer = self.optimizer is not None
        reshard(self.model)  # transformers before 5.24 gives the optimizer the gathered parameters after an evaluation
        optimizer = super().create_optimizer(model)
        self.sidecar_manager.add_param_groups(self.model, optimizer, is_users_optimizer)
        return optimizer

    # Training

    def train(
        self, resume_from_checkpoint: str | Path | bool | None = None, *args: object, **kwargs: object
    ) -> TrainOutput:
        """Train as `Trainer.train` does; with `stop_on_signal`, SIGTERM or SIGINT ends training with a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint, which is verified; True for the newest complete one.
            args: further arguments of `Trainer.train`.
            kwargs: further arguments of `Trainer.train`.

        Raises:
            DistillError: the checkpoint is incomplete, or differs from what was written; or every parameter is frozen.
            RunInterrupted: training was stopped by a signal; a `SystemExit` with code 143 (SIGTERM) or 130 (SIGINT).
        """
        with stop_on_signal(self) if getattr(self.args, "stop_on_signal", False) else nullcontext():
            checkpoint = self.checkpointer.resolve(resume_from_checkpoint, self.args, self.accelerator)
            try:
                with self._compilation():
                    return super().train(checkpoint, *args, **kwargs)
            finally:
                if self.is_distilling:
                    self.teacher.close()

    def _compilation(self) -> AbstractContextManager[None]:
        """Keep accelerate from compiling a student whose layers are compiled; without a teacher it may compile it."""
        return whole_model_uncompiled(self.accelerator) if self.is_distilling else nullcontext()

    def _inner_training_loop(self, *args: object, **kwargs: object) -> TrainOutput:
        """Start with empty records; `auto_find_batch_size` calls this again after a batch did not fit into memory."""
        self.metric_accumulator.reset_training()
        self.nonfinite_guard.reset()
        self.failure_guard.reset()
        self._prefetcher.reset()
        return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: object, **kwargs: Any) -> None:
        """Run an epoch, but no step after the last one: the Trainer runs one if it resumes from a finished training.

        Raises:
            RunError: a teacher's server failed; a checkpoint of the last complete step was written.
        """
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            try:
                super()._run_epoch(*args, **kwargs)
            except RunError as error:
                if error is not self.failure_guard.failure:
                    raise
                folder = Path(self._get_output_dir(kwargs["trial"]))
                save = partial(self._save_checkpoint, kwargs["model"], kwargs["trial"])
                raise self.failure_guard.end(folder, self.args, self.state, save) from error
            return
        self.control.should_training_stop = True
        if (checkpoint := kwargs["resume_from_checkpoint"]) is not None:
            self._load_rng_state(checkpoint)

    def _maybe_log_save_evaluate(self, *args: object, **kwargs: object) -> None:
        """Log, evaluate and save as the Trainer does; an evaluation advances the random generators."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.is_distilling and self.teacher.can_fail:
            self.failure_guard.remember()

    def _finalize_training(self, trial: object, *args: object, **kwargs: object) -> TrainOutput:
        """Make `train_loss` the mean over the steps that have target tokens and were not skipped; NaN if none."""
        for record in (self.metric_accumulator, self.nonfinite_guard):
            factor = record.train_loss_correction()
            self._total_loss_scalar, self._tr_loss = self._total_loss_scalar * factor, self._tr_loss * factor
        with self.checkpointer.finishing(Path(self._get_output_dir(trial)), self.args, self.state):
            output = super()._finalize_training(trial, *args, **kwargs)
        if self._has_trained:
            return output
        metrics = {name: value for name, value in output.metrics.items() if name != "train_loss"}
        return output._replace(training_loss=math.nan, metrics=metrics)

    @property
    def _has_trained(self) -> bool:
        """Whether this call of `train` ran a step; if it resumes a finished training, it runs none."""
        return self.state.global_step > self._initial_global_step

    # Logs and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does; training logs get the metrics of the target tokens and steps since the last log."""
        if "loss" in logs and self.is_distilling:
            if sums := self.metric_accumulator.take_train_sums(self.accelerator.reduce):
                logs |= self._average_metrics(sums) | learned_layers(self.model) | self.teacher.metrics()
            logs["loss"] *= self.metric_accumulator.take_loss_correction()
        if "loss" in logs:
            self.nonfinite_guard.add_to_log(logs, self.accelerator, self.state.global_step)
        if "train_loss" in logs and not self._has_trained:
            del logs["train_loss"]  # the Trainer reports 0
        super().log(logs, start_time)

    def _average_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Return the means for the logs, from sums over target tokens; subclasses add metrics."""
        output_type = model_type_of(self.model).output_type
        possible = (*output_type.student_metrics, *output_type.pair_metrics)
        statistics = [name for name in possible if name not in output_type.evaluation_statistics]
        names = (*self._source_names, *self._teacher_names, *ORIGIN_LABELS)
        return average_metrics(sums, self._terms, names, statistics)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Run the Trainer's evaluation step; logits of all positions are materialized only if it returns them.

        Args:
            model: the student as prepared for evaluation.
            inputs: the collator's batch.
            prediction_loss_only: whether to return the loss only.
            ignore_keys: outputs of the model that are not returned.
            gen_kwargs: arguments of `generate`, for `Seq2SeqTrainer`.
        """
        self.keep_logits = not prediction_loss_only
        has_labels = all(name in inputs for name in self.label_names) and (bool(self.label_names) or self.is_distilling)
        if isinstance(inputs, Mapping) and not has_labels:
            inputs = self._without_teacher_inputs(inputs)  # the Trainer calls the student
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys, **gen_kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the Trainer's evaluation, and add metrics over all target tokens of the data; see `docs/metrics.md`.

        A value of the user's `compute_metrics` is kept if a metric of this package has the same name.
        """
        self.metric_accumulator.start_evaluation()
        with self._compilation():
            output = super().evaluation_loop(
                dataloader,
                description,
                prediction_loss_only,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )
        sums, row_values = self.metric_accumulator.finish_evaluation(description)
        if sums:
            means = self._average_metrics(sums)
            metrics = evaluation_metrics(sums, row_values, means, self.distiller.terms, model_type_of(self.model))
            loss = {f"{metric_key_prefix}_loss": metrics.pop("loss")}  # the Trainer's is a mean over batches
            named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
            output.metrics.update(named | output.metrics | loss)
        return output

    # Checkpoints and the Hub

    def newest_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint of the output folder, with all files verified; None if there is none.

        All processes must call it. `train(resume_from_checkpoint=trainer.newest_checkpoint())` resumes, or starts at
        step 0 if there is no checkpoint yet.

        Raises:
            DistillError: a checkpoint was changed after it was written, or one is damaged and none is complete.
        """
        return self.checkpointer.newest(self.args, self.accelerator)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer.save_model` does; a checkpoint also gets the sidecar and the state of the teacher.

        Raises:
            RunError: weights are not finite; nothing is written.
        """
        consequence = f"Nothing was written to {output_dir or self.args.output_dir}"
        self.nonfinite_guard.check_weights(self.model, self.args, self.accelerator, self.state.global_step, consequence)
        super().save_model(output_dir, _internal_call)
        if not _internal_call or output_dir is None:
            return
        save_trained_sidecar(self.model, output_dir, self.args.should_save)
        if self.is_distilling:
            self.teacher.save(output_dir, self.args.process_index, self.args.should_save)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self.checkpointer.writing(folder, self.args, self.accelerator, self.state):
            super()._save_checkpoint(model, trial)
        self.failure_guard.checkpoint_was_saved(self.state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        state = None if state_dict is None else strip_sidecar(state_dict)
        inner = unwrap_parallel(self.model)
        if not isinstance(inner, PreTrainedModel) and not hasattr(inner, "peft_config") and self.args.should_save:
            state = tied_once(self.model.state_dict() if state is None else state)
        with self.checkpointer.users_limit(self.args):
            super()._save(output_dir, state_dict=state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        student = self.model if model is None else model
        if not load_checkpoint_weights(student, resume_from_checkpoint, self.accelerator):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Verify the best checkpoint, then load it."""
        best = str(self.state.best_model_checkpoint)
        self.checkpointer.verify(Path(best), self.args, self.accelerator, is_best=True)
        if not load_checkpoint_weights(self.model, best, self.accelerator):
            super()._load_best_model()
        load_trained_sidecar(self.model, best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the sidecar and the teacher's state too; the Trainer calls this after it loaded the model to resume."""
        if checkpoint is not None:
            load_trained_sidecar(self.model, checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_distilling:
            self.teacher.load(checkpoint, self.args.process_index)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Write the card and mark the checkpoint as complete, then push it; an earlier push may still read the card."""
        if self.is_distilling and pushes_checkpoint(self.args, self.push_in_progress):
            self.create_model_card()
        self.checkpointer.mark_complete(Path(checkpoint_folder), self.args, self.accelerator)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Write README.md and distillation.json into the output folder; without a teacher the Trainer writes its card.

        Args:
            args: positional arguments of the Trainer's method.
            options: see `CardOptions`.
        """
        if not self.is_distilling or isinstance(self.teacher, NullTeacher):
            super().create_model_card(*args, **options)
        elif self.is_world_process_zero():
            self._card_writer.write(self, self.model, self.teacher, CardOptions(*args, **options))


class DistillTrainer(DistillMixin, Trainer):
    """`transformers.Trainer` with a teacher.

    The loss of a batch, over target tokens (labels != -100), is

        (alpha * T^2 * sum KL(teacher || student) + (1 - alpha) * sum cross entropy) / num_items_in_batch

    `evaluate` returns the loss, and `eval_perplexity`, `eval_kl`, `eval_agreement` and `eval_teacher_perplexity` at
    T = 1. Without a teacher it trains and evaluates as `Trainer` does, bit for bit.

    Args:
        model: the student: a transformers model, a PEFT model, or another module with `model_type`.
        args: a `DistillConfig`, or plain `TrainingArguments` (the objective then has its defaults: temperature 2,
            alpha 0.5).
        teacher: the teacher: a model, the id or path of a model, or a `Teacher`. None trains without a teacher.
        teachers: several teachers by name, with equal weights. For other weights pass a `MultiTeacher` as `teacher`.
        model_type: type of `model`, such as "classification", if it is not a transformers model or its class is of no
            known type; see `docs/model-types.md` for the names.

    All other arguments are those of `Trainer`, in the same positions.

    Raises:
        DistillError: teacher and student do not fit together, or an argument does not work with distillation.

    Example:
        trainer = DistillTrainer(
            model=student,
            teacher="org/teacher",
            args=DistillConfig("out", temperature=2.0, alpha=0.5),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        trainer.train()

    Source: Hinton et al., arXiv 1503.02531.
    """


__all__ = ["DistillConfig", "DistillMixin", "DistillTrainer"]
