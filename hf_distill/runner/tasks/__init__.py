"""The tasks of recipes: how each loads data and models, collates, trains and is measured."""

from ...recipe.schema import Recipe
from .image_classification import ImageClassification
from .speech_recognition import SpeechRecognition
from .task import Task
from .text_classification import TextClassification
from .text_generation import TextGeneration

_TASKS: tuple[type[Task], ...] = (TextGeneration, TextClassification, ImageClassification, SpeechRecognition)


def task_of(recipe: Recipe) -> Task:
    """Return the task of a recipe."""
    return next(task for task in _TASKS if task.name == recipe.task)(recipe)


__all__ = ["Task", "task_of"]
