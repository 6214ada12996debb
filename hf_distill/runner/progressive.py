"""Progressive distillation (1902.03393): a chain of students, each of which is the teacher of the next one.

The run folder holds `stage-1`, `stage-2`, ... and `direct`, each of which is a run folder; `student/` and `control/`,
the last student and the directly distilled one; and `recipe.yaml`, `metrics.jsonl` and `results.json` of the chain.
"""

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback

from ..core import run_files
from ..core.files import atomic_path, write_atomic
from ..core.held_out_metrics import VOCABULARY
from ..core.io import count_logs, held_out_metrics, read_logs, read_results, write_json
from ..core.processes import run_on_main
from ..core.results import Metrics, ModelFacts, Results, StageFacts
from ..recipe.load import validate
from ..recipe.schema import Recipe
from ..recipe.stages import direct_values, stage_values
from ..teachers.loading import env_world_size
from ..trainer.trainer import DistillTrainer
from .generated_sources import record_generated_data
from .model_loading import load_pretrained
from .quantized_student import load_fake_quantized, scheme_of, weights_folder
from .run_dir import run_folder
from .single_run import RunResult, run_single
from .teacher_only import load_teacher_and_data, static_teacher_spec, with_teacher
from .training_arguments import arguments
from .trimmed_rows import bits_per_byte, with_bits_per_byte
from .watchdog import HangWatchdog

_DEFAULT_TIMEOUT_SECONDS = 1800  # how long a process may wait for others, by default


def run_chain(
    recipe: Recipe,
    resume: bool,
    callbacks: Sequence[TrainerCallback],
    on_stage: Callable[[str], None],
    generate: Callable[[], object] = lambda: None,
) -> RunResult:
    """Run the stages of a recipe one after another; see `run_recipe`.

    Each stage is a separate run in its own folder, and is resumed separately. Its models are freed before the next
    stage begins. Finally all students are compared with the first teacher.

    Raises:
        DistillError: see `run_recipe`.
    """
    parts = dict(_build_stage_recipes(recipe))
    if env_world_size():
        arguments(parts["stage-1"])  # initializes the process group, which run_folder needs
    with run_folder(recipe, resume) as folder:
        evidence = read_results(folder / run_files.RESULTS) if resume else {}
        if evidence.get("status") == "done":
            on_stage("This chain is complete already.")
            return RunResult(folder, evidence["models"])
        generate()
        for name, part in parts.items():
            on_stage(f"{name}: {_describe(part)}")
            run_single(part, True, callbacks, on_stage)
            gc.collect()  # trainer and callbacks form reference cycles that keep both models
        students = {name: Path(part.train.output_dir) / "student" for name, part in parts.items()}
        with HangWatchdog(parts["stage-1"].train.ddp_timeout or _DEFAULT_TIMEOUT_SECONDS).running():
            models = _compare_students(recipe, students, on_stage)
            run_on_main(lambda: _write_outputs(recipe, folder, parts, models))
        return RunResult(folder, models)


