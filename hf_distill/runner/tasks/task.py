"""`Task`, the base class of the tasks of recipes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from ...core.results import ModelFacts
from ...data import Examples, OtherTokenizer
from ...models.blocks import find_blocks
from ...recipe.schema import Recipe
from ...trainer.config import DistillConfig
from ...trainer.trainer import DistillTrainer
from ..datasets import PreparedData
from ..pruning import Pruner
from ..trimmed_rows import Trimming
from .previews import Preview


class Task(ABC):
    """How the recipes of a task load their data and models, collate and train.

    Args:
        recipe: The recipe.

    Attributes:
        name: Name of the task, as in `transformers.pipeline`.
        auto_class: Auto class of its models.
        trainer_class: Trainer.
        config_class: Training arguments of the trainer.
        shares_processor: Whether all models of a recipe have the tokenizer of `Recipe.tokenizer_model`.
        trimming: The vocabulary of a student that has fewer tokens; set by `student_processor`.
    """

    name: ClassVar[str]
    auto_class: ClassVar[type[_BaseAutoModelClass]]
    trainer_class: ClassVar[type[Any]] = DistillTrainer
    config_class: ClassVar[type[Any]] = DistillConfig
    shares_processor: ClassVar[bool] = False

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.trimming: Trimming | None = None

    def student_processor(self, processor: Any, seed: int, count: int) -> Any:
        """Return the tokenizer or processor of the student.

        Args:
            processor: What `load_processor` returned.
            seed: See `prepare_data`.
            count: See `prepare_data`.
        """
        return processor

    @abstractmethod
    def load_processor(self) -> Any:
        """Load the tokenizer or processor, which is that of `Recipe.tokenizer_model`.

        Raises:
            DistillError: It cannot be loaded, or reads data in another way than that of the teacher.
        """

    @abstractmethod
    def prepare_data(
        self, processor: Any, seed: int, count: int, other_tokenizers: Sequence[OtherTokenizer] = ()
    ) -> PreparedData:
        """Load and process the sources; see `runner.datasets.prepare_data`."""

    @abstractmethod
    def preview(self, seed: int, count: int) -> list[Preview]:
        """Return the content of the first training rows; see `preview_rows`."""

    def model_options(self) -> dict[str, Any]:
        """Return further arguments of from_pretrained for a student or peer. The data must have been prepared."""
        return {}

    def adapt_student(self, model: nn.Module) -> nn.Module:
        """Return a new student, changed as the recipe requires."""
        return model

    def cut(self, teacher: PreTrainedModel, rows: Examples, pruner: Pruner) -> tuple[nn.Module, ModelFacts]:
        """Prune a student from the teacher.

        Args:
            teacher: The teacher.
            rows: Training rows, which measure what the teacher needs least.
            pruner: Prunes all students of the recipe to the same units.

        Returns:
            The student, and what it consists of.
        """
        return pruner.student(teacher, rows), pruner.facts()

    def num_layers(self, model: nn.Module) -> int:
        """Return the number of transformer layers of a model."""
        return len(find_blocks(model)[1])
