"""Run a recipe: load, distil, train the control, evaluate all of them, leave a run folder.

The folder: `recipe.yaml` as resolved, `student/` and `control/` as `from_pretrained` loads them, `metrics.jsonl`,
`evidence.json`, `checkpoint-*`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging

from ..config import DistillConfig
from ..data import causal_rows, hold_out, load_documents
from ..evidence import MetricsFile, environment, read_json, write_json
from ..losses import get_loss
from ..student import block_influence, cut_student, find_blocks, most_influential
from ..teachers import FrozenTeacher
from ..trainer import DistillTrainer
from .folder import claim, newest_checkpoint
from .models import resolve_model
from .schema import Recipe, Student, TeacherSpec

logger = logging.get_logger(__name__)
_CALIBRATION_ROWS = 8


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, and the metrics of each model ("before", "student", "control")."""

    folder: Path
    models: dict[str, dict[str, float]]


def run_recipe(
    recipe: Recipe,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    on_stage: Callable[[str], None] = logger.info,
) -> RunResult:
    """Run a recipe from loading to evidence.

    Args:
        recipe: see `load_recipe`.
        resume: go on from the newest whole checkpoint of the recipe's run folder; start afresh if there is none.
        callbacks: for the trainers.
        on_stage: told in a few words what begins.

    Returns:
        the run's folder and metrics.

    Raises:
        DistillError: the folder holds another run, or an input is wrong.
    """
    folder = claim(recipe, resume)
    evidence = read_json(folder / "evidence.json") if resume else {}
    models = evidence.setdefault("models", {})
    if evidence.get("status") == "done":
        on_stage("This run is over already.")
        return RunResult(folder, models)
    run = _Run(recipe, folder, list(callbacks), on_stage)
    evidence |= run.describe()

    def keep(name: str, metrics: dict[str, float]) -> None:
        models[name] = metrics
        if run.args.should_save:
            write_json(folder / "evidence.json", evidence)

    if "before" not in models:
        on_stage("Evaluating teacher and student")
        keep("before", run.evaluate(run.trainer(run.student, "evaluation", output_dir=str(folder))))
    initial = copy.deepcopy(run.student) if recipe.control else None
    if "student" not in models:
        on_stage("Distilling")
        keep("student", run.distil())
    if initial is not None and "control" not in models:
        on_stage("Training the control on hard labels alone")
        keep("control", run.control(initial))
    evidence["status"] = "done"
    keep("student", models["student"])
    return RunResult(folder, models)


