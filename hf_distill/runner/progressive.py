"""A chain of students, each the next one's teacher: progressive distillation (1902.03393).

The folder: `stage-1`, `stage-2`, ... and `direct`, each the folder of a run; `student/` and `control/`, the last
student and the one that was taught directly; `recipe.yaml`, `metrics.jsonl`, `results.json` of the whole.
"""

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PrinterCallback, ProgressCallback, TrainerCallback

from ..core.io import count_logs, held_out_metrics, read_logs, read_results, write_json
from ..core.processes import run_on_main
from ..recipe.load import validate
from ..recipe.schema import Recipe
from ..recipe.stages import direct_values, stage_values
from ..teachers.loading import env_world_size
from ..trainer.trainer import DistillTrainer
from .run_dir import run_folder
from .single_run import RunResult, run_single
from .teacher_only import load_teacher_and_data, static_teacher_spec
from .training_arguments import arguments
from .watchdog import HangWatchdog

_PATIENCE = 1800  # seconds that a process may wait for others, if the recipe does not say


def run_chain(
    recipe: Recipe, resume: bool, callbacks: Sequence[TrainerCallback], on_stage: Callable[[str], None]
) -> RunResult:
    """Run the stages of a recipe one after another; see `run_recipe`.

    Each stage is a run of its own, with a folder of its own, and is resumed as one. What it loaded is freed before the
    next begins. In the end all students are compared with the first teacher.

    Raises:
        DistillError: see `run_recipe`.
    """
    parts = dict(_parts(recipe))
    if env_world_size():
        arguments(parts["stage-1"])  # lets the processes find each other, before one of them claims the folder for all
    with run_folder(recipe, resume) as folder:
        evidence = read_results(folder / "results.json") if resume else {}
        if evidence.get("status") == "done":
            on_stage("This chain is over already.")
            return RunResult(folder, evidence["models"])
        for name, part in parts.items():
            on_stage(f"{name}: {_told(part)}")
            run_single(part, True, callbacks, on_stage)
            gc.collect()  # a trainer and its callbacks hold each other, and with them both models
        students = {name: Path(part.train.output_dir) / "student" for name, part in parts.items()}
        with HangWatchdog(parts["stage-1"].train.ddp_timeout or _PATIENCE).kept():
            models = _compared(recipe, students, on_stage)
            run_on_main(lambda: _leave(recipe, folder, parts, models))
        return RunResult(folder, models)


def _parts(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """The runs of a chain, in order."""
    values = recipe.model_dump(exclude_none=True, exclude_unset=True)
    for number in range(1, len(recipe.stages) + 1):
        yield f"stage-{number}", validate(stage_values(values, number))
    if recipe.control == "direct":
        yield "direct", validate(direct_values(values))


def _told(recipe: Recipe) -> str:
    cut = recipe.student.from_teacher
    made = f"{cut.keep_layers or len(cut.layers or ())} blocks" if cut else str(recipe.student.model)
    return f"{recipe.tokenizer_model} into {made}"


def _compared(
    recipe: Recipe, students: dict[str, Path], on_stage: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Held-out metrics of every student beside the first teacher, the last one as "student", direct as "control"."""
    on_stage("Comparing all students with the first teacher")
    teacher, data, tokenizer, args = load_teacher_and_data(recipe, static_teacher_spec(recipe), on_stage)
    args.report_to, args.deepspeed_plugin, found = [], None, {}
    args.remove_unused_columns = False
    names = {f"stage-{len(recipe.stages)}": "student", "direct": "control"}
    for name, folder in students.items():
        trainer = DistillTrainer(
            AutoModelForCausalLM.from_pretrained(folder),
            args,
            teacher=teacher,
            eval_dataset=data.held_out,
            data_collator=data.collator,
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        found[names.get(name, name)] = held_out_metrics(trainer.evaluate())
    return found


def _stage_facts(name: str, recipe: Recipe, evidence: dict[str, Any]) -> dict[str, Any]:
    """What a stage was, and how close its student came to its own teacher."""
    student = evidence["models"]["student"]
    steps = recipe.train.max_steps
    return {
        "stage": name,
        "teacher": recipe.tokenizer_model,
        "student": evidence["student"],
        "steps": steps,
        "train_seconds": student["train_seconds"],
        "before": evidence["models"]["before"],
        "after": student,
    }


def _leave(recipe: Recipe, folder: Path, parts: dict[str, Recipe], models: dict[str, dict[str, float]]) -> None:
    """Write what a run leaves: the last student and the control, by hard links, all logs, the evidence."""
    last = f"stage-{len(recipe.stages)}"
    names, logs, facts = {last: "student", "direct": "control"}, [], {}
    for name in parts:
        facts[name] = read_results(folder / name / "results.json")
        if name in names:
            _link(folder / name / "student", folder / names[name])
        for log in read_logs(folder / name / "metrics.jsonl"):
            logs.append(json.dumps(log | {"run": names.get(name, name)}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(logs))
    chain = [_stage_facts(name, part, facts[name]) for name, part in parts.items()]
    kept = ("environment", "data", "teacher", "provenance", "origin")
    whole = {key: facts["stage-1"][key] for key in kept if key in facts["stage-1"]}
    student = {k: v for k, v in facts[last]["student"].items() if k != "layers_kept"}
    stages = [facts[f"stage-{n}"]["student"] for n in range(1, len(parts) + 1) if f"stage-{n}" in facts]
    if layers := _compose_kept_layers([stage.get("layers_kept") for stage in stages]):
        student["layers_kept"] = layers
    evidence = {"models": models, "chain": chain, **whole, "student": student, "status": "done"}
    evidence["log_lines"] = count_logs(folder / "metrics.jsonl")
    write_json(folder / "results.json", evidence)


def _link(source: Path, target: Path) -> None:
    """A copy of a folder by hard links, complete or not there; one that is there is of this chain and stays."""
    if target.is_dir():
        return
    half = target.with_name(f"{target.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(source, half, copy_function=os.link)
    half.rename(target)


def _compose_kept_layers(kept: Sequence[list[int] | None]) -> list[int] | None:
    """Which of the first teacher's blocks the last student is made of; None where a stage began with another model."""
    if None in kept:
        return None
    left = [*(kept[0] or ())]
    for layers in kept[1:]:
        left = [left[i] for i in layers or ()]
    return left
