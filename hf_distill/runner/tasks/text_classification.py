"""The task text-classification: a class for each text, or pair of texts."""

from collections.abc import Mapping
from typing import Any, ClassVar

from datasets import Dataset, Value
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from ...data.task_collators import TextCollator
from ...errors import DistillError
from ...recipe.tasks import TEXT_CLASSIFICATION
from ..model_loading import load_pretrained
from .classification import Classification
from .labels import LABELS
from .previews import Preview


class TextClassification(Classification):
    """Texts, or pairs of texts, with one class each, as in run_glue of transformers."""

    name = TEXT_CLASSIFICATION.name
    auto_class: ClassVar = AutoModelForSequenceClassification

    def load_processor(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer, which pads the texts of a batch.

        Raises:
            DistillError: It cannot be loaded, or has no padding token.
        """
        recipe = self.recipe
        tokenizer = load_pretrained(AutoTokenizer, recipe.tokenizer_model, revision=recipe.tokenizer_revision)
        if tokenizer.pad_token is None:
            raise DistillError(
                f"The tokenizer of {recipe.tokenizer_model} has no padding token, and the texts of a batch are padded "
                "to one length. Save the model into a folder with one, and give this folder: tokenizer.pad_token = "
                "tokenizer.eos_token, model.config.pad_token_id = tokenizer.pad_token_id."
            )
        return tokenizer

    def make_rows(self, sources: Mapping[str, Dataset], processor: Any) -> dict[str, Dataset]:
        """Tokenize the texts."""
        limit = min(self.recipe.data.max_length, processor.model_max_length)
        pairs = {name for name, rows in sources.items() if "text_pair" in rows.column_names}
        if pairs and len(pairs) < len(sources):
            raise DistillError(
                f"{', '.join(map(self.where, sorted(pairs)))} has a column text_pair, and the other data has none: "
                "give all data pairs, or none."
            )
        texts = ["text", "text_pair"] if pairs else ["text"]
        for name, rows in sources.items():
            check_texts(rows, texts, self.where(name))

        def tokenize(batch: Mapping[str, list[str]]) -> dict[str, Any]:
            return dict(processor(*(batch[column] for column in texts), truncation=True, max_length=limit))

        labelled = self.with_labels(sources)
        return {name: rows.map(tokenize, batched=True, remove_columns=texts) for name, rows in labelled.items()}

    def preview_row(self, number: int, row: dict, source: str, processor: Any) -> Preview:
        """Return the text of a row and its label."""
        spans = [(processor.decode(row["input_ids"]) + " -> ", False), (self.label_names()[row[LABELS]], True)]
        tokens = len(row["input_ids"])
        return Preview(number, source, tokens, 1, spans, f"{tokens} tokens · 1 label")

    def collator(self, processor: Any) -> TextCollator:
        """Return the collator."""
        return TextCollator(processor, tuple(self.recipe.data.sources))


def check_texts(rows: Dataset, columns: list[str], where: str) -> None:
    """Check that columns hold a text in every row.

    Raises:
        DistillError: A column has another type, or a row has no text.
    """
    for column in columns:
        feature = rows.features[column]
        if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string")):
            raise DistillError(f"{where}: the column of the {column} has the type {feature}, and it must hold texts.")
        if rows.data.column(column).null_count:
            raise DistillError(f"{where}: some rows have no {column}: remove them, or write an empty text.")
