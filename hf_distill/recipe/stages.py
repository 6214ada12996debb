"""The `stages` section of a recipe: progressive distillation through a chain of students. Imports no torch."""

from typing import TYPE_CHECKING

from pydantic import Field

from ..core.defaults import TRAINING_SEED
from ..core.json_types import JSONObject
from ..core.run_files import GENERATED
from ..core.strict_model import StrictModel
from .models import Student

if TYPE_CHECKING:
    from .schema import Recipe


class Stage(StrictModel):
    """One student of a chain, and the values in which its stage differs from the recipe."""

    student: Student = Field(description="The student of this stage, which is the teacher of the next stage.")
    distill: dict[str, object] = Field(
        default_factory=dict, description="Fields of `distill` that override those of the recipe in this stage."
    )
    train: dict[str, object] = Field(
        default_factory=dict, description="Fields of `train` that override those of the recipe in this stage."
    )


_BATCH_FIELDS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def stage_problems(recipe: "Recipe") -> list[str]:
    """List why the stages of a recipe cannot run as a chain; empty if they can, or if there are none."""
    stages, problems = recipe.stages, list[str]()
    if not stages:
        return (
            ["control: direct is for recipes with stages, and this recipe has none"]
            if recipe.control == "direct"
            else []
        )
    if len(stages) < 2:
        problems.append("stages: give two or more stages; for one student, use `student` without stages")
    if recipe.student != stages[-1].student:
        problems.append("student: remove it, because the student of the last stage is used; or make both the same")
    if recipe.teachers or recipe.teacher is None or recipe.teacher.kind not in ("frozen", "cached"):
        problems.append("stages: the recipe needs exactly one teacher, of kind frozen or cached, for the first stage")
    if recipe.on_policy or recipe.losses:
        problems.append(
            "stages: on_policy and losses cannot be combined with stages: run each stage as a separate recipe"
        )
    if recipe.control in ("sft", "sft_on_data"):
        problems.append(f"control: {recipe.control} cannot be combined with stages; use direct")
    for i, stage in enumerate(stages, 1):
        problems += [f"stages.{i}: {problem}" for problem in _incompatible_values(stage, recipe.control)]
    problems += _layers_problems(recipe)
    return problems


def _incompatible_values(stage: Stage, control: str | None) -> list[str]:
    chain_keys = [name for name in ("output_dir", "seed") if name in stage.train]
    problems = [f"train.{name} applies to the whole chain: set it in the recipe's train" for name in chain_keys]
    if (cut := stage.student.from_teacher) and cut.target_parameters is not None:
        problems.append(
            "student.from_teacher.target_parameters: the sizes of a stage must be known: search them in a recipe of "
            "that stage with `hf-distill prune`, and set them here"
        )
    if stage.student.lora:
        problems.append("a student with adapters cannot be the teacher of the next stage: remove student.lora")
    if control == "direct":
        other = [name for name in _BATCH_FIELDS if name in stage.train]
        problems += [
            f"train.{name}: with control direct, all stages need the same batch size: remove it" for name in other
        ]
    return problems


def _layers_problems(recipe: "Recipe") -> list[str]:
    """List why the control cannot be pruned from the first teacher: indices of layers are those of another teacher."""
    cuts = [stage.student.from_teacher for stage in recipe.stages]
    depths = [i for i, cut in enumerate(cuts) if cut and (cut.layers or cut.keep_layers)]
    if recipe.control != "direct" or not cuts[-1] or not depths or depths[-1] == 0:
        return []
    cut = cuts[depths[-1]]
    if cut is None or not cut.layers:
        return []
    return [
        f"stages.{depths[-1] + 1}: student.from_teacher.layers: the first teacher has other layers; with control "
        "direct, use keep_layers"
    ]


_PLACEMENT_FIELDS = ("dtype", "attn_implementation", "quantization", "deepspeed", "fsdp", "device_map")


