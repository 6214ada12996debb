"""What a recipe may say about a chain of students. Imports no torch, as `schema` does not."""

from typing import Any

from pydantic import Field

from .models import Student
from .strict_model import StrictModel


class Stage(StrictModel):
    """One student of a chain, and what its stage has otherwise than the recipe."""

    student: Student
    distill: dict[str, Any] = Field(
        default_factory=dict, description="Fields of `distill` in the place of the recipe's."
    )
    train: dict[str, Any] = Field(default_factory=dict, description="Fields of `train` in the place of the recipe's.")


_PER_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")


def stage_problems(recipe: Any) -> list[str]:
    """Why a recipe's stages make no chain; nothing where it has none."""
    stages, problems = recipe.stages, list[str]()
    if not stages:
        return ["control direct compares with a chain, and there are no stages"] if recipe.control == "direct" else []
    if len(stages) < 2:
        problems.append("stages: two or more; one student is `student`, without stages")
    if recipe.student != stages[-1].student:
        problems.append("student: leave it out; a chain's student is that of its last stage")
    if recipe.teachers or recipe.teacher is None or recipe.teacher.kind not in ("frozen", "cached"):
        problems.append("stages: the first stage has one teacher, of kind frozen or cached")
    if recipe.on_policy or recipe.losses:
        problems.append("stages: on_policy and losses are not for chains: run each stage from a recipe of its own")
    if recipe.control == "sft":
        problems.append("control: of a chain it is direct")
    for i, stage in enumerate(stages, 1):
        problems += [f"stages.{i}: {problem}" for problem in _unfit(stage, recipe.control, i == len(stages))]
    return problems


def _unfit(stage: Stage, control: str | None, last: bool) -> list[str]:
    whole = [name for name in ("output_dir", "seed") if name in stage.train]
    problems = [f"train.{name} is the whole chain's: leave it out" for name in whole]
    if stage.student.lora:
        problems.append("adapters are no teacher of their own: leave student.lora out")
    if control == "direct":
        other = [name for name in _PER_STEP if name in stage.train]
        problems += [f"train.{name}: with control direct all steps have as many tokens" for name in other]
        cut = stage.student.from_teacher
        if last and cut and cut.layers:
            problems.append("with control direct, give keep_layers: the first teacher has other blocks")
    return problems


_HELD = ("dtype", "attn_implementation", "quantization", "deepspeed", "fsdp", "device_map")


def stage_values(values: dict[str, Any], number: int, teacher: str | None = None) -> dict[str, Any]:
    """The recipe of one stage, as plain values.

    Each stage goes through the data in an order of its own, else all of them would see the same first rows.

    Args:
        values: of the whole recipe, validated.
        number: of the stage, from 1.
        teacher: path of the student of the stage before; None: where the chain leaves it. It is held as the first
            teacher is.
    """
    stage, train = values["stages"][number - 1], values["train"]
    own = {k: v for k, v in values.items() if k not in ("stages", "control")} | {"student": stage["student"]}
    own["distill"] = {**values.get("distill", {}), **stage.get("distill", {})}
    own["train"] = {**train, **stage.get("train", {}), "output_dir": f"{train['output_dir']}/stage-{number}"}
    if number > 1:
        own["train"].setdefault("data_seed", (42 if train.get("seed") is None else train["seed"]) + number - 1)
        first = values["teacher"]
        held = {name: first[name] for name in _HELD if first.get(name)}
        path = teacher or f"{train['output_dir']}/stage-{number - 1}/student"
        own["teacher"] = {"kind": "frozen", "model": path, **held}
    return own


def direct_values(values: dict[str, Any]) -> dict[str, Any]:
    """The recipe of the last student taught by the first teacher, in as many steps as all stages have together."""
    train, stages = values["train"], values["stages"]
    own = {k: v for k, v in values.items() if k not in ("stages", "control")}
    total = {
        name: sum(counts)
        for name in ("max_steps", "num_train_epochs")
        if None not in (counts := [stage.get("train", {}).get(name, train.get(name)) for stage in stages])
    }
    return own | {"train": {**train, **total, "output_dir": f"{train['output_dir']}/direct"}}


def planned_values(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The recipes of all stages as they can be known before the chain runs, by name.

    A student that is cut from its teacher is not there yet to be looked at: the stage after it is planned with the last
    model that is, which is larger.
    """
    found, teacher = {}, values["teacher"].get("model")
    for number, stage in enumerate(values["stages"], 1):
        found[f"stage-{number}"] = stage_values(values, number, teacher)
        teacher = stage["student"].get("model") or teacher
    return found
