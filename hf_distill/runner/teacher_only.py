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
from .datasets import PreparedData, num_training_rows, prepare_data
from .model_factory import ModelFactory, check_launch
from .model_loading import load_pretrained, resolve_model
from .training_arguments import arguments


def static_teacher_spec(recipe: Recipe) -> TeacherSpec:
    """The frozen teacher, or the source of a cached one.

    Raises:
        DistillError: there are several, or it moves, or the cache's source is not given.
    """
    if recipe.teacher is None:
        raise DistillError("The recipe has several teachers: give a recipe with one of them.")
    spec = recipe.teacher.source_teacher
    if spec.kind != "frozen":
        what = "has no source" if spec.kind == "cached" else f"is {spec.kind} and moves"
        raise DistillError(f"The recipe's teacher {what}: this needs a teacher of kind frozen, or teacher.source.")
    return spec


def with_teacher(recipe: Recipe, spec: TeacherSpec) -> dict[str, Any]:
    """The recipe with the teacher that spoke, as plain values: the only one, which every loss follows."""
    values = recipe.model_dump(exclude_none=True)
    losses = [{k: v for k, v in loss.items() if k != "teacher"} for loss in values["losses"]]
    named = ("name", "weight")
    return values | {"teachers": [], "losses": losses, "teacher": spec.model_dump(exclude_none=True, exclude={*named})}


def load_teacher_and_data(
    recipe: Recipe, spec: TeacherSpec, on_stage: Callable[[str], None]
) -> tuple[Teacher, PreparedData, Any, Any]:
    """(teacher, data, tokenizer, arguments); the student is there by its config alone."""
    check_launch(recipe)
    online = validate(with_teacher(recipe, spec))
    args = arguments(online)
    on_stage(f"Loading {online.tokenizer_model}")
    with args.main_process_first():
        path = resolve_model(online.tokenizer_model)
    tokenizer: Any = load_pretrained(AutoTokenizer, path, revision=online.tokenizer_revision)
    with args.main_process_first():
        data = prepare_data(online, tokenizer, args.seed, num_training_rows(args))
    teacher: Any = ModelFactory(online, args, path, tokenizer).teacher
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(
            load_pretrained(AutoConfig, path, revision=online.tokenizer_revision)
        )
    teacher.prepare(student, args.device, tokenizer)
    return teacher, data, tokenizer, args
