"""`GeneratedTeacher`: the distributions of a generation as a teacher, from which a teacher cache is written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..core.logits import LazyLogits, SparseLogProbs
from ..core.signals import FeatureKey, Signals
from ..core.targets import FeatureTokens, Targets
from ..teachers.remote.api import RowTensors, TokenRow
from ..teachers.remote.rows import token_rows
from .token_signals import HIDDEN, IDS, LOG_PROBS, SignalIndex


@dataclass(frozen=True)
class Coverage:
    """Counts of the target tokens of a cache that have the distribution which was predicted during the generation.

    other_rows:      rows of which at least one target token needs another forward of the teacher
    tokens:          target tokens that have it
    other_tokens:    target tokens that need another forward
    """

    other_rows: int = 0
    tokens: int = 0
    other_tokens: int = 0

    def add(self, known: int, total: int) -> "Coverage":
        """Return the counts with those of a row: target tokens that have a distribution, and all of them."""
        return Coverage(self.other_rows + (known < total), self.tokens + known, self.other_tokens + total - known)


class GeneratedTeacher:
    """Returns the distributions of target tokens that a generation recorded; the backend computes the missing ones.

    A row has the recorded distributions as far as its tokens are those that were generated. The training tokenizes
    texts again, so that the tokens of some rows differ from some token on.

    Args:
        index: the recorded distributions.
        score: computes distributions at the positions of rows, as `Backend.score` does.
        vocab_size: V of the teacher.
        model: the teacher, if it is in this process.
        head: logits of any token, whose output head gives the logits of recorded hidden states; None for recorded
            log-probabilities.
        temperature: of recorded log-probabilities.
    """

    def __init__(
        self,
        index: SignalIndex,
        score: Callable[[Sequence[TokenRow]], list[RowTensors]],
        vocab_size: int,
        model: nn.Module | None = None,
        head: LazyLogits | None = None,
        temperature: float = 1.0,
    ):
        self.index, self.score, self.vocab_size, self.model = index, score, vocab_size, model
        self.head, self.temperature = head, temperature

    def __call__(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Return the distributions of the target tokens of a batch."""
        rows = token_rows(inputs, targets)
        parts = list[list[RowTensors]]()
        missing = list[tuple[int, TokenRow]]()
        for number, row in enumerate(rows):
            stored_values = self.index.values(row)
            parts.append([] if stored_values is None else [stored_values])
            count = 0 if stored_values is None else len(next(iter(stored_values.values())))
            if count < len(row.positions):
                missing.append((number, replace(row, positions=row.positions[count:])))
        scored = self.score([row for _, row in missing]) if missing else []
        for (number, _), values in zip(missing, scored, strict=True):
            parts[number].append(values)
        flat = [values for part in parts for values in part]
        tensors = {name: torch.cat([values[name] for values in flat]) for name in flat[0]}
        return Signals(self._logits(tensors, targets.labels.device))

    def _logits(self, tensors: RowTensors, device: torch.device) -> LazyLogits | SparseLogProbs:
        if self.head is not None:
            return replace(self.head, hidden=tensors[HIDDEN].to(device))
        log_probs = tensors[LOG_PROBS].double()
        log_tail = (-torch.expm1(torch.logsumexp(log_probs, -1))).clamp(min=0).log()
        teacher_log_probs = SparseLogProbs(
            tensors[IDS].long(), log_probs, log_tail, temperature=self.temperature, vocab_size=self.vocab_size
        )
        return teacher_log_probs.to(device)
