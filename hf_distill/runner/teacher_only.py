"""The frozen teacher of a recipe, loaded without a student: what a cache is written by and an analysis looks at."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..errors import DistillError
from ..recipe.load import validate
from ..recipe.models import TeacherSpec
from ..recipe.schema import Recipe
from ..teachers import Teacher
from .datasets import Prepared, prepare_data, taken_by
from .model_factory import Models, check_launch
from .model_loading import loaded, resolve_model
from .training_arguments import arguments


def speaker_of(recipe: Recipe) -> TeacherSpec:
    """The frozen teacher, or the source of a cached one.

    Raises:
        DistillError: there are several, or it moves, or the cache's source is not given.
    """
    if recipe.teacher is None:
        raise DistillError("The recipe has several teachers: give a recipe with one of them.")
    spec = recipe.teacher.speaker
    if spec.kind != "frozen":
        what = "has no source" if spec.kind == "cached" else f"is {spec.kind} and moves"
        raise DistillError(f"The recipe's teacher {what}: this needs a teacher of kind frozen, or teacher.source.")
    return spec


def with_speaker(recipe: Recipe, spec: TeacherSpec) -> dict[str, Any]:
    """The recipe with the teacher that spoke, as plain values: the only one, which every loss follows."""
    values = recipe.model_dump(exclude_none=True)
    losses = [{k: v for k, v in loss.items() if k != "teacher"} for loss in values["losses"]]
    named = ("name", "weight")
    return values | {"teachers": [], "losses": losses, "teacher": spec.model_dump(exclude_none=True, exclude={*named})}


def load_speaker(
    recipe: Recipe, spec: TeacherSpec, on_stage: Callable[[str], None]
) -> tuple[Teacher, Prepared, Any, Any]:
    """(teacher, data, tokenizer, arguments); the student is there by its config alone."""
    check_launch(recipe)
    online = validate(with_speaker(recipe, spec))
    args = arguments(online)
    on_stage(f"Loading {online.base}")
    with args.main_process_first():
        path = resolve_model(online.base)
    tokenizer: Any = loaded(AutoTokenizer, path, revision=online.base_revision)
    with args.main_process_first():
        data = prepare_data(online, tokenizer, args.seed, taken_by(args))
    teacher: Any = Models(online, args, path, tokenizer).teacher
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(loaded(AutoConfig, path, revision=online.base_revision))
    teacher.prepare(student, args.device, tokenizer)
    return teacher, data, tokenizer, args
