"""Data sets: reading sources, tokenizing examples to rows, mixing, packing and collating."""

from .collator import Collator, unpack_row
from .dual_processor import DualProcessorCollator
from .formats import OtherTokenizer
from .load import Examples, load_examples, split_held_out
from .mix import add_source_column, mix, mix_scheduled
from .packing import check_packed_attention, pack
from .prompts import prompt_rows, with_teacher_prompts
from .tokenize import concat_and_chunk, tokenize_dataset, tokenize_examples
from .training_templates import training_template

__all__ = [
    "Collator",
    "DualProcessorCollator",
    "Examples",
    "OtherTokenizer",
    "add_source_column",
    "check_packed_attention",
    "concat_and_chunk",
    "load_examples",
    "mix",
    "mix_scheduled",
    "pack",
    "prompt_rows",
    "split_held_out",
    "tokenize_dataset",
    "tokenize_examples",
    "training_template",
    "unpack_row",
    "with_teacher_prompts",
]
