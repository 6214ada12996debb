"""A partition of the ids of two vocabularies into classes that both models predict."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)  # hashed by identity
class TokenClasses:
    """The class of each id of the student and of the teacher, see `data/alignment/token_classes.py`.

    Ids of the same bytes, or special tokens of the same meaning, are one class. Any other id is in the class of the
    longest proper prefix of its bytes that is an id of both tokenizers; ids without such a prefix, and ids that no
    tokenizer has (padding of the vocabulary), are in the last class.

    student:  [V_s] class of each id of the student, int64
    teacher:  [V_t] class of each id of the teacher, int64
    count:    number of classes; the last one is `count - 1`
    """

    student: Tensor
    teacher: Tensor
    count: int

    def to(self, device: torch.device | str) -> "TokenClasses":
        """Return the classes on a device."""
        return TokenClasses(self.student.to(device), self.teacher.to(device), self.count)
