"""Runs a recipe with one student: loads, distills, trains the control, evaluates, and writes the run folder.

The run folder holds the resolved `recipe.yaml`, the models `student/` and `control/`, which `from_pretrained` loads (of
a quantized student also the weights in full precision, `student-unquantized/`),
`metrics.jsonl`, `results.json` and `checkpoint-*`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from datasets import IterableDataset
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from transformers.trainer_pt_utils import AcceleratorConfig

from ..core import run_files
from ..core.io import MetricsFile, count_logs, environment, held_out_metrics, read_results, write_json
from ..core.processes import run_on_main
from ..core.results import Metrics, ModelFacts, Results
from ..losses import get_loss
from ..models.model_types import unwrap_model
from ..models.quantized_training import prepare_quantized_student
from ..recipe.schema import Recipe
from ..teachers import NullTeacher
from ..teachers.loading import env_world_size, zero3_init_context
from ..trainer.config import DistillArguments, DistillConfig
from ..trainer.packed_batches import PackedAttentionCheck
from ..trainer.trainer import DistillTrainer
from .cache_writer import check_cached, write_smoke_cache
from .checkpoint_recipe import RecipeRecord, check_same_content, content_values, launch_values, result_values
from .datasets import num_training_rows, prepare_data
from .distributed import check_same_on_all_ranks, main_process_first
from .early_stopping import EarlyStopping
from .export import export_teachers, teacher_metrics
from .generated_sources import record_generated_data
from .model_factory import ModelFactory, check_launch
from .model_loading import load_teacher_tokenizers, model_without_weights, resolve_model
from .on_policy import prepare_prompts
from .provenance import provenance
from .quantized_student import FULL_PRECISION, export_quantized, scheme_of, weights_folder
from .run_dir import run_folder
from .tasks import task_of
from .training_arguments import arguments
from .trimmed_rows import bits_per_byte, with_bits_per_byte
from .watchdog import HangWatchdog


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: The run folder.
        models: Metrics of each model: "before" (the initial student), "student", "control" and others.
    """

    folder: Path
    models: dict[str, Metrics]


def run_single(
    recipe: Recipe,
    resume: bool,
    callbacks: Sequence[TrainerCallback],
    on_stage: Callable[[str], None],
    generate: Callable[[], object] = lambda: None,
) -> RunResult:
    """Run a recipe without stages; see `run_recipe`.

    Args:
        recipe: The recipe.
        resume: Whether to resume.
        callbacks: Callbacks for the trainers.
        on_stage: Called with a short description of each stage.
        generate: Generates the data, when the folder is locked and before anything is loaded.
    """
    check_launch(recipe)
    args = arguments(recipe)
    is_spread = any(spec.device_map for spec in recipe.all_teachers)
    if env_world_size() == 0 and not is_spread and (count := torch.accelerator.device_count()) > 1:
        on_stage(
            f"The student is trained on {args.device}, one of {count}: `torchrun --nproc_per_node {count} -m "
            "hf_distill run RECIPE` trains on all of them"
        )
    watch = HangWatchdog(args.ddp_timeout)
    with run_folder(recipe, resume) as folder:
        evidence = read_results(folder / run_files.RESULTS) if resume else {}
        models = evidence.setdefault("models", {})
        if evidence.get("status") == "done":
            on_stage("This run is complete already.")
            return RunResult(folder, models)
        generate()
        with watch.running():
            write_smoke_cache(recipe, on_stage)
            return _run(RunContext(recipe, args, folder, [*callbacks, watch], on_stage), evidence)


def _run(run: "RunContext", evidence: Results) -> RunResult:
    """Train and evaluate the models that results.json does not have yet."""
    recipe, folder, models = run.recipe, run.folder, evidence["models"]

    def record_results(**metrics: Metrics) -> None:
        models.update(metrics)
        evidence.update(run.facts)
        evidence["steps"] = evidence.get("steps", {}) | run.steps
        run_on_main(write)

    def write() -> None:
        record_generated_data(recipe, folder)
        evidence["log_lines"] = count_logs(folder / run_files.METRICS)
        write_json(folder / run_files.RESULTS, evidence)

    if "student" not in models:
        before, student = run.distill()
        record_results(before=before, student=student, **teacher_metrics(recipe, student))
    if recipe.control == FULL_PRECISION:
        if FULL_PRECISION not in models:
            run.on_stage("Training the same student in full precision")
            full_precision, quantized_after = run.full_precision()
            record_results(full_precision=full_precision, quantized_after=quantized_after)
    elif recipe.control and "control" not in models:
        run.on_stage(f"Training the control on the hard labels {_labels_of_control(recipe)}")
        record_results(control=run.control())
    evidence["status"] = "done"
    record_results()
    return RunResult(folder, models)


def _labels_of_control(recipe: Recipe) -> str:
    return "of the data's completions" if recipe.control == "sft_on_data" else "only"


