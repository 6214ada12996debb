"""The task text-generation: causal language models."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ...data import OtherTokenizer
from ...recipe.tasks import TEXT_GENERATION
from ..datasets import PreparedData, first_rows, prepare_data
from ..model_loading import load_pretrained, load_teacher_tokenizers
from ..trimmed_rows import Trimming
from ..trimmed_tokenizer import trimmed_tokenizer
from .previews import Preview, document_previews
from .task import Task

_MAX_EXAMPLES = 200  # examples of each source that a preview reads


class TextGeneration(Task):
    """Causal language models on texts, conversations and prompts."""

    name = TEXT_GENERATION
    auto_class: ClassVar = AutoModelForCausalLM
    shares_processor: ClassVar = True

    def student_processor(self, processor: Any, seed: int, count: int) -> Any:
        """Return the tokenizer of the student, which is a trimmed one if the student has fewer tokens."""
        trimmed = trimmed_tokenizer(self.recipe, processor, seed, count)
        if trimmed is None:
            return processor
        tokenizer, kept_ids = trimmed
        self.trimming = Trimming(processor, kept_ids)
        return tokenizer

    def load_processor(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        return load_pretrained(AutoTokenizer, self.recipe.tokenizer_model, revision=self.recipe.tokenizer_revision)

    def prepare_data(
        self, processor: Any, seed: int, count: int, other_tokenizers: Sequence[OtherTokenizer] = ()
    ) -> PreparedData:
        """Load, split, tokenize, mix and pack the sources."""
        return prepare_data(self.recipe, processor, seed, count, other_tokenizers, trimming=self.trimming)

    def preview(self, seed: int, count: int) -> list[Preview]:
        """Return the documents of the first rows, decoded, with their target tokens."""
        tokenizer = self.load_processor()
        mixture = first_rows(self.recipe, tokenizer, seed, _MAX_EXAMPLES, load_teacher_tokenizers(self.recipe))
        return [
            document
            for number, row in enumerate(islice(mixture, count))
            for document in document_previews(number, row, list(self.recipe.data.sources), tokenizer)
        ]
