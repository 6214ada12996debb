"""Classes of the ids of two vocabularies, over which both models can be compared."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ...core.token_classes import TokenClasses
from .special_tokens import SpecialTokens
from .token_bytes import TokenBytes
from .tokenizer_text import TokenizerText, tokenizer_pair


def token_classes(
    student_tokenizer: Any, teacher_tokenizer: Any, student_size: int | None = None, teacher_size: int | None = None
) -> TokenClasses:
    """Return a partition of the ids of both models, see `TokenClasses`.

    Example: the student has the numbers "1", "12" and "123" and the teacher only digits. All three ids of the student
    and the id "1" of the teacher are one class.

    If both tokenizers have the same vocabulary, each id is a class.

    Args:
        student_tokenizer: a fast tokenizer of transformers, or a processor with one.
        teacher_tokenizer: likewise.
        student_size: V_s, which may be larger than the tokenizer's vocabulary; None: its size.
        teacher_size: V_t, likewise.

    Raises:
        DistillError: the text of the tokens of one tokenizer cannot be mapped to bytes.
    """
    student, teacher = tokenizer_pair(student_tokenizer, teacher_tokenizer)
    sizes = [
        side.table.size if size is None else size for side, size in ((student, student_size), (teacher, teacher_size))
    ]
    vocabularies = [getattr(each, "tokenizer", each).get_vocab() for each in (student_tokenizer, teacher_tokenizer)]
    keys: list[dict[int, Hashable]]
    if vocabularies[0] == vocabularies[1]:
        keys = [{i: i for i in sorted(vocabularies[0].values()) if i < size} for size in sizes]
    else:
        keys = [_keys(side, size) for side, size in zip((student, teacher), sizes, strict=True)]
        _match_special_tokens(keys, student.special, teacher.special)
    in_teacher = set(keys[1].values())
    classes: dict[Hashable, int] = {}
    for key in keys[0].values():
        if key in in_teacher:
            classes.setdefault(key, len(classes))
    of_ids = [_classes_of(side, size, classes) for side, size in zip(keys, sizes, strict=True)]
    return TokenClasses(of_ids[0], of_ids[1], len(classes) + 1)


def _keys(side: TokenizerText, size: int) -> dict[int, Hashable]:
    """Return the bytes of each id that is text, and the string of each special token."""
    table: TokenBytes = side.table
    data, starts, ends = table.data.tobytes(), table.starts.tolist(), (table.starts + table.lengths).tolist()
    is_special = table.is_special.tolist()
    texts: dict[int, Hashable] = {
        i: data[starts[i] : ends[i]] for i in range(min(size, table.size)) if not is_special[i] and ends[i] > starts[i]
    }
    contents = side.special.contents.items()
    return texts | {i: content for i, content in contents if i not in side.special.unmatched and i < size}


def _match_special_tokens(keys: list[dict[int, Hashable]], student: SpecialTokens, teacher: SpecialTokens) -> None:
    """Give the special tokens of one tokenizer the string of those of the other one that mean the same.

    Tokens with the same string mean the same. An end of a turn that the other tokenizer lacks is its EOS token.
    """
    sides = [(keys[0], student), (keys[1], teacher)]
    for (ids, special), (other_ids, other) in (sides, sides[::-1]):
        strings = set(other_ids.values())
        for i, meaning in special.meanings.items():
            equivalent = other.id_of(meaning)
            if i in ids and ids[i] not in strings and equivalent in other_ids:
                ids[i] = other_ids[equivalent]


def _classes_of(keys: dict[int, Hashable], size: int, classes: dict[Hashable, int]) -> Tensor:
    """Return the class of each id [size]: that of its key, or of the longest proper prefix of its bytes, or the last.

    Args:
        keys: see `_keys`.
        size: V.
        classes: class of each key that both tokenizers have.
    """
    result = [len(classes)] * size
    for i, key in keys.items():
        if key in classes:
            result[i] = classes[key]
        elif isinstance(key, bytes):
            prefixes = (key[:end] for end in range(len(key) - 1, 0, -1))
            result[i] = next((classes[prefix] for prefix in prefixes if prefix in classes), len(classes))
    return torch.tensor(result, dtype=torch.int64)
