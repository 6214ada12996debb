"""`Task`, the base class of the tasks of recipes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from ...core.results import ModelFacts
from ...data import Examples, OtherTokenizer
from ...models.blocks import find_blocks
from ...models.pruning import block_influence, cut_student, top_layers
from ...recipe.schema import Recipe
from ...trainer.config import DistillConfig
from ...trainer.trainer import DistillTrainer
from ..datasets import PreparedData
from .previews import Preview

_CALIBRATION_ROWS = 8  # rows that measure block influence


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
    """

    name: ClassVar[str]
    auto_class: ClassVar[type[_BaseAutoModelClass]]
    trainer_class: ClassVar[type[Any]] = DistillTrainer
    config_class: ClassVar[type[Any]] = DistillConfig
    shares_processor: ClassVar[bool] = False

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

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

    def cut(self, teacher: PreTrainedModel, rows: Examples, layers: list[int] | None) -> tuple[nn.Module, ModelFacts]:
        """Cut a student from the teacher.

        Args:
            teacher: The teacher.
            rows: Training rows, which measure the influence of the layers.
            layers: Indices of the layers that an earlier call chose; None: choose them.

        Returns:
            The student, and which layers of the teacher it consists of.
        """
        cut, facts = self.recipe.student.from_teacher, cast(ModelFacts, {})
        assert cut is not None
        layers = layers or cut.layers
        if layers is None:
            ids = ({"input_ids": torch.tensor([row["input_ids"]])} for row in islice(rows, _CALIBRATION_ROWS))
            facts["block_influence"] = block_influence(teacher, ids)
            layers = top_layers(facts["block_influence"], int(cut.keep_layers or 0))
        facts["layers_kept"] = layers
        return cut_student(teacher, layers), facts

    def num_blocks(self, model: nn.Module) -> int:
        """Return the number of transformer blocks of a model."""
        return len(find_blocks(model)[1])
