"""Distributions that a teacher predicted while it generated, and the files that hold those of a part.

A distribution is stored as the k most probable ids and their log-probabilities, or as the hidden states before the
output head. Shape letters: N recorded positions of a completion, k ids, H width.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal, TypeAlias, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.files import atomic_path
from ..core.io import damage_reported
from ..errors import DistillError
from ..teachers.remote.api import RowTensors, TokenRow

IDS, LOG_PROBS, HIDDEN = "ids", "log_probs", "hidden"
_PROMPTS, _PROMPT_LENGTHS, _TOKENS, _LENGTHS, _COUNTS = "prompts", "prompt_lengths", "tokens", "lengths", "counts"
_Found: TypeAlias = tuple[int, tuple[int, int] | None]  # number of positions; file and row of the completion
_Flat: TypeAlias = tuple[np.ndarray, np.ndarray]  # values of all rows, and the end of each row


@dataclass(frozen=True)
class Capture:
    """The values that a backend records of the distribution after each token.

    values:      top_k: log-probabilities of the k most probable ids; hidden: hidden states before the output head
    k:           number of ids
    temperature: of the recorded log-probabilities; that of the sampling has no effect on them
    """

    values: Literal["top_k", "hidden"]
    k: int
    temperature: float = 1.0


@dataclass(frozen=True)
class TokenSignals:
    """The distributions that were predicted for one completion.

    prompt: token ids of the prompt
    tokens: token ids of the completion, and the end-of-text token after one that was cut off, if it was read
    values: name -> [N, ...]: entry i is the distribution of token i; entry len(tokens), if there is one, is that of the
            token that follows
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    values: RowTensors


def top_k_values(logits: Tensor, k: int, temperature: float = 1.0) -> RowTensors:
    """Return the k most probable ids, ascending [N, k] int32, and their log-probabilities [N, k] float32.

    Args:
        logits: [N, V].
        k: number of ids; all of them if there are fewer.
        temperature: of the log-probabilities.
    """
    logits = logits if temperature == 1 else logits / temperature
    ids = logits.topk(min(k, logits.shape[-1]), dim=-1).indices.sort(dim=-1).values
    log_probs = logits.gather(-1, ids) - torch.logsumexp(logits, -1, keepdim=True)
    return {IDS: ids.int(), LOG_PROBS: log_probs.float()}


def write_signals(file: Path, signals: Sequence[TokenSignals]) -> None:
    """Write the distributions of a part atomically."""
    tensors = {name: torch.cat([each.values[name] for each in signals]) for name in signals[0].values}
    columns = {_PROMPTS: [each.prompt for each in signals], _TOKENS: [each.tokens for each in signals]}
    for name, lengths in ((_PROMPTS, _PROMPT_LENGTHS), (_TOKENS, _LENGTHS)):
        tensors[name] = torch.tensor([token for row in columns[name] for token in row], dtype=torch.int32)
        tensors[lengths] = torch.tensor([len(row) for row in columns[name]], dtype=torch.int32)
    tensors[_COUNTS] = torch.tensor([len(next(iter(each.values.values()))) for each in signals], dtype=torch.int32)
    with atomic_path(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


class SignalFile:
    """The distributions of a part, which are read from the disk when they are needed.

    Raises:
        DistillError: the file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        with _open(path) as file:
            self._names = [name for name in (IDS, LOG_PROBS, HIDDEN) if name in file.keys()]  # noqa: SIM118
            self._prompts = _rows(file, _PROMPTS, _PROMPT_LENGTHS)
            self._tokens = _rows(file, _TOKENS, _LENGTHS)
            self._ends = np.cumsum(file.get_tensor(_COUNTS).numpy(), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def prompt(self, row: int) -> np.ndarray:
        """Return the token ids of the prompt of a completion."""
        return _row(self._prompts, row)

    def tokens(self, row: int) -> np.ndarray:
        """Return the token ids of a completion."""
        return _row(self._tokens, row)

    def count(self, row: int) -> int:
        """Return N of a completion."""
        return int(self._ends[row] - (self._ends[row - 1] if row else 0))

    def values(self, row: int) -> RowTensors:
        """Return the distributions of a completion."""
        start, end = int(self._ends[row]) - self.count(row), int(self._ends[row])
        with _open(self.path) as file:
            return {name: file.get_slice(name)[start:end] for name in self._names}


@contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    try:
        with damage_reported(path), safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise DistillError(f"{path} is damaged ({error}): remove it, and pass --resume to generate it again.") from None


def _rows(file: safe_open, name: str, lengths: str) -> _Flat:
    return file.get_tensor(name).numpy(), np.cumsum(file.get_tensor(lengths).numpy(), dtype=np.int64)


def _row(flat: _Flat, row: int) -> np.ndarray:
    values, ends = flat
    return values[ends[row - 1] if row else 0 : ends[row]]


class SignalIndex:
    """Finds the distributions of rows among those of all completions, by the token ids of the rows.

    Args:
        files: the files of all parts.
    """

    def __init__(self, files: Iterable[SignalFile]):
        self._files = [*files]
        self._by_prompt: dict[bytes, list[tuple[int, int]]] = {}
        for number, file in enumerate(self._files):
            for row in range(len(file)):
                self._by_prompt.setdefault(_digest(file.prompt(row)), []).append((number, row))

    def count(self, row: TokenRow) -> int:
        """Return for how many of the first target positions of a row a distribution is known."""
        return self._find(row)[0]

    def values(self, row: TokenRow) -> RowTensors | None:
        """Return the distributions of the first target positions of a row that are known; None if none is."""
        count, location = self._find(row)
        if location is None:
            return None
        file, number = location
        offsets = torch.tensor(row.positions[:count]) - row.positions[0]
        return {name: tensor[offsets] for name, tensor in self._files[file].values(number).items()}

    def _find(self, row: TokenRow) -> _Found:
        """Return the completion that has the most target positions of a row, and their number.

        Its distribution at a position is that of the row if all tokens up to the position are the same.
        """
        first = row.positions[0]
        rest, best = np.array(row.ids[first + 1 :]), cast(_Found, (0, None))
        for file, number in self._by_prompt.get(_digest(np.array(row.ids[: first + 1])), ()):
            same = _common_length(self._files[file].tokens(number), rest)
            last = first + min(same, self._files[file].count(number) - 1)
            best = max(best, (bisect_right(row.positions, last), (file, number)), key=lambda each: each[0])
        return best


def _digest(tokens: np.ndarray) -> bytes:
    return blake2b(tokens.astype("<i4").tobytes(), digest_size=16).digest()


def _common_length(tokens: np.ndarray, others: np.ndarray) -> int:
    count = min(len(tokens), len(others))
    differ = np.flatnonzero(tokens[:count] != others[:count])
    return int(differ[0]) if len(differ) else count
