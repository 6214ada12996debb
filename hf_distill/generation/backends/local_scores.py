"""`LocalScorer`: distributions at positions of rows that were not generated, by a forward of the teacher."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...core.logits import DenseLogits, LazyLogits
from ...core.targets import IGNORE_INDEX, Targets
from ...errors import DistillError
from ...teachers import FrozenTeacher
from ...teachers.remote.api import RowTensors, TokenRow
from ..token_signals import HIDDEN, Capture, top_k_values

_BLOCK_TOKENS = 256  # whose logits are materialized at a time


class LocalScorer:
    """Runs a teacher on rows of token ids.

    Args:
        teacher: a prepared teacher.
        capture: what is computed.
        device: device of the batches.
    """

    def __init__(self, teacher: FrozenTeacher, capture: Capture, device: torch.device):
        self.teacher, self.capture, self.device = teacher, capture, device

    def __call__(self, rows: Sequence[TokenRow]) -> list[RowTensors]:
        """Return the distributions at the positions of each row."""
        logits = self._logits(rows)
        if self.capture.values == "hidden":
            assert isinstance(logits, LazyLogits)
            values: RowTensors = {HIDDEN: logits.hidden.cpu()}
        else:
            count = sum(len(row.positions) for row in rows)
            blocks = [slice(start, start + _BLOCK_TOKENS) for start in range(0, count, _BLOCK_TOKENS)]
            parts = [top_k_values(logits.project(each), self.capture.k, self.capture.temperature) for each in blocks]
            values = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        parts_of_rows = {name: tensor.split([len(row.positions) for row in rows]) for name, tensor in values.items()}
        return [{name: parts[number] for name, parts in parts_of_rows.items()} for number in range(len(rows))]

    def output_head(self, tokens: Sequence[int]) -> LazyLogits:
        """Return the logits of a token, with the output head that gives those of any hidden state.

        Args:
            tokens: token ids of any text.

        Raises:
            DistillError: the logits are not computed from the hidden states by a linear output head.
        """
        row = TokenRow((*tokens, tokens[-1]), (len(tokens) - 1,))
        logits = self._logits([row])
        if not isinstance(logits, LazyLogits):
            raise DistillError(
                "generate.cache: the teacher's logits are not computed from its last hidden states by a plain linear "
                "output head, and kinds hidden and sampled record hidden states: set generate.cache to top_k, or write "
                "the cache with `hf-distill cache write` after the generation."
            )
        return replace(logits, hidden=logits.hidden[:0])

    def _logits(self, rows: Sequence[TokenRow]) -> LazyLogits | DenseLogits:
        width = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
            mask[number, : len(row.ids)] = 1
            after = torch.tensor(row.positions) + 1
            labels[number, after] = ids[number, after]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        logits = self.teacher(batch, Targets.from_batch(batch, shift=True), {}).logits
        assert isinstance(logits, LazyLogits | DenseLogits)
        return logits
