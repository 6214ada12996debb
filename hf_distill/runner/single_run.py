"""One student of a recipe: load, distil, train the control, evaluate all of them, leave a run folder.

The folder: `recipe.yaml` as resolved, `student/` and `control/` as `from_pretrained` loads them, `metrics.jsonl`,
`results.json`, `checkpoint-*`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)

from ..core.io import MetricsFile, count_logs, environment, held_out_metrics, read_results, write_json
from ..core.processes import run_on_main
from ..data import check_packed_attention
from ..losses import get_loss
from ..models.blocks import find_blocks
from ..models.model_types import unwrap_model
from ..recipe.schema import Recipe
from ..teachers.loading import zero3_init_context
from ..trainer.config import DistillArguments, DistillConfig
from ..trainer.trainer import DistillTrainer
from .cache_writer import check_cached, write_smoke_cache
from .checkpoint_recipe import RecipeRecord, launch_values, result_values
from .datasets import num_training_rows, prepare_data
from .distributed import check_same_on_all_ranks
from .early_stopping import EarlyStopping
from .export import NullTeacher, export_teachers, teacher_metrics
from .model_factory import ModelFactory, check_launch
from .model_loading import load_pretrained, resolve_model
from .on_policy import prepare_prompts
from .provenance import provenance
from .run_dir import run_folder
from .training_arguments import arguments
from .watchdog import HangWatchdog


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, and the metrics of each model ("before", "student", "control")."""

    folder: Path
    models: dict[str, dict[str, float]]


def run_single(
    recipe: Recipe, resume: bool, callbacks: Sequence[TrainerCallback], on_stage: Callable[[str], None]
) -> RunResult:
    """Run a recipe without stages; see `run_recipe`."""
    check_launch(recipe)
    args = arguments(recipe)
    watch = HangWatchdog(args.ddp_timeout)
    with run_folder(recipe, resume) as folder:
        evidence = read_results(folder / "results.json") if resume else {}
        models = evidence.setdefault("models", {})
        if evidence.get("status") == "done":
            on_stage("This run is over already.")
            return RunResult(folder, models)
        with watch.kept():
            write_smoke_cache(recipe, on_stage)
            record = RecipeRecord(result_values(recipe) | launch_values())
            return _run(RunContext(recipe, args, folder, [*callbacks, watch, record], on_stage), evidence)


def _run(run: "RunContext", evidence: dict[str, Any]) -> RunResult:
    """Train and measure what is missing in the evidence."""
    recipe, folder, models = run.recipe, run.folder, evidence["models"]

    def keep(**found: dict[str, float]) -> None:
        models.update(found)
        evidence.update(run.facts)
        evidence["steps"] = evidence.get("steps", {}) | run.steps
        run_on_main(write)

    def write() -> None:
        evidence["log_lines"] = count_logs(folder / "metrics.jsonl")
        write_json(folder / "results.json", evidence)

    if "student" not in models:
        before, student = run.distil()
        keep(before=before, student=student, **teacher_metrics(recipe, student))
    if recipe.control and "control" not in models:
        run.on_stage("Training the control on hard labels alone")
        keep(control=run.control())
    evidence["status"] = "done"
    keep()
    return RunResult(folder, models)


