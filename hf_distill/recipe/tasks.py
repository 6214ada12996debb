"""The tasks of recipes: which columns the data of each has, and which keys have no meaning for it. Imports no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ..core.held_out_metrics import DEFAULT_TARGET
from ..errors import DistillError, did_you_mean

if TYPE_CHECKING:
    from .schema import Recipe

TEXT_GENERATION = "text-generation"
# Kinds of teachers that read the batch of the student as it is, whatever its inputs are.
_KINDS = ("frozen", "online", "mutual", "ema", "snapshot")


@dataclass(frozen=True)
class TaskKeys:
    """The columns and keys of a recipe of a task other than text-generation.

    name:         name of the task, as in `transformers.pipeline`
    columns:      columns that the data must have; `data.columns` gives them other names
    optional:     columns that the data may have
    family:       model_type of the tiny models of a smoke run
    smoke_data:   data of a smoke run
    refused:      dotted key, below `data` or `student` -> why it has no meaning for the task
    reads_text:   whether the models read token ids
    has_encoder:  whether the models have an encoder and a decoder
    target:       noun for a target, in units such as nats/row
    """

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    family: str
    smoke_data: str
    refused: Mapping[str, str] = field(default_factory=dict)
    reads_text: bool = False
    has_encoder: bool = False
    target: str = "row"

    def problems(self, recipe: "Recipe") -> list[str]:
        """Describe what does not fit the task; empty if everything fits."""
        return [
            *self._column_problems(recipe),
            *self._refused_keys(recipe),
            *self._teacher_problems(recipe),
            *self._student_problems(recipe),
        ]

    def column_names(self, columns: Mapping[str, str] | None, present: "tuple[str, ...] | list[str]") -> dict[str, str]:
        """Return column of the task -> its name in a data set, for those that the data set must have or has.

        Args:
            columns: `data.columns`.
            present: names of the columns of the data set.
        """
        declared = columns or {}
        return {role: declared.get(role, role) for role in self.columns} | {
            role: declared.get(role, role) for role in self.optional if role in declared or role in present
        }

    def _column_problems(self, recipe: "Recipe") -> Iterator[str]:
        possible = (*self.columns, *self.optional)
        for role in recipe.data.columns or {}:
            if role not in possible:
                yield (
                    f"data.columns: {role!r} is not a column of the task {self.name}; its columns are "
                    f"{', '.join(possible)}"
                )

    def _refused_keys(self, recipe: "Recipe") -> Iterator[str]:
        sections: dict[str, BaseModel] = {"data": recipe.data, "data.eval": recipe.data.eval}
        sections |= {f"data.{name}": source for name, source in recipe.data.sources.items()}
        for location, section in sections.items():
            reasons = _OF_TEXT if location == "data" else _OF_SOURCES
            for key, why in {**reasons, **(self.refused if location == "data" else {})}.items():
                if is_set(section, key):
                    yield f"{location}.{key} has no meaning for the task {self.name}: {why}"
        if self.name != SPEECH.name and recipe.data.language is not None:
            yield f"data.language has no meaning for the task {self.name}: it is the language of speech"
        for key, why in _OF_RECIPES.items():
            if is_set(recipe, key):
                yield f"{key} has no meaning for the task {self.name}: {why}"
        if recipe.is_cross_tokenizer:
            yield (
                f"distill.cross_tokenizer has no meaning for the task {self.name}: it compares spans of generated text"
            )
        if recipe.distill.by_origin:
            yield f"distill.by_origin has no meaning for the task {self.name}: its labels have no author"
        if recipe.export in ("merged", "mtp"):
            yield f"export {recipe.export} is for students of the task {TEXT_GENERATION}: remove export"

    def _teacher_problems(self, recipe: "Recipe") -> Iterator[str]:
        specs = {"teacher": recipe.teacher} if recipe.teacher else {f"teachers.{s.name}": s for s in recipe.teachers}
        for location, spec in specs.items():
            if spec.kind not in _KINDS:
                yield (
                    f"{location}.kind {spec.kind} is for the task {TEXT_GENERATION}; for {self.name} use one of "
                    f"{', '.join(_KINDS)}"
                )
            if spec.prompt:
                yield f"{location}.prompt has no meaning for the task {self.name}: its rows have no prompt"
            if getattr(spec, "sources", None):
                yield f"{location}.sources is for the task {TEXT_GENERATION}: remove it, and all teachers read all rows"

    def _student_problems(self, recipe: "Recipe") -> Iterator[str]:
        student, cut = recipe.student, recipe.student.from_teacher
        other_keys = [name for name in ("vocab", "target_parameters") if cut and getattr(cut, name) is not None]
        if cut and (unfit := [*cut.widths(), *other_keys]):
            yield (
                f"student.from_teacher.{unfit[0]} is for the task {TEXT_GENERATION}: for {self.name} set the layers to "
                "keep"
            )
        if student.lora:
            yield f"student.lora is for the task {TEXT_GENERATION}: for {self.name}, use peft in a script"
        if self.has_encoder and cut and (cut.layers or cut.keep_layers):
            yield (
                "student.from_teacher: the teacher has an encoder and a decoder: set decoder_layers or encoder_layers, "
                "the layers to keep of each"
            )
        if self.has_encoder:
            return
        yield from _encoder_problems(recipe, self.name)
        if cut and cut.keep_layers and not self.reads_text:
            yield (
                "student.from_teacher: keep_layers measures the layers on text: set layers, the indices of the layers "
                "to keep"
            )


def _encoder_problems(recipe: "Recipe", name: str) -> Iterator[str]:
    """Yield the keys of students with an encoder and a decoder that a recipe of another task sets."""
    cut = recipe.student.from_teacher
    if recipe.student.freeze_encoder:
        yield f"student.freeze_encoder: a model of the task {name} has no separate encoder: remove it"
    if cut and (cut.decoder_layers or cut.encoder_layers):
        yield (
            f"student.from_teacher: a model of the task {name} has one stack of layers: set layers in place of "
            "decoder_layers and encoder_layers"
        )


def is_set(section: BaseModel, key: str) -> bool:
    """Whether a section of a recipe has another value than the default of a key."""
    fields = type(section).model_fields
    return key in fields and getattr(section, key) not in (None, fields[key].get_default(call_default_factory=True))


_OF_TEXT = {
    "packing": "its rows are no token sequences that could be packed",
    "chat_template": "it renders no conversations",
}
_OF_SOURCES = {
    "column": "set data.columns, which names each of its columns",
    "assistant_only": "it reads no conversations",
    "origin": "its labels have no author",
    "loss_weight": "its rows have no weights",
    "overflow": "it is for token sequences that are trained on as they are",
    "streaming": "its data sets are read as a whole, to check labels and lengths",
    "generate": "its teacher writes no text",
}
_OF_RECIPES: dict[str, Any] = {
    "on_policy": "its student generates nothing in training",
    "stages": "run each stage as a separate recipe",
}
TEXT_CLASSIFICATION = TaskKeys(
    "text-classification", ("text", "label"), ("text_pair",), "bert", "smoke:texts", reads_text=True
)
IMAGE_CLASSIFICATION = TaskKeys(
    "image-classification",
    ("image", "label"),
    (),
    "vit",
    "smoke:images",
    {"max_length": "images have no tokens; the image processor of the student determines their size"},
)
SPEECH = TaskKeys(
    "automatic-speech-recognition",
    ("audio", "text"),
    (),
    "whisper",
    "smoke:tones",
    has_encoder=True,
    target=DEFAULT_TARGET,
)
TASKS = {task.name: task for task in (TEXT_CLASSIFICATION, IMAGE_CLASSIFICATION, SPEECH)}


def task_problems(recipe: "Recipe") -> list[str]:
    """Describe which values of a recipe do not fit its task; empty if all fit."""
    if recipe.task in TASKS:
        return TASKS[recipe.task].problems(recipe)
    problems = [*_encoder_problems(recipe, recipe.task)]
    for key in ("columns", "language"):
        if getattr(recipe.data, key):
            other = ", ".join(task.name for task in TASKS.values() if key == "columns" or task is SPEECH)
            problems.append(
                f"data.{key} is for the task {other}, and the task is {recipe.task}: set task, or remove data.{key}"
            )
    return problems


def target_noun(recipe: "Recipe") -> str:
    """Return the noun for a target of the models of a recipe, such as "token"."""
    return TASKS[recipe.task].target if recipe.task in TASKS else DEFAULT_TARGET


def require_text_generation(recipe: "Recipe", command: str) -> None:
    """Refuse a recipe of another task than text-generation.

    Args:
        recipe: The recipe.
        command: What is done with it, such as "`hf-distill plan`".

    Raises:
        DistillError: The recipe has another task.
    """
    if recipe.task != TEXT_GENERATION:
        raise DistillError(
            f"{command} works for recipes of the task {TEXT_GENERATION}, and the task of this recipe is {recipe.task}."
        )


def check_columns(names: Mapping[str, str], present: "list[str] | tuple[str, ...]", where: str) -> None:
    """Check that a data set has all columns that a task reads.

    Args:
        names: Column of the task -> its name in the data set.
        present: Names of the columns of the data set.
        where: The data set, for the error message.

    Raises:
        DistillError: A column is missing.
    """
    for role, name in names.items():
        if name not in present:
            raise DistillError(
                f"{where} has no column {name!r}{did_you_mean(name, present)}; its columns are {', '.join(present)}. "
                f"Set data.columns: {{{role}: NAME}} to the column that holds the {role}."
            )
