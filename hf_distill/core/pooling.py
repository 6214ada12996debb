"""Embeddings: the last hidden states of a model, pooled to one vector for each row of a batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DistillError
from .logits import compute_dtype
from .targets import IGNORE_INDEX, RowPositions, Targets, token_documents

_LENGTH_FUNCTIONS = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")  # of speech models
_SPAN = "span of documents"


def pool(hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Return one vector for each row of hidden states.

    mean: sum_s mask_s h_s / sum_s mask_s     cls: h at the first position of the mask     last: h at the last one

    Args:
        hidden: [B, S, H].
        mask: [B, S], true for positions without padding, which may be on either side; None: there is no padding.
        pooling: one of `POOLINGS`.

    Returns:
        [B, H] in float32, or float64 if the hidden states are; zeros for the mean of a row of padding.
    """
    hidden = hidden.to(compute_dtype(hidden))
    if mask is None:
        return hidden.mean(1) if pooling == "mean" else hidden[:, 0 if pooling == "cls" else -1]
    if pooling == "mean":
        weights = mask.to(hidden)[..., None]
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    numbers = mask.long() if pooling == "cls" else mask.long().cumsum(1) * mask
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, numbers.argmax(1)]  # the first one of the largest


def document_numbers(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the number by which `PooledRows` finds packed documents, for `Targets.from_batch`; empty without ids."""
    if inputs.get("input_ids", inputs.get("inputs_embeds")) is None:
        return {}
    documents = token_documents(dict(inputs))
    first = documents.masked_fill(documents == 0, documents.shape[1]).amin(1)
    return {_SPAN: (documents.amax(1) - first).clamp(min=0).amax()[None]}


class PooledRows(RowPositions):
    """The rows of a batch, each of which has one embedding.

    Args:
        targets: the target tokens.
        inputs: the batch that the model reads.

    Raises:
        DistillError: a row has several documents.
    """

    def __init__(self, targets: Targets, inputs: Mapping[str, Any]):
        super().__init__(targets, inputs.get("attention_mask"), causal=False)
        if any(targets.numbers.get(_SPAN, ())) or "cu_seq_lens_q" in inputs:
            raise DistillError(
                "A row of the batch has several packed documents, and a loss on embeddings compares one embedding for "
                "each row: use a collator that pads, such as DataCollatorWithPadding, and no packing."
            )
        if inputs.get("input_ids", inputs.get("inputs_embeds")) is not None:
            self._mask = token_documents(dict(inputs)) > 0

    def embed(self, hidden: Tensor, pooling: str, model: nn.Module) -> Tensor:
        """Return the embedding of each row, [B, H].

        Args:
            hidden: [B, S, H], the last hidden states.
            pooling: one of `POOLINGS`.
            model: the model that returned them, whose own function counts the frames of a sound.

        Raises:
            DistillError: padding cannot be found among the positions, or there are no rows of hidden states.
        """
        if hidden.dim() != 3:
            raise DistillError(
                f"{type(model).__name__} returns a last_hidden_state of shape {tuple(hidden.shape)}, and embeddings "
                "are pooled from hidden states of shape [B, S, H]: use a transformer, or remove these losses."
            )
        embeddings = pool(hidden, self._mask_of(hidden, model), pooling)
        self._set_rows(len(embeddings))
        return embeddings

    def _mask_of(self, hidden: Tensor, model: nn.Module) -> Tensor | None:
        mask = None if self._mask is None else self._mask.to(hidden.device) != 0
        if mask is None or mask.shape == hidden.shape[:2]:
            return mask
        length = next((getattr(model, each) for each in _LENGTH_FUNCTIONS if hasattr(model, each)), None)
        num_frames = None if length is None or mask.dim() != 2 else int(length(torch.tensor([mask.shape[1]])))
        if length is not None and num_frames == hidden.shape[1]:  # the first frames are those of the sound
            return torch.arange(num_frames, device=hidden.device) < length(mask.sum(1)).to(hidden.device)[:, None]
        if min(self._token_counts(), default=0) >= mask.shape[-1]:
            return None
        raise DistillError(
            f"The attention_mask has shape {tuple(mask.shape)} and the hidden states have shape {tuple(hidden.shape)}, "
            f"so padding cannot be found among the positions of {type(model).__name__}: use batches without padding, "
            "or remove the losses on embeddings."
        )

    def _set_rows(self, count: int) -> None:
        """Let `resolved` return the rows, of which there are several for each row of a batch with choices."""
        num_rows = self._targets.shape[0]
        if num_rows and count % num_rows:
            raise DistillError(
                f"A model returned {count} embeddings for {num_rows} rows of the batch: it must return the hidden "
                "states of each row."
            )
        rows = torch.arange(count, device=self._targets.labels.device)
        labels = torch.full_like(rows, IGNORE_INDEX)
        self._resolved = Targets(labels, rows, rows, torch.Size([count]), row_counts=[1] * count)


__all__ = ["PooledRows", "document_numbers", "pool"]
