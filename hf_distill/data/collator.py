"""Data collator: pads rows to the longest of the batch, or concatenates packed documents without padding."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening

from ..core.targets import IGNORE_INDEX
from .row_values import collate_row_values

Row: TypeAlias = Mapping[str, Sequence[int]]  # column -> values; `source` of a row that is not packed is one number


class Collator:
    """Collates rows of `input_ids` and `labels` into a batch.

    Rows of different lengths are padded on the right and get an `attention_mask` [B, S]; rows of equal length get none.
    Packed rows, which have `seq_lengths`, become one row [1, S] whose `position_ids` restart at each document; the
    first token of each document is no target.

    Rows with two views also have `view_input_ids` and `view_labels`, which are padded with their `view_attention_mask`;
    rows with another prompt for the teacher, or in the tokens of another tokenizer, have `teacher_input_ids`,
    `teacher_labels` and `teacher_attention_mask`; with several such teachers the names end in `_NAME`.

    Rows with a column `weight` or `origin` (see `tokenize_dataset`) become `weight` and `origin`, [B]; of packed rows,
    which have a value for each token, [1, S].

    With several sources, `source` [B, S] holds the index of each token's source. `DistillTrainer` reads it and reports
    the losses of each source. A custom script must set `remove_unused_columns=False` to keep this column.

    For packed rows, flash attention also reads `cu_seq_lens_q` and `cu_seq_lens_k` [D + 1], the sums of the lengths of
    the D documents, int32, and `max_length_q` and `max_length_k`, the length of the longest document, an int. A trainer
    of this package turns them on if a model has flash attention; other attention ignores them.

    Args:
        pad_token_id: token id of the padding; None (the tokenizer has no padding token): 0. The attention mask and the
            labels exclude padding, so that its id does not change the result.
        sources: names of the sources, in the order of their indices.
        return_flash_attn_kwargs: whether batches of packed rows have the lengths of their documents.
    """

    def __init__(self, pad_token_id: int | None, sources: Sequence[str] = (), return_flash_attn_kwargs: bool = False):
        self.pad_token_id, self.sources = 0 if pad_token_id is None else pad_token_id, tuple(sources)
        self.return_flash_attn_kwargs = return_flash_attn_kwargs
        self._flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=return_flash_attn_kwargs)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return a batch of `input_ids` and `labels`, with `attention_mask` or `position_ids`, and `source` if any."""
        is_packed = "seq_lengths" in rows[0]
        batch = self._flatten([doc for row in rows for doc in unpack_row(row)]) if is_packed else self._pad(rows)
        if "source" in rows[0]:
            sources = [torch.as_tensor(row["source"]).expand(len(row["input_ids"])) for row in rows]
            batch["source"] = torch.cat(sources)[None] if is_packed else pad_sequence(sources, batch_first=True)
        return batch | collate_row_values(rows, is_packed)

    def _pad(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = self._pad_view(rows, "")
        if len({len(row["input_ids"]) for row in rows}) == 1:
            del batch["attention_mask"]
        for column in rows[0]:
            view, is_ids, suffix = column.partition("input_ids")
            if is_ids and view in ("view_", "teacher_"):
                batch |= self._pad_view(rows, view, suffix)
        return batch

    def _pad_view(self, rows: Sequence[Row], view: str, suffix: str = "") -> dict[str, Tensor]:
        ids, labels = (
            [torch.as_tensor(row[f"{view}{name}{suffix}"], dtype=torch.long) for row in rows]
            for name in ("input_ids", "labels")
        )
        return {
            f"{view}input_ids{suffix}": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            f"{view}labels{suffix}": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            f"{view}attention_mask{suffix}": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }


def returns_document_lengths(collator: object) -> bool:
    """Whether the batches that a collator makes of packed rows have `cu_seq_lens_q`, which flash attention reads.

    Args:
        collator: a `Collator`, `DataCollatorWithFlattening` of transformers, or TRL's collator (`padding_free`).
    """
    return any(getattr(collator, name, False) is True for name in ("return_flash_attn_kwargs", "padding_free"))


def unpack_row(row: Row) -> list[Row]:
    """Return the documents of a packed row, as rows; a row that is not packed is one document."""
    ends = [0, *accumulate(row.get("seq_lengths", [len(row["input_ids"])]))]
    return [{name: row[name][start:end] for name in ("input_ids", "labels")} for start, end in pairwise(ends)]