def stage_values(recipe: "Recipe", number: int, teacher: str | None = None) -> JSONObject:
    """Return the plain values of the recipe of one stage.

    Each stage has another data seed; otherwise all stages would train on the same first rows.

    Args:
        recipe: A recipe with stages.
        number: Number of the stage, from 1.
        teacher: Path of the student of the previous stage, which is loaded with the placement options of the first
            teacher. None: the folder into which the chain writes it.
    """
    values = recipe.model_dump(exclude_none=True, exclude_unset=True)
    stage, train = values["stages"][number - 1], values["train"]
    result = {key: value for key, value in values.items() if key not in ("stages", "control")} | {
        "student": stage["student"]
    }
    result["distill"] = {**values.get("distill", {}), **stage.get("distill", {})}
    result["train"] = {**train, **stage.get("train", {}), "output_dir": f"{train['output_dir']}/stage-{number}"}
    result |= _generated_values(recipe)
    if number > 1:
        result["train"].setdefault(
            "data_seed", (TRAINING_SEED if train.get("seed") is None else train["seed"]) + number - 1
        )
        first = values["teacher"]
        placement = {name: first[name] for name in _PLACEMENT_FIELDS if first.get(name)}
        path = teacher or f"{train['output_dir']}/stage-{number - 1}/student"
        result["teacher"] = {"kind": "frozen", "model": path, **placement}
    return result


def direct_values(recipe: "Recipe") -> JSONObject:
    """Return the recipe that distills the first teacher into the last student in the total steps of all stages."""
    values = recipe.model_dump(exclude_none=True, exclude_unset=True)
    train, stages = values["train"], values["stages"]
    result = {key: value for key, value in values.items() if key not in ("stages", "control")}
    total = {
        name: sum(counts)
        for name in ("max_steps", "num_train_epochs")
        if None not in (counts := [stage.get("train", {}).get(name, train.get(name)) for stage in stages])
    }
    result |= {"train": {**train, **total, "output_dir": f"{train['output_dir']}/direct"}}
    if stages[-1]["student"].get("from_teacher"):
        result["student"] = stages[-1]["student"] | {"from_teacher": _combined_cuts(stages)}
    return result | _generated_values(recipe)


def _generated_values(recipe: "Recipe") -> JSONObject:
    """Return the section `generate` of all stages: they train on the completions of the first teacher."""
    if not recipe.data.generated:
        return {}
    values = recipe.generate.model_dump(exclude_none=True, exclude_unset=True) if recipe.generate else {}
    return {"generate": {"output_dir": f"{recipe.train.output_dir}/{GENERATED}", **values}}


def _combined_cuts(stages: list[JSONObject]) -> JSONObject:
    """Return what the last student keeps of the first teacher: the sizes that its stage and those before it set."""
    combined: JSONObject = {}
    for stage in stages:
        student = stage["student"]
        assert isinstance(student, dict)
        cut = student.get("from_teacher")
        if not isinstance(cut, dict):  # a model that is not made from the one before
            combined = {}
            continue
        if cut.get("layers") or cut.get("keep_layers"):
            combined = {key: value for key, value in combined.items() if key not in ("layers", "keep_layers")}
        combined |= cut
    return combined


def planned_values(recipe: "Recipe") -> dict[str, JSONObject]:
    """Return the recipes of all stages by name, as far as they are known before the chain runs.

    A student that is pruned from its teacher does not exist yet. The stage after it is planned with the last model that
    exists, which is larger; its student has the sizes that all stages since then set.
    """
    planned, teacher = {}, recipe.teacher.loaded_model if recipe.teacher else None
    for number, stage in enumerate(recipe.stages, 1):
        planned[f"stage-{number}"] = values = stage_values(recipe, number, teacher)
        if stage.student.from_teacher:
            stages = [part.model_dump(exclude_none=True, exclude_unset=True) for part in recipe.stages[:number]]
            values["student"] = {**stages[-1]["student"], "from_teacher": _combined_cuts(stages)}
        teacher = stage.student.model or teacher
    return planned
