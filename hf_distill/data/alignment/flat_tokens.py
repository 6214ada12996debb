"""The tokens of a padded or packed batch as one sequence."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...core.targets import IGNORE_INDEX
from ...errors import DistillError


@dataclass(frozen=True)
class FlatTokens:
    """The N tokens of a batch [B, S] without padding, row by row.

    ids:        [N]
    positions:  [N] index of each token among the B * S elements of the batch
    documents:  [N] document of each token, from 0
    rows:       [N] row of the batch
    is_first:   [N] whether a token is the first of its document, which no token predicts
    is_target:  [N] whether a token has a label
    shape:      (B, S)
    is_packed:  whether documents of the batch follow each other in a row
    """

    ids: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    rows: np.ndarray
    is_first: np.ndarray
    is_target: np.ndarray
    shape: tuple[int, int]
    is_packed: bool

    @classmethod
    def of_batch(cls, batch: Mapping[str, Any], prefix: str = "", suffix: str = "") -> "FlatTokens":
        """Return the tokens of a collated batch on the CPU.

        Args:
            batch: `input_ids` and `labels` [B, S], with `attention_mask` [B, S] or `position_ids` [B, S].
            prefix: of the names of these keys.
            suffix: likewise.

        Raises:
            DistillError: there are no labels.
        """
        ids, labels, mask, positions = (
            batch.get(f"{prefix}{name}{suffix}") for name in ("input_ids", "labels", "attention_mask", "position_ids")
        )
        if ids is None or labels is None:
            raise DistillError(
                f"The batch has the keys {sorted(batch)}: a teacher of another tokenizer needs "
                f"`{prefix}input_ids{suffix}` and `{prefix}labels{suffix}`, ids and the target tokens among them. Rows "
                "of `input_ids` get labels from transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)."
            )
        is_token = np.ones(ids.shape, bool) if mask is None or mask.shape != ids.shape else mask.numpy() != 0
        flat = np.flatnonzero(is_token)
        rows = flat // ids.shape[1]
        is_first = np.diff(rows, prepend=-1) != 0
        is_packed = positions is not None and positions.shape == ids.shape and mask is None
        if positions is not None and positions.shape == ids.shape:
            restarts = positions.numpy().reshape(-1)[flat] == 0
            is_packed |= bool((restarts & ~is_first).any())
            is_first = is_first | restarts
        return cls(
            ids=ids.numpy().reshape(-1)[flat].astype(np.int64),
            positions=flat,
            documents=np.cumsum(is_first) - 1,
            rows=rows,
            is_first=is_first,
            is_target=labels.numpy().reshape(-1)[flat] != IGNORE_INDEX,
            shape=(ids.shape[0], ids.shape[1]),
            is_packed=is_packed,
        )

    def with_tokens(self, ids: np.ndarray, documents: np.ndarray) -> "FlatTokens":
        """Return other tokens of the same documents, [N_t]; `positions` and `is_target` are those of no batch.

        Args:
            ids: [N_t].
            documents: [N_t] the document of each token, in ascending order.
        """
        row_of_document = self.rows[self.is_first]
        return replace(
            self,
            ids=ids,
            positions=np.arange(len(ids)),
            documents=documents,
            rows=row_of_document[documents],
            is_first=np.diff(documents, prepend=-1) != 0,
            is_target=np.zeros(len(ids), bool),
        )

    def select(self, is_kept: np.ndarray) -> "FlatTokens":
        """Return some of the tokens, of each document those of its start or none.

        Args:
            is_kept: [N].
        """
        names = ("ids", "positions", "documents", "rows", "is_first", "is_target")
        kept: dict[str, Any] = {name: getattr(self, name)[is_kept] for name in names}
        return replace(self, **kept | {"documents": np.cumsum(kept["is_first"]) - 1})

    def merge(self, other: "FlatTokens") -> tuple["FlatTokens", np.ndarray]:
        """Return the tokens of two parts of a batch that have no row in common, row by row, and their order [N].

        The order is that of the tokens of the result among those of this part followed by those of the other one.
        """
        order = np.argsort(np.concatenate([self.rows, other.rows]), kind="stable")
        names = ("ids", "positions", "rows", "is_first", "is_target")
        merged: dict[str, Any] = {
            name: np.concatenate([getattr(self, name), getattr(other, name)])[order] for name in names
        }
        return replace(self, **merged, documents=np.cumsum(merged["is_first"]) - 1), order

    def places(self) -> np.ndarray:
        """Return the index of each token in its document, [N]."""
        starts = np.flatnonzero(self.is_first)
        return np.arange(len(self.ids)) - np.repeat(starts, np.diff(np.append(starts, len(self.ids))))

    def scatter(self, values: np.ndarray) -> np.ndarray:
        """Return values of the tokens [N] as [B, S], 0 for padding."""
        batch = np.zeros(self.shape[0] * self.shape[1], dtype=np.int64)
        batch[self.positions] = values
        return batch.reshape(self.shape)
