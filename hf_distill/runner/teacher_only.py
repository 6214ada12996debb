"""Loads the frozen teacher of a recipe without a student, for writing caches and for analyses."""

from collections.abc import Callable, Collection

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from ..core.json_types import JSONObject
from ..errors import DistillError
from ..recipe.load import validate
from ..recipe.models import TeacherSpec
from ..recipe.schema import Recipe
from ..recipe.tasks import require_text_generation
from ..teachers import Teacher
from ..trainer.config import DistillConfig
from .datasets import PreparedData, num_training_rows
from .distributed import main_process_first
from .model_factory import ModelFactory, check_launch
from .model_loading import load_pretrained, load_teacher_tokenizers, model_without_weights, resolve_model
from .tasks import task_of
from .training_arguments import arguments


def static_teacher_spec(recipe: Recipe, kinds: Collection[str] = ("frozen",)) -> TeacherSpec:
    """Return the frozen teacher, or the source of a cached one.

    Args:
        recipe: The recipe.
        kinds: The kinds that are possible.

    Raises:
        DistillError: The recipe has several teachers, the teacher is not frozen, or the cache has no source.
    """
    if recipe.teacher is None:
        raise DistillError(
            "The recipe has several teachers, and this command needs exactly one: give a recipe with one of them."
        )
    spec = recipe.teacher.source_teacher
    if spec.kind not in kinds:
        what = "is a cache without a source" if spec.kind == "cached" else f"has kind {spec.kind}"
        raise DistillError(
            f"The teacher of the recipe {what}, and this command needs a {' or '.join(kinds)} teacher: set "
            f"teacher.kind to {' or '.join(kinds)}, or teacher.source for a cache."
        )
    return spec


def with_teacher(recipe: Recipe, spec: TeacherSpec) -> JSONObject:
    """Return the plain values of a recipe with this teacher as its only one, which all losses use.

    Of the section `generate`, which names servers, only the backend and the folder of generated data are kept, from
    which sources with generate: true are read.
    """
    read = {"backend", "output_dir"} if recipe.data.generated else set[str]()
    generate = (
        recipe.generate.model_dump(include=read, exclude_unset=True, exclude_none=True) if recipe.generate else {}
    )
    values = recipe.model_dump(exclude_none=True, exclude={"generate"}) | ({"generate": generate} if generate else {})
    losses = [{key: value for key, value in loss.items() if key != "teacher"} for loss in values["losses"]]
    named = ("name", "weight", "sources")
    return values | {"teachers": [], "losses": losses, "teacher": spec.model_dump(exclude_none=True, exclude={*named})}


def load_teacher_and_data(
    recipe: Recipe, spec: TeacherSpec, on_stage: Callable[[str], None]
) -> tuple[Teacher, PreparedData, PreTrainedTokenizerBase, DistillConfig]:
    """Load teacher, data, tokenizer and arguments; the student has no weights (meta device).

    Raises:
        DistillError: The recipe has another task than text-generation, or an input is invalid.
    """
    require_text_generation(recipe, "This command")
    check_launch(recipe)
    online = validate(with_teacher(recipe, spec))
    args = arguments(online)
    on_stage(f"Loading {online.tokenizer_model}")
    with main_process_first(args):
        path = resolve_model(online.tokenizer_model)
    task = task_of(online)
    full_tokenizer, count = task.load_processor(), num_training_rows(args)
    with main_process_first(args):
        tokenizer = task.student_processor(full_tokenizer, args.seed, count)
        other_tokenizers = load_teacher_tokenizers(online)
        data = task.prepare_data(tokenizer, args.seed, count, other_tokenizers)
    teacher = ModelFactory(online, task, args, path, tokenizer, other_tokenizers).teacher
    config = load_pretrained(AutoConfig, path, revision=online.tokenizer_revision)
    if task.trimming is not None:
        config.get_text_config().vocab_size = len(task.trimming.kept_ids)
    student = model_without_weights(AutoModelForCausalLM, config)
    teacher.prepare(student, args.device, tokenizer)
    return teacher, data, tokenizer, args
