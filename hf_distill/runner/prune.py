"""`hf-distill prune`: writes the pruned student of a recipe, with its evaluation before training."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from ..core import run_files
from ..core.files import atomic_path, check_writable
from ..core.io import environment, write_json
from ..core.json_types import JSONObject
from ..core.results import Metrics, ModelFacts
from ..errors import DistillError
from ..models.model_types import unwrap_model
from ..recipe.load import validate
from ..recipe.schema import Recipe
from ..recipe.tasks import require_text_generation
from ..teachers.loading import env_world_size
from .model_factory import check_launch
from .single_run import RunContext
from .training_arguments import arguments


@dataclass(frozen=True)
class PrunedModel:
    """A pruned student that was written.

    folder:  with the model, the tokenizer and pruning.json
    metrics: held-out metrics before training
    student: its size, and what it consists of
    teacher: the size of the teacher
    """

    folder: Path
    metrics: Metrics
    student: ModelFacts
    teacher: ModelFacts


def prune_recipe(
    recipe: Recipe,
    folder: str,
    on_stage: Callable[[str], None] = lambda text: None,
    search: JSONObject | None = None,
) -> PrunedModel:
    """Prune the student of a recipe from its teacher, evaluate it, and write it into a new folder.

    Args:
        recipe: A recipe with `student.from_teacher`; nothing of its training is used but the data and the seed.
        folder: Of the student; it must not exist.
        on_stage: Called with a short description of each stage when it begins.
        search: The search that chose the sizes, which pruning.json records.

    Raises:
        DistillError: The student is not pruned from a teacher that does not change, a size is not possible, or the
            folder exists. Nothing is left behind.
    """
    check_prunable_recipe(recipe, folder)
    alone = validate(_without_training(recipe))
    check_launch(alone)
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as logs, atomic_path(target) as temporary:
        context = RunContext(alone, arguments(alone), Path(logs), [], on_stage)
        on_stage("Measuring the teacher and pruning the student")
        trainer = context.trainer("student", changes={"output_dir": logs})
        on_stage("Evaluating the student before training")
        metrics = context.held_out_metrics(trainer.evaluate())
        shutil.rmtree(temporary, ignore_errors=True)  # of a command that was killed
        assert trainer.model is not None
        context.describe(trainer)
        student, teacher = context.facts["student"], context.facts.get("teacher", {})
        _write(temporary, context, cast(PreTrainedModel, unwrap_model(trainer.model)), metrics, recipe, search)
    return PrunedModel(target, metrics, student, teacher)


def check_prunable_recipe(recipe: Recipe, folder: str) -> None:
    """Check that a recipe has a student to prune, and that it can be written.

    Raises:
        DistillError: It has none, it is launched on several processes, or the folder exists or cannot be created.
    """
    require_text_generation(recipe, "`hf-distill prune`")
    if recipe.stages:
        raise DistillError(
            "The recipe has stages, whose students are pruned one from another while it runs: give a recipe with one "
            "student."
        )
    if recipe.student.from_teacher is None:
        raise DistillError(
            "The student of the recipe is not pruned from its teacher: set student.from_teacher, such as "
            "'student={from_teacher: {keep_layers: 20, intermediate_size: 1024}}'."
        )
    if recipe.kinds - {"frozen", "cached"}:
        raise DistillError(
            f"The teacher has kind {', '.join(sorted(recipe.kinds))}, and `hf-distill prune` compares the student with "
            "a teacher that does not change: set teacher.kind to frozen."
        )
    if env_world_size() > 1:
        raise DistillError("`hf-distill prune` runs in one process: start it without torchrun.")
    if Path(folder).exists():
        raise DistillError(f"{folder} exists: choose another folder with -o, or remove it.")
    check_writable(Path(folder))


def _without_training(recipe: Recipe) -> JSONObject:
    """Return the values of a recipe without what only its training uses."""
    values = recipe.model_dump(exclude_none=True)
    train = {key: value for key, value in values["train"].items() if key not in ("deepspeed", "fsdp")}
    student = {key: value for key, value in values["student"].items() if key != "lora"}
    return {key: value for key, value in values.items() if key not in ("control", "losses", "projectors", "export")} | {
        "train": train,
        "student": student,
    }


def _write(
    folder: Path,
    context: RunContext,
    model: PreTrainedModel,
    metrics: Metrics,
    recipe: Recipe,
    search: JSONObject | None,
) -> None:
    model.save_pretrained(folder)
    context.processor.save_pretrained(folder)
    pruner = context.models.pruner
    assert pruner is not None
    assert pruner.kept is not None
    facts: dict[str, object] = {name: context.facts.get(name) for name in ("student", "teacher", "data")}
    write_json(
        folder / run_files.PRUNING,
        {
            "kept": pruner.kept.to_json(),
            "block_influence": pruner.block_influence,
            "metrics": metrics,
            **facts,
            "from_teacher": pruner.cut.model_dump(exclude_none=True),
            "teacher_model": recipe.primary_teacher.loaded_model,
            **({} if search is None else {"search": search}),
            "environment": environment(str(context.args.device)),
        },
    )
