"""The task image-classification: a class for each image."""

from collections.abc import Mapping
from typing import Any, ClassVar

from datasets import Dataset, Image, Value
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.image_processing_utils import BaseImageProcessor

from ...data.task_collators import ImageCollator
from ...errors import DistillError
from ...recipe.tasks import IMAGE_CLASSIFICATION
from ..model_loading import load_pretrained
from .classification import Classification
from .labels import LABELS
from .media import check_files, check_no_nulls, check_same_processing
from .previews import Preview


class ImageClassification(Classification):
    """Images with one class each, as in run_image_classification of transformers."""

    name = IMAGE_CLASSIFICATION.name
    auto_class: ClassVar = AutoModelForImageClassification

    def load_processor(self) -> BaseImageProcessor:
        """Load the image processor, after checking that it makes the same inputs as that of each teacher."""
        recipe = self.recipe
        processor = load_pretrained(AutoImageProcessor, recipe.tokenizer_model, revision=recipe.tokenizer_revision)
        check_same_processing(recipe, processor, AutoImageProcessor)
        return processor

    def make_rows(self, sources: Mapping[str, Dataset], processor: Any) -> dict[str, Dataset]:
        """Read the images from their column when they are collated."""
        return self.with_labels({name: self._with_images(rows, name) for name, rows in sources.items()})

    def _with_images(self, rows: Dataset, name: str) -> Dataset:
        feature, where = rows.features["image"], self.where(name)
        check_no_nulls(rows, "image", where)
        if isinstance(feature, Image):
            return rows
        if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
            check_files(rows, "image", where, self.path(name))
        elif not (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")) and not (
            isinstance(feature, dict) and {*feature} == {"bytes", "path"}
        ):
            raise DistillError(
                f"{where}: the column of the image has the type {feature}; it must hold images, their bytes, or "
                "paths of image files."
            )
        return rows.cast_column("image", Image())

    def preview_row(self, number: int, row: dict, source: str, processor: Any) -> Preview:
        """Return the size of an image and its label."""
        image, label = row["image"], self.label_names()[row[LABELS]]
        spans = [(f"image of {image.width} x {image.height} pixels -> ", False), (label, True)]
        return Preview(number, source, 0, 1, spans, "1 label")

    def collator(self, processor: Any) -> ImageCollator:
        """Return the collator, which processes the images."""
        return ImageCollator(processor, tuple(self.recipe.data.sources))
