"""Vocabulary trimming: a model and its tokenizer without the tokens that the data does not use."""

from .config_ids import ids_in_configs
from .selection import close_over, count_ids, frequent_ids, most_frequent_ids
from .tokenizer_content import TokenizerContent
from .trimming import TrimmedVocabulary, is_trimmed, kept_ids_of, trim_model, trim_tokenizer, trim_vocabulary

__all__ = [
    "TokenizerContent",
    "TrimmedVocabulary",
    "close_over",
    "count_ids",
    "frequent_ids",
    "ids_in_configs",
    "is_trimmed",
    "kept_ids_of",
    "most_frequent_ids",
    "trim_model",
    "trim_tokenizer",
    "trim_vocabulary",
]
