"""Batches: rows padded to the longest, or packed documents one after another without padding."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening

from ..core.targets import IGNORE_INDEX


class Collator:
    """Rows of `input_ids` and `labels` to a batch.

    Rows of different lengths are padded on the right, with an `attention_mask` [B, S]; rows of one length need none.
    Packed rows, which have `seq_lengths`, become one row [1, S] whose `position_ids` start again at each document, and
    whose first tokens are not asked.

    Rows of two views have `view_input_ids` and `view_labels` besides, padded with a `view_attention_mask` of their own.

    With several sources, `source` [B, S] says of each token which one it is from; `DistillTrainer` reads it and reports
    losses of each. A script of one's own sets `remove_unused_columns=False`, so that the column gets here.

    Args:
        pad_token_id: what padding is made of.
        sources: names of the sources, in the order of their indices.
    """

    def __init__(self, pad_token_id: int, sources: Sequence[str] = ()):
        self.pad_token_id, self.sources = pad_token_id, tuple(sources)
        self._flatten = DataCollatorWithFlattening()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch: `input_ids`, `labels`, and `attention_mask` or `position_ids`, and `source`, where there are any."""
        packed = "seq_lengths" in rows[0]
        batch = self._flatten([d for row in rows for d in unpack_row(row)]) if packed else self._padded(rows)
        if "source" in rows[0]:
            own = [torch.as_tensor(row["source"]).expand(len(row["input_ids"])) for row in rows]
            batch["source"] = torch.cat(own)[None] if packed else pad_sequence(own, batch_first=True)
        return batch

    def _padded(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self._stacked(rows, "")
        if len({len(row["input_ids"]) for row in rows}) == 1:
            del batch["attention_mask"]
        return batch | (self._stacked(rows, "view_") if "view_input_ids" in rows[0] else {})

    def _stacked(self, rows: list[dict[str, Any]], view: str) -> dict[str, Tensor]:
        ids = [torch.as_tensor(row[f"{view}input_ids"]) for row in rows]
        labels = [torch.as_tensor(row[f"{view}labels"]) for row in rows]
        return {
            f"{view}input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            f"{view}labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            f"{view}attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }


def unpack_row(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The documents of a packed row, as rows; a row that is not packed is one document."""
    ends = [0, *accumulate(row.get("seq_lengths", [len(row["input_ids"])]))]
    return [{name: row[name][start:end] for name in ("input_ids", "labels")} for start, end in pairwise(ends)]
