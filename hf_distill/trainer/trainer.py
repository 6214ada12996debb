"""Glue between the step and a Trainer: `DistillMixin` serves `transformers.Trainer` and what derives from it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..core.deepspeed_config import enable_zero3_gather_on_save
from ..core.references import path_exists, reference_kind
from ..core.targets import SECOND_VIEW_KEYS, target_labels
from ..errors import DistillError, raise_if_any
from ..losses.objective import repeated_names
from ..models.features import Features
from ..models.model_call import input_names
from ..models.model_types import model_type_of, unwrap_model
from ..models.output_head import forget_output_head
from ..models.projectors import ProjectorConfig
from ..teachers import FrozenTeacher, MultiTeacher, Teacher
from ..teachers.input_limits import check_student_ids
from ..teachers.sharing import shared_with_teacher
from .changed_arguments import changed_arguments, objective_arguments
from .checkpoint_loading import WeightsMixin
from .checkpointing import CheckpointMixin
from .config import RUNTIME_FIELDS, DistillArguments, DistillConfig
from .distiller import Distiller
from .hub import HubMixin
from .metrics import TRAIN_STATISTICS_EVERY, MetricsMixin
from .nonfinite import NonFiniteMixin
from .nonfinite_report import MicroBatchRecord
from .self_check import SelfCheck
from .sidecar import SidecarMixin
from .signal_handling import GracefulShutdown
from .teacher_callback import TeacherCallback
from .upstream import TRAINER, check_upstream
from .validation import incompatible_arguments

logger = logging.get_logger(__name__)
check_upstream("transformers", Trainer, TRAINER)


class DistillMixin(HubMixin, CheckpointMixin, MetricsMixin, NonFiniteMixin, SidecarMixin, WeightsMixin):
    """Replaces a Trainer's loss by a distillation's; everything else stays the Trainer's.

    Without a teacher, or with alpha = 0 and no further losses, it is that Trainer, bit for bit, while all is finite.
    """

    teacher: Any
    loads_models = False  # whether `model` may be an id or a path
    _signature_columns: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *more,
        teacher: Any = None,
        teachers: Any = None,
        **kwargs,
    ):
        raise_if_any(self._wrong_arguments(model, args))
        fields = args if isinstance(args, DistillArguments) else DistillArguments()
        if teacher is not None and teachers is not None:
            raise DistillError("Both `teacher` and `teachers` were given: name all of them in `teachers`.")
        teacher = teacher if teachers is None else teachers
        given = teacher.values() if isinstance(teacher, Mapping) else [teacher]
        wanted = (
            fields.alpha > 0
            or bool(fields.losses)
            or any(isinstance(t, Teacher) and not t.provides_soft_labels for t in given)
        )
        if teacher is None and fields.losses:
            raise DistillError("`losses` are set but there is no teacher: pass `teacher=` to the trainer.")
        if teacher is None and wanted:
            logger.warning_once("No teacher: this trains on the hard labels alone. Pass `teacher=` to distil.")
        self.is_distilling = teacher is not None and wanted
        self.max_consecutive_nonfinite_steps = fields.max_consecutive_nonfinite_steps
        self.teacher = build_teacher(teacher, fields) if self.is_distilling else None
        if self.is_distilling:
            enable_zero3_gather_on_save(args)
        super().__init__(model, args, *more, **kwargs)
        self._read, self._fields = objective_arguments(self.args), fields
        if self.is_distilling:
            self._choose_direction()
            self.setup_distillation(self.teacher, fields)
        else:
            self.attach_sidecar(Features())

    def _wrong_arguments(self, model: Any, args: Any) -> list[str]:
        """Arguments of a wrong type, which a Trainer does not look at before it uses them."""
        problems = []
        if isinstance(model, str | os.PathLike) and self.loads_models:
            if reference_kind(path := os.path.expanduser(os.fspath(model))) == "path" and not path_exists(path):
                problems.append(
                    f"The student {path} is a path, and there is no such folder: correct it (relative paths start at "
                    f"{Path.cwd()}), or give the id of a repository on the Hub, such as org/name"
                )
        elif isinstance(model, str | os.PathLike):
            problems.append(
                f"model is the id or path {str(model)!r}, and {type(self).__name__} takes a model, as Trainer does: "
                "load it, for example with AutoModelForCausalLM.from_pretrained"
            )
        elif model is not None and not isinstance(model, nn.Module):
            problems.append(f"model is of the type {type(model).__name__}: give the student, a transformers model")
        if args is not None and not isinstance(args, TrainingArguments):
            problems.append(f"args is of the type {type(args).__name__}: give a DistillConfig or TrainingArguments")
        return problems

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; with `stop_on_signal` a signal ends it after the step, with a checkpoint.

        Raises:
            Interrupted: SIGTERM or SIGINT came; a `SystemExit` with the code 143 or 130.
        """
        if not getattr(self.args, "stop_on_signal", False):
            return super().train(*args, **kwargs)
        interrupts = GracefulShutdown(logger.warning, resume="train(resume_from_checkpoint=True) goes on")
        self.add_callback(interrupts)
        try:
            with interrupts.installed():
                return super().train(*args, **kwargs)
        finally:
            self.remove_callback(interrupts)

    def setup_distillation(self, teacher: Teacher, fields: DistillArguments) -> None:
        """Take this teacher and objective from now on, for training and evaluation.

        Args:
            teacher: the teacher; it is prepared here.
            fields: the objective.

        Raises:
            DistillError: teacher and student do not fit, or an argument cannot work with distillation; says why.
        """
        self.is_distilling, self.teacher = True, teacher
        raise_if_any(incompatible_arguments(self))
        self.pop_callback(TeacherCallback)
        self.add_callback(TeacherCallback(teacher, lambda: self.updated_student))
        self._prepare_teacher(teacher)
        self._set_objective(fields, renew=True)
        self.label_names = ["labels"]  # the Trainer asks the forward, which may name others or none

    def _prepare_teacher(self, teacher: Teacher) -> None:
        student = dict(self.model.named_parameters())
        trained = [name for name, p in student.items() if p.requires_grad]
        teacher.prepare(unwrap_model(self.model), self.args.device, self.processing_class)
        if shared := shared_with_teacher(self.model, trained, teacher):
            for name in trained:  # a frozen teacher froze what it shares
                student[name].requires_grad_(True)
            raise_if_any(shared)
        for name in ("train_dataset", "eval_dataset"):
            teacher.check_data(getattr(self, name), name)
        raise_if_any(teacher.check_arguments(self.args) + self._check_model_init(teacher))

    def _set_objective(self, fields: DistillArguments, renew: bool) -> None:
        """Take an objective with the prepared teacher, whose state stays.

        Args:
            fields: the objective.
            renew: whether projectors are made anew, also where the objective has the same ones.
        """
        teacher = self.teacher
        terms = teacher.adapt_objective(fields.terms(self.args.label_smoothing_factor))
        raise_if_any(repeated_names([*terms, *teacher.terms]) + teacher.incompatible_terms(terms))
        features = Features.match(
            terms,
            self.model,
            lambda term: teacher.get_teacher(term.teacher).layer_stack(term.stack),
            ProjectorConfig.of(fields.projectors),
        )
        self.distiller = Distiller(terms, fields.chunk_tokens, features)
        self._pending_self_check = fields if fields.self_check else None
        # Our loss is divided by the asked tokens of the global batch, whatever the model would do by itself.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._signature_columns: Any = None  # of the columns that a former teacher read
        self.attach_sidecar(features, teacher, renew)
        self._fields = fields

    def _hp_search_setup(self, trial: Any) -> None:
        """As the Trainer's, before each training; an objective that a trial or its user changed in `args` is taken.

        Raises:
            DistillError: something changed that cannot be taken any more.
        """
        super()._hp_search_setup(trial)
        changed = changed_arguments(self.args, self._read, self.is_distilling)
        if self.is_distilling:
            self._choose_direction()
            raise_if_any(incompatible_arguments(self) + self.teacher.check_arguments(self.args))
            self._teacher_max_grad_norm = self.teacher.max_grad_norm
        if "max_consecutive_nonfinite_steps" in changed:
            self.max_consecutive_nonfinite_steps = self.args.max_consecutive_nonfinite_steps
        fields = self._fields
        if [name for name in changed if name not in RUNTIME_FIELDS or name == "self_check"]:
            fields = self.args if isinstance(self.args, DistillArguments) else DistillArguments()
        if self.is_distilling and (changed or self.model_init is not None):  # which made a new student
            self._set_objective(fields, renew=self.model_init is not None)
        self._read = objective_arguments(self.args)

    def _check_model_init(self, teacher: Teacher) -> list[str]:
        if self.model_init is None or not teacher.tied_to_student:
            return []
        return [
            f"model_init makes a new student for each training, and a {type(teacher).__name__} is bound to one: "
            "pass model"
        ]

    def incompatible_arguments(self) -> list[str]:
        """Why this trainer cannot distil, beside what no Trainer can; see `arguments`."""
        return []

    def _set_signature_columns_if_needed(self) -> None:
        """As the Trainer's, and the columns that the teacher reads; each model is given what its forward accepts."""
        super()._set_signature_columns_if_needed()
        if self.is_distilling:
            read = self.teacher.input_names() | input_names(self.model)
            columns: Any = self._signature_columns
            self._signature_columns = [*columns, *sorted(read - {*columns})]

    def _get_num_items_in_batch(self, batch_samples, device):
        """The Trainer's count, of the tokens that the step asks."""
        if self.is_distilling:
            shift = model_type_of(self.model).shifts_labels
            batch_samples = [
                {**batch, "shift_labels": target_labels(batch, shift)} if "labels" in batch else batch
                for batch in batch_samples
            ]
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective, summed over asked tokens and divided by `num_items_in_batch`; see `Distiller`.

        Without a teacher: the Trainer's own loss. `source` of a batch is for the logs, not for models.
        """
        source, inputs = inputs.get("source"), {k: v for k, v in inputs.items() if k != "source"}
        if not self.is_distilling:
            inputs = {k: v for k, v in inputs.items() if k not in SECOND_VIEW_KEYS}
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        training = model.training
        if self._pending_self_check is not None:
            frozen = self.teacher.model if isinstance(self.teacher, FrozenTeacher) else None
            for measured in (model, *(() if frozen is None else (frozen,))):
                forget_output_head(measured)
            shift = model_type_of(self.model).shifts_labels
            self.distiller.pre_loss_hook = SelfCheck(self._pending_self_check, inputs, shift, model, frozen)
            check_student_ids(self.model, inputs)
        try:
            step = self.distiller(
                model,
                self.teacher,
                inputs,
                num_items=num_items_in_batch,
                keep_logits=self.keep_logits if not training else return_outputs,
                statistics=TRAIN_STATISTICS_EVERY if training else 1,
            )
        except IndexError:
            check_student_ids(self.model, inputs)
            raise
        self._pending_self_check = self.distiller.pre_loss_hook = None
        self.record_step(step, source, training)
        if training:
            learnt = [*(term.name for term in (*self.distiller.terms, *self.teacher.terms)), "aux", "peer_aux"]
            values = {name: step.per_token[name] for name in learnt if name in step.per_token}
            self._micro_batches.append(MicroBatchRecord(inputs, step.targets, values))
        loss = step.loss
        if training and num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, step.outputs) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; a checkpoint also gets what a moving teacher needs to go on."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.is_distilling:
            self.teacher.save(output_dir, self.args.process_index, self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Called on resume under every strategy, after the model has been loaded."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_distilling:
            self.teacher.load(checkpoint, self.args.process_index)


class DistillTrainer(DistillMixin, Trainer):
    """`transformers.Trainer` with a teacher.

    Args:
        teacher: a model, the id or path of one, or a `Teacher`; None trains without.
        teachers: several of them by name, with equal shares; a `MultiTeacher` as `teacher` weighs them.
        args: a `DistillConfig`, or plain `TrainingArguments` (then the defaults: temperature 2, alpha 0.5).
        everything else: as in `Trainer`, in its place.

    Raises:
        DistillError: teacher and student do not fit, or an argument cannot work with distillation; says why.
    """


def build_teacher(teacher: Any, fields: DistillArguments) -> Teacher:
    if isinstance(teacher, Mapping):
        problems: list[str] = []
        several = {}
        for name, one in teacher.items():
            try:
                several[name] = build_teacher(one, fields)
            except DistillError as error:
                problems.append(f"teachers[{name!r}]: {error}")
        raise_if_any(problems)
        return MultiTeacher(several)
    ways = {"deepspeed": fields.teacher_deepspeed, "fsdp": fields.teacher_fsdp}
    init_kwargs: Any = fields.teacher_init_kwargs or {}
    options = {**init_kwargs, **{name: way for name, way in ways.items() if way}}
    if not isinstance(teacher, Teacher):
        return FrozenTeacher(teacher, **options)
    if options:
        raise DistillError(
            f"{sorted(options)} of teacher_init_kwargs, teacher_deepspeed and teacher_fsdp were given beside a "
            "Teacher: give them to the Teacher itself."
        )
    return teacher


__all__ = ["DistillConfig", "DistillMixin", "DistillTrainer"]
