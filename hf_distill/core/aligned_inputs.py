"""Keys of a batch whose teacher has another tokenizer: the teacher's rows, and the chunks of both sides.

A chunk is a smallest span of the text at whose start and end both the student's and the teacher's tokens have a
boundary. Chunks are numbered from 1 in a batch, in the order of the student's tokens; 0 marks a token in no chunk.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class AlignedKeys(NamedTuple):
    """Names of the keys of one teacher.

    teacher_input_ids:       [B_t, S_t] the rows that the teacher reads, in its own tokens
    teacher_attention_mask:  [B_t, S_t] 1 for a token, 0 for padding; not in a packed batch
    teacher_position_ids:    [1, S_t] positions in their documents; only in a packed batch
    chunk_ids:               [B, S] chunk of each token of the student
    teacher_chunk_ids:       [B_t, S_t] chunk of each token of the teacher
    """

    teacher_input_ids: str = "teacher_input_ids"
    teacher_attention_mask: str = "teacher_attention_mask"
    teacher_position_ids: str = "teacher_position_ids"
    chunk_ids: str = "chunk_ids"
    teacher_chunk_ids: str = "teacher_chunk_ids"


DEFAULT_KEYS = AlignedKeys()


def aligned_keys(name: str | None = None) -> AlignedKeys:
    """Return the keys of a teacher; those of a named teacher, one of several, end in `_NAME`."""
    return DEFAULT_KEYS if name is None else AlignedKeys(*(f"{key}_{name}" for key in DEFAULT_KEYS))


def has_aligned_inputs(inputs: Mapping[str, Any], name: str | None = None) -> bool:
    """Whether a batch has the rows of a teacher with another tokenizer.

    Without `chunk_ids`, `teacher_input_ids` are rows with another prompt in the student's tokens, see `teacher_inputs`.
    """
    return aligned_keys(name).chunk_ids in inputs


def aligned_names(inputs: Mapping[str, Any]) -> set[str]:
    """Return the keys that a batch may have for its teachers with other tokenizers; empty without such a teacher."""
    suffixes = [key.removeprefix(DEFAULT_KEYS.chunk_ids) for key in inputs if key.startswith(DEFAULT_KEYS.chunk_ids)]
    return {key for suffix in suffixes for key in aligned_keys(suffix[1:] or None)}