class RunContext:
    """The loaded models, data and arguments of a recipe."""

    def __init__(
        self,
        recipe: Recipe,
        args: DistillConfig,
        folder: Path,
        callbacks: Sequence[TrainerCallback],
        on_stage: Callable[[str], None],
    ):
        self.folder, self.args, self.callbacks, self.on_stage = folder, args, callbacks, on_stage
        self.merges = recipe.export == "merged"
        self.scheme = scheme_of(recipe)
        set_seed(args.seed)
        on_stage(f"Loading {recipe.tokenizer_model}")
        with main_process_first(args):
            path = resolve_model(recipe.tokenizer_model)
        self.task = task_of(recipe)
        processor = self.task.load_processor()
        count = num_training_rows(args)
        with main_process_first(args):
            self.processor = self.task.student_processor(processor, args.seed, count)
            other_tokenizers = load_teacher_tokenizers(recipe)
            self.data = self.task.prepare_data(self.processor, args.seed, count, other_tokenizers)
            self.prompts = prepare_prompts(recipe, self.processor, args.seed, count) if recipe.on_policy else None
            self.control_data = self.data
            if recipe.control == "sft_on_data":
                self.control_data = prepare_data(
                    recipe,
                    self.processor,
                    args.seed,
                    count,
                    other_tokenizers,
                    of_data=True,
                    trimming=self.task.trimming,
                )
        # Perplexities of other vocabularies are not comparable.
        self._bits = bits_per_byte(self.data.held_out, self.processor) if self.task.trimming else None
        self.recipe = recipe
        self.steps: dict[str, int] = {}  # training -> step of the exported model
        self.record = RecipeRecord(result_values(recipe) | launch_values())
        run_environment = environment(str(args.device)) | {"processes": args.world_size}
        self.facts: Results = {"environment": run_environment, "data": self.data.facts()}
        check_same_on_all_ranks(recipe, self.facts)
        self.models = ModelFactory(recipe, self.task, args, path, self.processor, other_tokenizers)
        if self.models.pruner is not None:
            self.models.pruner.load(folder)
        if args.should_save:
            self.facts["provenance"] = provenance(recipe)
            if recipe.origin:
                self.facts["origin"] = recipe.origin

    def trainer(
        self, name: str, on_policy: bool = False, changes: Mapping[str, object] = MappingProxyType({})
    ) -> DistillTrainer:
        """Build a trainer for a new student.

        Args:
            name: Name of the training in metrics.jsonl: "student", "control" or "full_precision".
            on_policy: Whether the student trains on its own completions.
            changes: Training arguments that differ from those of the recipe, by name.
        """
        args = arguments(self.recipe, on_policy=True) if on_policy else copy.deepcopy(self.args)
        for key, value in {"output_dir": str(self.folder / ("" if name == "student" else name)), **changes}.items():
            setattr(args, key, value)
        args.remove_unused_columns = False  # the rows have only the columns that the collator reads
        assert isinstance(args.accelerator_config, AcceleratorConfig)
        if isinstance(self.data.train, IterableDataset) and args.accelerator_config.dispatch_batches is None:
            # Dispatching would concatenate batches of different lengths.
            args.accelerator_config.dispatch_batches = False
        kind: Callable[..., DistillTrainer] = self.task.trainer_class
        data = self.control_data if name == "control" else self.data
        rows = {"train_dataset": data.train, "data_collator": data.collator}
        if on_policy:
            from ..trl import OnPolicyDistillTrainer as kind

            rows = {"train_dataset": self.prompts}
        student = self.models.student(self.data.train, quantize=name != FULL_PRECISION)
        trainer = kind(
            student,
            args,
            teacher=None if name == "control" else self.models.teacher,
            eval_dataset=self.data.held_out,
            **rows,
            processing_class=self.processor,
            callbacks=[
                MetricsFile(self.folder / run_files.METRICS, name),
                *self._stopping(),
                *self.callbacks,
                self.record,
            ],
        )
        self.args.deepspeed_plugin = None  # accelerate keeps that of the first trainer and refuses a second one
        trainer.sources = self.data.collator.sources
        trainer.drops_teacher_inputs |= name == "control"
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if trainer.teacher is not None:
            check_cached(trainer.teacher, self.recipe, self.data, shift=True)
        if self.recipe.data.packing:
            trainer.add_callback(PackedAttentionCheck(trainer))
        return trainer

    def _stopping(self) -> list[TrainerCallback]:
        patience = self.recipe.train.early_stopping_patience
        return [EarlyStopping(patience)] if patience else []

    def train(self, trainer: DistillTrainer, name: str) -> float:
        """Train a student and save it as RUN/name; return the training time in seconds."""
        checkpoint = trainer.newest_checkpoint()
        has_own_data = name == "control" and self.control_data is not self.data
        data = self.control_data.facts() if has_own_data else self.facts["data"]
        content = content_values(data, trainer.teacher, trainer.model if self.recipe.student.lora else None)
        if checkpoint is not None:
            check_same_content(checkpoint, content)
        self.record.values |= content
        trainer.args.eval_on_start = name == "student" and checkpoint is None
        self.on_stage(
            f"{name}: from step {checkpoint.name.rpartition('-')[2] if checkpoint else 0} of {trainer.args.max_steps}"
        )
        set_seed(self.args.seed)  # the same order of rows for student and control
        output = trainer.train(None if checkpoint is None else str(checkpoint))
        trained = weights_folder(self.folder, name, self.scheme)
        trainer.save_model(str(trained))
        best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
        self.steps[name] = best or trainer.state.global_step
        if self.merges:
            self.on_stage(f"{name}: merging the adapters")
            run_on_main(lambda: self.models.merge(self.folder / name, self.data.train))
        if self.scheme and (exported := self.folder / name) != trained:
            self.on_stage(f"{name}: quantizing as {self.scheme.description}")
            run_on_main(partial(export_quantized, self.task.auto_class, trained, exported, self.scheme))
        return output.metrics["train_runtime"]

    def held_out_metrics(self, evaluation: dict[str, float]) -> Metrics:
        """Return the metrics of an evaluation; of a student with a trimmed vocabulary also bits per byte."""
        return with_bits_per_byte(held_out_metrics(evaluation), self._bits)

    def distill(self) -> tuple[Metrics, Metrics]:
        """Train the student; return its held-out metrics before and after the training."""
        trainer = self.trainer("student", on_policy=self.recipe.on_policy is not None)
        if (pruner := self.models.pruner) is not None:
            run_on_main(lambda: pruner.save(self.folder))
        self.on_stage("Distilling")
        seconds = self.train(trainer, "student")
        before = next(log for log in trainer.state.log_history if "eval_loss" in log)
        self._add_teacher(trainer)
        self.describe(trainer)
        after = self.held_out_metrics(trainer.evaluate())
        export_teachers(trainer, self.recipe.export, self.folder)
        return self.held_out_metrics(before), {**after, "train_seconds": seconds}

    def full_precision(self) -> tuple[Metrics, Metrics]:
        """Distill the student without quantization; return its held-out metrics, and those with quantized weights."""
        assert self.scheme is not None
        trainer = self.trainer(FULL_PRECISION, on_policy=self.recipe.on_policy is not None)
        seconds = self.train(trainer, FULL_PRECISION)
        self._add_teacher(trainer)
        full = self.held_out_metrics(trainer.evaluate())
        assert trainer.model is not None
        prepare_quantized_student(trainer.model, self.scheme)
        return {**full, "train_seconds": seconds}, self.held_out_metrics(trainer.evaluate())

    def _add_teacher(self, trainer: DistillTrainer) -> None:
        """Let a trainer evaluate with the teacher if it trained without, because alpha is 0."""
        if not trainer.is_distilling or isinstance(trainer.teacher, NullTeacher):
            trainer.setup_distillation(self.models.teacher, self._objective())

    def _objective(self, **changes: object) -> DistillArguments:
        values = {field.name: getattr(self.args, field.name) for field in fields(DistillArguments)}
        return DistillArguments(**values | changes)

    def describe(self, trainer: DistillTrainer) -> None:
        """Add the sizes of student and teacher, and what the student was pruned to, to the facts of the run."""
        assert trainer.model is not None
        self.facts["student"] = self._size(trainer.model)
        if trainer.teacher.model is not None:
            self.facts["teacher"] = self._size(trainer.teacher.model)
        if self.models.caches:
            self.facts["caches"] = self.models.caches
        if self.models.remote_teachers:
            self.facts["servers"] = {name: teacher.summary() for name, teacher in self.models.remote_teachers.items()}
        cut = self.models.cut_facts.copy()
        if influence := cut.pop("block_influence", None):
            self.facts.setdefault("teacher", {})["block_influence"] = influence
        self.facts["student"] |= cut
        if self.scheme:
            self.facts["student"]["quantization"] = self.scheme.description

    def _size(self, model: nn.Module) -> ModelFacts:
        """Return the size of the full model, without adapters, however it is quantized or sharded."""
        config = unwrap_model(model).config
        with zero3_init_context(None):
            full_model = model_without_weights(self.task.auto_class, config)
        parameters = sum(p.numel() for p in full_model.parameters())
        return {"parameters": parameters, "layers": self.task.num_layers(full_model)}

    def control(self) -> Metrics:
        """Train the control on the hard labels only, and return its held-out metrics.

        They are computed with the objective of the recipe, without the losses on features. If the teacher changed
        during the training of the student, they are those of the hard labels only.
        """
        changes: dict[str, object] = {"alpha": 0.0, "losses": None, "by_origin": None, "compile_teacher": False}
        if self.args.load_best_model_at_end:  # without a teacher there is no KL to select the best checkpoint by
            changes |= {"metric_for_best_model": "loss", "greater_is_better": False}
        trainer = self.trainer("control", changes=changes)
        seconds = self.train(trainer, "control")
        losses = [spec.model_dump(exclude_none=True) for spec in self.recipe.losses]
        losses = [spec for spec in losses if get_loss(spec["name"]).feature is None]
        if self.recipe.kinds <= {"frozen", "adapter_base", "cached", "remote"}:
            trainer.setup_distillation(self.models.teacher, self._objective(losses=losses or None))
        else:
            trainer.setup_distillation(NullTeacher(), self._objective(alpha=0.0, losses=None, by_origin=None))
        return {**self.held_out_metrics(trainer.evaluate()), "train_seconds": seconds}