def _build_stage_recipes(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Yield the name and the recipe of each run of a chain, in order."""
    for number in range(1, len(recipe.stages) + 1):
        yield f"stage-{number}", validate(stage_values(recipe, number))
    if recipe.control == "direct":
        yield "direct", validate(direct_values(recipe))


def _describe(recipe: Recipe) -> str:
    cut = recipe.student.from_teacher
    student = cut.text if cut else str(recipe.student.model)
    return f"{recipe.tokenizer_model} into {student}"


def _compare_students(recipe: Recipe, students: dict[str, Path], on_stage: Callable[[str], None]) -> dict[str, Metrics]:
    """Evaluate every student against the first teacher; the last is called "student", the direct one "control".

    If the students have different tokens, `vocabulary` numbers the vocabulary of each.
    """
    on_stage("Comparing all students with the first teacher")
    metrics, last = dict[str, Metrics](), f"stage-{len(recipe.stages)}"
    for number, (one, folders) in enumerate(_by_vocabulary(recipe, students)):
        teacher, data, tokenizer, args = load_teacher_and_data(one, static_teacher_spec(one), on_stage)
        args.report_to, args.deepspeed_plugin, args.remove_unused_columns = [], None, False
        bits = None if one is recipe else bits_per_byte(data.held_out, tokenizer)
        for name, folder in folders.items():
            scheme = scheme_of(recipe) if name in (last, "direct") else None
            trainer = DistillTrainer(
                load_fake_quantized(AutoModelForCausalLM, weights_folder(folder.parent, "student", scheme), scheme),
                args,
                teacher=teacher,
                eval_dataset=data.held_out,
                data_collator=data.collator,
                processing_class=tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.remove_callback(ProgressCallback)
            after = with_bits_per_byte(held_out_metrics(trainer.evaluate()), bits)
            vocabulary = {} if one is recipe else {VOCABULARY: number}
            metrics[{last: "student", "direct": "control"}.get(name, name)] = after | vocabulary
    return metrics


def _by_vocabulary(recipe: Recipe, students: dict[str, Path]) -> list[tuple[Recipe, dict[str, Path]]]:
    """Return the students that have the same tokens together, each group with a recipe that prepares its data.

    Any stage may trim the vocabulary of its student.
    """
    full = load_pretrained(AutoTokenizer, recipe.tokenizer_model, revision=recipe.tokenizer_revision).get_vocab()
    vocabularies = {name: load_pretrained(AutoTokenizer, str(folder)).get_vocab() for name, folder in students.items()}
    if all(vocabulary == full for vocabulary in vocabularies.values()):
        return [(recipe, students)]
    groups = dict[tuple[tuple[str, int], ...], dict[str, Path]]()
    for name, vocabulary in vocabularies.items():
        groups.setdefault(tuple(sorted(vocabulary.items())), {})[name] = students[name]
    values = with_teacher(recipe, static_teacher_spec(recipe)) | {"stages": [], "control": None}
    models = [str(next(iter(folders.values()))) for folders in groups.values()]
    recipes = [validate(values | {"student": {"model": model}}) for model in models]
    return [*zip(recipes, groups.values(), strict=True)]


def _stage_facts(name: str, recipe: Recipe, evidence: Results) -> StageFacts:
    """Return the models of a stage, and the metrics of its student against its teacher."""
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


def _write_outputs(recipe: Recipe, folder: Path, parts: dict[str, Recipe], models: dict[str, Metrics]) -> None:
    """Write the outputs of the chain: the last student and the control (by hard links), all logs, and the results."""
    last = f"stage-{len(recipe.stages)}"
    names, logs, facts = {last: "student", "direct": "control"}, [], dict[str, Results]()
    for name in parts:
        facts[name] = read_results(folder / name / run_files.RESULTS)
        if name in names:
            for suffix in ("", "-unquantized"):
                if (source := folder / name / f"student{suffix}").is_dir():
                    _copy_with_hard_links(source, folder / f"{names[name]}{suffix}")
        for log in read_logs(folder / name / run_files.METRICS):
            logs.append(json.dumps(log | {"run": names.get(name, name)}) + "\n")
    write_atomic(folder / run_files.METRICS, "".join(logs))
    record_generated_data(recipe, folder)
    chain = [_stage_facts(name, part, facts[name]) for name, part in parts.items()]
    shared_keys = ("environment", "data", "teacher", "provenance", "origin")
    first: Mapping[str, object] = facts["stage-1"]
    shared = {key: first[key] for key in shared_keys if key in first}
    student = {key: value for key, value in facts[last]["student"].items() if key not in ("layers_kept", "widths")}
    stages = [facts[f"stage-{number}"]["student"] for number in range(1, len(parts) + 1) if f"stage-{number}" in facts]
    if layers := _compose_layers([_layers_kept(stage) for stage in stages]):
        student["layers_kept"] = layers
        widths = {name: size for stage in stages for name, size in stage.get("widths", {}).items()}
        student |= {"widths": widths} if widths else {}
    evidence = {"models": models, "chain": chain, **shared, "student": student, "status": "done"}
    evidence["log_lines"] = count_logs(folder / run_files.METRICS)
    write_json(folder / run_files.RESULTS, evidence)


def _copy_with_hard_links(source: Path, target: Path) -> None:
    """Copy a folder atomically, by hard links if possible. An existing target was written by this chain and is kept."""
    if target.is_dir():
        return
    with atomic_path(target) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)  # of an interrupted copy
        shutil.copytree(source, temporary, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _layers_kept(student: ModelFacts) -> list[int] | None:
    """Return the layers that a student kept of its teacher; all of them if only its width was pruned."""
    return student.get("layers_kept") or ([*range(student["layers"])] if student.get("widths") else None)


def _compose_layers(layers_by_stage: Sequence[list[int] | None]) -> list[int] | None:
    """Return the first teacher's layers that are in the last student; None if a stage started from another model."""
    if None in layers_by_stage:
        return None
    kept_layers = [*(layers_by_stage[0] or ())]
    for layers in layers_by_stage[1:]:
        kept_layers = [kept_layers[i] for i in layers or ()]
    return kept_layers