class _Run:
    """A recipe's models, data and arguments, loaded."""

    def __init__(self, recipe: Recipe, folder: Path, callbacks: list, on_stage: Callable[[str], None]):
        self.folder, self.callbacks, self.on_stage = folder, callbacks, on_stage
        train = recipe.train.model_dump(exclude_unset=True)
        losses = [loss.model_dump() for loss in recipe.losses]
        projectors = recipe.model_dump(include={"projectors"})["projectors"]
        distill = recipe.distill.model_dump()
        self.args = DistillConfig(**train, **distill, losses=losses or None, projectors=projectors)
        self.args.dataloader_pin_memory &= torch.accelerator.is_available()
        set_seed(self.args.seed)
        spec = recipe.teacher
        on_stage(f"Loading {spec.model}")
        path = resolve_model(spec.model)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, revision=spec.revision)
        self.train_rows, self.eval_rows = self._rows(recipe)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=spec.dtype, **_loading(spec)).to(self.args.device)
        self.teacher = FrozenTeacher(model, processing_class=self.tokenizer)
        self.influence: list[float] | None = None
        self.student = self._student(recipe, model)

    def _rows(self, recipe: Recipe) -> tuple[Any, Any]:
        data = recipe.data
        documents = load_documents(**data.task.model_dump())
        if data.eval.holdout:
            documents, held_out = hold_out(documents, data.eval.holdout, self.args.seed)
        else:
            held_out = load_documents(**data.eval.model_dump(exclude={"holdout", "max_rows"}))
        rows = causal_rows(documents, self.tokenizer, data.max_length)
        eval_rows = causal_rows(held_out, self.tokenizer, data.max_length)
        return rows, eval_rows.select(range(min(len(eval_rows), data.eval.max_rows or len(eval_rows))))

    def _student(self, recipe: Recipe, teacher: nn.Module) -> nn.Module:
        spec = recipe.student
        cut = spec.from_teacher
        if cut is None:
            path = resolve_model(str(spec.model))
            return AutoModelForCausalLM.from_pretrained(path, dtype="float32", **_loading(spec))
        layers = cut.layers or []
        if cut.keep_layers is not None:
            self.on_stage("Measuring the influence of each block")
            rows = self.train_rows.select(range(min(_CALIBRATION_ROWS, len(self.train_rows))))
            self.influence = block_influence(teacher, (default_data_collator([row]) for row in rows))
            layers = most_influential(self.influence, cut.keep_layers)
        self.layers = layers
        student = cut_student(teacher, layers).float()
        if spec.attn_implementation:
            student.set_attn_implementation(spec.attn_implementation)
        return student

    def trainer(self, model: nn.Module, name: str, **changes) -> DistillTrainer:
        """A trainer with some arguments changed; its logs go to metrics.jsonl under that name."""
        folder = self.folder if name == "student" else self.folder / name
        args = copy.deepcopy(self.args)
        for key, value in {"output_dir": str(folder), **changes}.items():
            setattr(args, key, value)
        trainer = DistillTrainer(
            model,
            args,
            teacher=self.teacher,
            train_dataset=self.train_rows,
            eval_dataset=self.eval_rows,
            data_collator=default_data_collator,
            processing_class=self.tokenizer,
            callbacks=[MetricsFile(self.folder / "metrics.jsonl", name), *self.callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        return trainer

    def evaluate(self, trainer: DistillTrainer) -> dict[str, float]:
        """Held-out metrics, without the `eval_` prefix."""
        metrics = trainer.evaluate()
        timing = ("runtime", "per_second", "preparation_time")
        return {k.removeprefix("eval_"): v for k, v in metrics.items() if not k.endswith(timing)}

    def train(self, trainer: DistillTrainer, name: str) -> float:
        """Train and save `RUN/name`; seconds that it took."""
        checkpoint = newest_checkpoint(Path(trainer.args.output_dir))
        self.on_stage(
            f"{name}: from step {checkpoint.rpartition('-')[2] if checkpoint else 0} of {trainer.args.max_steps}"
        )
        set_seed(self.args.seed)  # equal data order for student and control
        output = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(self.folder / name))
        return output.metrics["train_runtime"]

    def distil(self) -> dict[str, float]:
        """Train the student; its metrics, with the projectors that it was trained with."""
        trainer = self.trainer(self.student, "student")
        seconds = self.train(trainer, "student")
        return {**self.evaluate(trainer), "train_seconds": seconds}

    def control(self, model: nn.Module) -> dict[str, float]:
        """Train on hard labels alone; its metrics under the recipe's objective, without the terms on features."""
        seconds = self.train(self.trainer(model, "control", alpha=0.0, losses=None), "control")
        losses: Any = self.args.losses or ()
        losses = [spec for spec in losses if get_loss(spec["name"]).feature is None]
        trainer = self.trainer(model, "evaluation", output_dir=str(self.folder), losses=losses or None)
        return {**self.evaluate(trainer), "train_seconds": seconds}

    def describe(self) -> dict[str, Any]:
        """What evidence says beside the metrics."""
        facts: dict[str, Any] = {
            "environment": environment(str(self.args.device)),
            "teacher": _size(self.teacher.model),
            "student": _size(self.student),
            "data": {
                "train_rows": len(self.train_rows),
                "eval_rows": len(self.eval_rows),
                "tokens_per_row": len(self.train_rows[0]["input_ids"]),
            },
        }
        if hasattr(self, "layers"):
            facts["student"]["layers_kept"] = self.layers
        if self.influence is not None:
            facts["teacher"]["block_influence"] = self.influence
        return facts


def _loading(spec: Student | TeacherSpec) -> dict[str, Any]:
    """Arguments of from_pretrained; what is not given is left to it."""
    given = {"revision": spec.revision, "attn_implementation": spec.attn_implementation}
    return {key: value for key, value in given.items() if value is not None}


def _size(model: nn.Module) -> dict[str, int]:
    return {"parameters": sum(p.numel() for p in model.parameters()), "blocks": len(find_blocks(model)[1])}