class RunContext:
    """A recipe's models, data and arguments, loaded."""

    def __init__(self, recipe: Recipe, args: DistillConfig, folder: Path, callbacks: list, on_stage):
        self.folder, self.args, self.callbacks, self.on_stage = folder, args, callbacks, on_stage
        self.merges = recipe.export == "merged"
        set_seed(args.seed)
        on_stage(f"Loading {recipe.tokenizer_model}")
        with args.main_process_first():
            path = resolve_model(recipe.tokenizer_model)
        self.tokenizer: Any = load_pretrained(AutoTokenizer, path, revision=recipe.tokenizer_revision)
        count = num_training_rows(args)
        with args.main_process_first():
            self.data = prepare_data(recipe, self.tokenizer, args.seed, count)
            self.prompts = prepare_prompts(recipe, self.tokenizer, args.seed, count) if recipe.on_policy else None
        self.recipe = recipe
        self.steps: dict[str, int] = {}  # by training: the step of the model that it left
        made = environment(str(args.device)) | {"processes": args.world_size}
        self.facts: dict[str, Any] = {"environment": made, "data": self.data.facts()}
        check_same_on_all_ranks(recipe, self.facts)
        self.models = ModelFactory(recipe, args, path, self.tokenizer)
        if args.should_save:
            self.facts |= {"provenance": provenance(recipe)} | ({"origin": recipe.origin} if recipe.origin else {})

    def trainer(self, name: str, on_policy: bool = False, **changes) -> DistillTrainer:
        """A trainer of a new student, with some arguments changed; its logs go to metrics.jsonl under that name."""
        args = arguments(self.recipe, on_policy=True) if on_policy else copy.deepcopy(self.args)
        for key, value in {"output_dir": str(self.folder / ("" if name == "student" else name)), **changes}.items():
            setattr(args, key, value)
        args.remove_unused_columns = False  # rows have what the collator reads, and nothing else
        if isinstance(self.data.train, IterableDataset) and args.accelerator_config.dispatch_batches is None:
            args.accelerator_config.dispatch_batches = False  # else batches of different lengths would be joined
        kind: Any = DistillTrainer
        rows = {"train_dataset": self.data.train, "data_collator": self.data.collator}
        if on_policy:
            from ..trl import OnPolicyDistillTrainer as kind

            rows = {"train_dataset": self.prompts}
        trainer = kind(
            self.models.student(self.data.train),
            args,
            teacher=None if name == "control" else self.models.teacher,
            eval_dataset=self.data.held_out,
            **rows,
            processing_class=self.tokenizer,
            callbacks=[MetricsFile(self.folder / "metrics.jsonl", name), *self._stopping(), *self.callbacks],
        )
        self.args.deepspeed_plugin = None  # accelerate keeps the first trainer's, and refuses another
        trainer.sources = self.data.collator.sources
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if trainer.teacher is not None:
            check_cached(trainer.teacher, self.recipe, self.data, shift=True)
        if self.recipe.data.packing:
            with trainer.accelerator.autocast():
                check_packed_attention(trainer.model, "student")
            if trainer.teacher is not None and trainer.teacher.model is not None:
                check_packed_attention(trainer.teacher.model, "teacher")
        return trainer

    def _stopping(self) -> list[TrainerCallback]:
        patience = self.recipe.train.early_stopping_patience
        return [EarlyStopping(patience)] if patience else []

    def train(self, trainer: DistillTrainer, name: str) -> float:
        """Train and save `RUN/name`; seconds that it took."""
        checkpoint = trainer.newest_checkpoint()
        trainer.args.eval_on_start = name == "student" and checkpoint is None
        self.on_stage(
            f"{name}: from step {checkpoint.name.rpartition('-')[2] if checkpoint else 0} of {trainer.args.max_steps}"
        )
        set_seed(self.args.seed)  # equal data order for student and control
        output = trainer.train(None if checkpoint is None else str(checkpoint))
        trainer.save_model(str(self.folder / name))
        best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
        self.steps[name] = best or trainer.state.global_step
        if self.merges:
            self.on_stage(f"{name}: merging its adapters")
            run_on_main(lambda: self.models.merge(self.folder / name, self.data.train))
        return output.metrics["train_runtime"]

    def distil(self) -> tuple[dict[str, float], dict[str, float]]:
        """Train the student; its metrics before and after, with the projectors that it was trained with."""
        trainer = self.trainer("student", on_policy=self.recipe.on_policy is not None)
        self.on_stage("Distilling")
        seconds = self.train(trainer, "student")
        before = next(log for log in trainer.state.log_history if "eval_loss" in log)
        if not trainer.is_distilling:  # a recipe with alpha 0
            trainer.setup_distillation(self.models.teacher, self._objective())
        self._describe(trainer)
        after = held_out_metrics(trainer.evaluate())
        export_teachers(trainer, self.recipe.export, self.folder)
        return held_out_metrics(before), {**after, "train_seconds": seconds}

    def _objective(self, **changes) -> DistillArguments:
        return DistillArguments(
            **{field.name: getattr(self.args, field.name) for field in fields(DistillArguments)} | changes
        )

    def _describe(self, trainer: DistillTrainer) -> None:
        self.facts |= {"student": _size(trainer.model)}
        if trainer.teacher.model is not None:
            self.facts["teacher"] = _size(trainer.teacher.model)
        if self.models.caches:
            self.facts["caches"] = self.models.caches
        if self.models.layers is not None:
            self.facts["student"]["layers_kept"] = self.models.layers
        if self.models.influence is not None:
            self.facts.setdefault("teacher", {})["block_influence"] = self.models.influence

    def control(self) -> dict[str, float]:
        """Train on hard labels alone; its metrics under the recipe's objective, without the terms on features.

        Beside a teacher that moved with another student, its metrics of the labels alone.
        """
        changes: dict[str, Any] = {"alpha": 0.0, "losses": None}
        if self.args.load_best_model_at_end:  # without a teacher there is no KL to judge by
            changes |= {"metric_for_best_model": "loss", "greater_is_better": False}
        trainer = self.trainer("control", **changes)
        seconds = self.train(trainer, "control")
        losses: Any = self.args.losses or ()
        losses = [spec for spec in losses if get_loss(spec["name"]).feature is None]
        if self.recipe.kinds <= {"frozen", "adapter_base", "cached"}:
            trainer.setup_distillation(self.models.teacher, self._objective(losses=losses or None))
        else:
            trainer.setup_distillation(NullTeacher(), self._objective(alpha=0.0, losses=None))
        return {**held_out_metrics(trainer.evaluate()), "train_seconds": seconds}


def _size(model: nn.Module) -> dict[str, Any]:
    """Of the whole model, however it is held, adapters aside."""
    config = unwrap_model(model).config
    with zero3_init_context(None), torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    return {"parameters": sum(p.numel() for p in whole.parameters()), "blocks": len(find_blocks(whole)[1])}
