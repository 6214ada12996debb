"""The tokenizer of a student whose vocabulary is trimmed."""

from collections import Counter

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import DistillError
from ..models.vocabulary import (
    TokenizerContent,
    count_ids,
    ids_in_configs,
    is_trimmed,
    kept_ids_of,
    most_frequent_ids,
    trim_tokenizer,
)
from ..recipe.schema import Recipe
from .datasets import prepare_data
from .model_loading import load_pretrained, resolve_model

logger = logging.get_logger(__name__)


def trimmed_tokenizer(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int, count: int
) -> tuple[PreTrainedTokenizerBase, list[int]] | None:
    """Return the tokenizer of a recipe's student if it has fewer tokens than that of the teacher.

    Args:
        recipe: The recipe.
        tokenizer: The tokenizer of `Recipe.tokenizer_model`, which is not changed.
        seed: See `prepare_data`.
        count: See `prepare_data`.

    Returns:
        The tokenizer, and for each of its ids the id of the same token in the full vocabulary; None if the student has
        all tokens.

    Raises:
        DistillError: The vocabulary cannot be trimmed as `student.from_teacher.vocab` says.
    """
    cut = recipe.student.from_teacher
    if cut is None or cut.vocab is None:
        return _own_tokenizer(recipe, tokenizer)
    content, keep = TokenizerContent(tokenizer), cut.vocab.keep
    if keep != "used" and keep > len(content.tokens):
        most_frequent_ids(content, {}, keep)  # raises an error, before the data is read
    data = prepare_data(recipe, tokenizer, seed, count, logs_targets=False)
    if not isinstance(data.train, Dataset):
        raise DistillError(
            "student.from_teacher.vocab counts the ids of all training rows, and a source is streamed: set streaming "
            "to false."
        )
    counts, required = count_ids(data.train), required_ids(recipe, tokenizer, content)
    if keep == "used":
        used: Counter[int] = counts + count_ids(data.held_out)
        trimmed, kept_ids = trim_tokenizer(tokenizer, [*used, *required])
    else:
        trimmed, kept_ids = trim_tokenizer(tokenizer, most_frequent_ids(content, counts, keep, required))
    kept = set(kept_ids)
    covered = sum(number for index, number in counts.items() if index in kept) / max(counts.total(), 1)
    logger.warning(
        f"The student has {len(kept_ids):,} of the {len(content.tokens):,} tokens of its teacher. They are "
        f"{covered:.2%} of the tokens of the training data; the others are encoded as several kept ones."
    )
    return trimmed, kept_ids


def required_ids(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, content: TokenizerContent) -> list[int]:
    """Return the ids of special tokens, and of tokens that the configs of the teacher's model name."""
    model, revision = recipe.tokenizer_model, recipe.tokenizer_revision
    config = load_pretrained(AutoConfig, model, revision=revision)
    try:
        generation_config = GenerationConfig.from_pretrained(resolve_model(model), revision=revision or "main")
    except OSError:  # the model has none
        generation_config = None
    named = [index for index in ids_in_configs(config, generation_config) if index in content.tokens]
    return [*named, *tokenizer.all_special_ids]


def _own_tokenizer(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedTokenizerBase, list[int]] | None:
    """Return the tokenizer that is stored with a student, if the student was trimmed before."""
    model, revision = recipe.student.model, recipe.student.revision
    if model is None or recipe.is_cross_tokenizer or recipe.tokenizer_model == model:
        return None
    config = load_pretrained(AutoConfig, model, revision=revision)
    if getattr(config.get_text_config(), "vocab_size", len(tokenizer)) >= len(tokenizer):
        return None
    stored_tokenizer = load_pretrained(AutoTokenizer, model, revision=revision)
    if not is_trimmed(stored_tokenizer, tokenizer) or (kept_ids := kept_ids_of(stored_tokenizer, tokenizer)) == [
        *range(len(stored_tokenizer))
    ]:
        return None  # a vocabulary that lacks the last tokens is one of the same ids
    return stored_tokenizer, kept_ids
