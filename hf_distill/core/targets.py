"""Target tokens: the tokens of a batch whose label is not -100.

Shape legend, used in every docstring of the package:
    B batch rows · S positions of a row · V vocabulary (or classes) · T target tokens of a batch · H hidden width
    K ids of a sparse teacher · t, r target tokens of a chunk, of a block · N tokens whose features are compared
    h attention heads · L layers
"""

import builtins
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import DistillError

IGNORE_INDEX = -100
SECOND_VIEW_KEYS = ("view_input_ids", "view_attention_mask", "view_labels")  # keys of a batch's second view


def target_labels(inputs: dict, shift: bool) -> Tensor:
    """Return the label that each position of the logits predicts; -100 marks positions that are no target token.

    Args:
        inputs: the collator's batch; `labels` [B, S] or [B], or `shift_labels` [B, S], which a collator or the trainer
            made, and which are returned.
        shift: whether the logits at position i predict the label at i + 1 (causal language models). The first token
            of a left-padded row is no target token then, because it would be predicted from padding.

    Returns:
        [B, S] or [B].

    Raises:
        DistillError: the batch has no labels.
    """
    if shift and inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]
    labels = inputs.get("labels")
    if labels is None:
        raise DistillError(
            f"The batch has no `labels`; it has {sorted(inputs)}. The losses are computed for the tokens whose label "
            "is not -100: use a collator that makes labels, such as DataCollatorForLanguageModeling(mlm=False)."
        )
    if not shift:
        return labels
    labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == labels.shape:
        labels = labels.masked_fill(mask == 0, IGNORE_INDEX)
    return labels


@dataclass(frozen=True)
class Targets:
    """The target tokens of a batch: those whose label is not -100, after the shift that causal models need.

    labels:         [T] the ids to predict
    positions:      [T] indices of their predictions among the B * S rows of the flattened logits
    batch_rows:     [T] indices of their batch rows
    shape:          (B, S) of the logits, or (B,) for a sequence classifier
    label_mask:     [T] whether the label comes from the data; None if all do. Tokens that the student generated are
                    target tokens without a label
    documents:      [B, S] for features: the document of its row that a token belongs to, counted from 1; 0 for padding
    causal:         for features: whether attention is causal
    """

    labels: Tensor
    positions: Tensor
    batch_rows: Tensor
    shape: torch.Size
    label_mask: Tensor | None = None
    documents: Tensor | None = None
    causal: bool = False

    @classmethod
    def from_batch(cls, inputs: dict, shift: bool) -> "Targets":
        """Find the target tokens of a batch.

        Args:
            inputs: the collator's batch, see `target_labels`; `has_labels` [B] if some rows have no labels from the
                data.
            shift: whether the logits at position i predict the label at i + 1.

        Raises:
            DistillError: the batch has no labels, or labels that are not ids.
        """
        labels = target_labels(inputs, shift)
        if labels.is_floating_point():
            raise DistillError(
                f"`labels` has dtype {labels.dtype}: a regression or multi-label head has no distribution over classes "
                "to distill. Use integer labels, or train it without a teacher."
            )
        flat = labels.reshape(-1)
        positions = (flat != IGNORE_INDEX).nonzero().squeeze(1)
        width = labels.shape[1] if labels.dim() > 1 else 1
        batch_rows, label_mask = positions // width, inputs.get("has_labels")
        return cls(
            flat[positions], positions, batch_rows, labels.shape, None if label_mask is None else label_mask[batch_rows]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def divisor(self, num_items: Tensor | int | None) -> Tensor:
        """Return what a sum over target tokens is divided by, [], at least 1.

        Args:
            num_items: number of target tokens of the global batch; None for the number of these target tokens.
        """
        return torch.as_tensor(len(self) if num_items is None else num_items).clamp(min=1)

    def gather(self, values: Tensor) -> Tensor:
        """Select the target tokens.

        Args:
            values: [*shape, ...].

        Returns:
            [T, ...].

        Raises:
            DistillError: `values` does not have one entry for each position.
        """
        num_dims = len(self.shape)
        if values.shape[:num_dims] != self.shape:
            raise DistillError(self._position_mismatch(values))
        return values.flatten(0, num_dims - 1)[self.positions.to(values.device)]

    def gather_logits(self, logits: Tensor) -> Tensor:
        """Select the target tokens of a model's logits.

        Args:
            logits: [*shape, V].

        Returns:
            [T, V].

        Raises:
            DistillError: the logits do not have one row for each label.
        """
        if logits.dim() != len(self.shape) + 1:
            raise DistillError(self._position_mismatch(logits))
        return self.gather(logits)

    def _position_mismatch(self, values: Tensor) -> str:
        return (
            f"The model returned shape {tuple(values.shape)} for labels of shape {tuple(self.shape)}: predictions and "
            "labels must have the same positions. Use a collator whose labels have one entry for each row of logits, "
            "or a model that predicts at every position of its input."
        )

    def check_ids(self, vocab_size: int) -> None:
        """Check that the student can predict all labels.

        Args:
            vocab_size: V of the student.

        Raises:
            DistillError: a label is below 0 or at least `vocab_size`.
        """
        invalid = self.labels[(self.labels < 0) | (self.labels >= vocab_size)]
        if len(invalid):
            raise DistillError(
                f"{len(invalid)} labels are outside the student's {vocab_size} ids (first: {int(invalid[0])}). Check "
                "that the data was tokenized with the student's tokenizer, or resize the student's embeddings."
            )

    def slice(self, rows: builtins.slice) -> "Targets":
        """Return the targets of some of the target tokens."""
        label_mask = None if self.label_mask is None else self.label_mask[rows]
        return Targets(self.labels[rows], self.positions[rows], self.batch_rows[rows], self.shape, label_mask)

    def first_rows(self, count: int) -> "Targets":
        """Return the target tokens of the first `count` rows of the batch."""
        first = self.batch_rows < count
        label_mask = None if self.label_mask is None else self.label_mask[first]
        shape = torch.Size((min(count, self.shape[0]), *self.shape[1:]))
        return Targets(self.labels[first], self.positions[first], self.batch_rows[first], shape, label_mask)

    def feature_tokens(self, inputs: dict, causal: bool, stack: str | None = None) -> "FeatureTokens":
        """Return the N tokens whose features are compared.

        These are the target tokens. Where the features are those of other tokens (a sequence classifier, the encoder
        of an encoder-decoder model), they are all tokens of the rows that have target tokens.

        Args:
            inputs: the collator's batch.
            causal: whether attention is causal.
            stack: "encoder" or "decoder" of a model that has both: the stack whose features are compared.

        Returns:
            the tokens; `RowPositions` if the batch has no ids, so that S is known only after a model has run.
        """
        aligned, device = len(self.shape) == 2 and stack != "encoder", self.labels.device
        ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if aligned and stack == "decoder":
            documents = _documents(self.shape, inputs.get("decoder_attention_mask"), None, device)
        elif ids is None and not aligned:
            return RowPositions(self, inputs.get("attention_mask"), causal)
        else:
            shape = self.shape if ids is None else ids.shape[:2]
            documents = _documents(shape, inputs.get("attention_mask"), inputs.get("position_ids"), device)
        if aligned:
            return replace(self, documents=documents, causal=causal)
        return self.all_tokens_of_rows(documents, causal)

    def all_tokens_of_rows(self, documents: Tensor, causal: bool) -> "Targets":
        """Return all tokens of the rows that have target tokens.

        Args:
            documents: [B, S], 0 for padding.
            causal: whether attention is causal.
        """
        has_targets = torch.zeros(len(documents), dtype=torch.bool, device=documents.device)
        has_targets[self.batch_rows] = True
        positions = ((documents > 0) & has_targets[:, None]).flatten().nonzero().squeeze(1)
        labels = torch.full_like(positions, IGNORE_INDEX)
        batch_rows = positions // documents.shape[1]
        return Targets(labels, positions, batch_rows, documents.shape, documents=documents, causal=causal)

    def document_ids(self) -> Tensor:
        """Return the document of each of the N tokens, counted within its row, [N]."""
        assert self.documents is not None, "only `feature_tokens()` sets documents"
        return self.documents.flatten()[self.positions]

    def by_row(self) -> list[tuple[int, builtins.slice]]:
        """Return each batch row that has some of the N tokens, with the slice of its tokens, in order."""
        rows, counts = torch.unique_consecutive(self.batch_rows, return_counts=True)
        ends = counts.cumsum(0).tolist()
        return [(row, slice(*span)) for row, span in zip(rows.tolist(), pairwise([0, *ends]), strict=True)]

    def visible(self) -> Tensor:
        """Return the positions of its row that each of the N tokens attends to, as a mask [N, S].

        These are the positions of its document; with causal attention, up to the token itself.
        """
        assert self.documents is not None, "only `feature_tokens()` sets documents"
        width = self.documents.shape[1]
        mask = self.documents[self.batch_rows] == self.document_ids()[:, None]
        if self.causal:
            mask &= torch.arange(width, device=mask.device) <= (self.positions % width)[:, None]
        return mask

    def to_target_tokens(self, values: Tensor, targets: "Targets") -> Tensor:
        """Convert one value for each of the N tokens into one for each target token.

        Args:
            values: [N].
            targets: the target tokens of the batch.

        Returns:
            [T]: the values themselves if the N tokens are the target tokens, else the mean over the tokens of the row.
        """
        if self.positions is targets.positions:
            return values
        sums = values.new_zeros(self.shape[0]).index_add(0, self.batch_rows, values)
        counts = torch.bincount(self.batch_rows, minlength=self.shape[0]).clamp(min=1)
        return (sums / counts)[targets.batch_rows]


class RowPositions:
    """All positions of the rows that have target tokens, in a batch without ids: S is known after a model has run.

    Args:
        targets: the target tokens.
        attention_mask: [B, S_in] of the inputs; if S_in is not the model's number of positions, it must mask nothing.
        causal: whether attention is causal.
    """

    def __init__(self, targets: Targets, attention_mask: Tensor | None, causal: bool):
        self._targets, self._mask, self.causal = targets, attention_mask, causal
        self._resolved: Targets | None = None

    def gather(self, values: Tensor) -> Tensor:
        """Select the N tokens of `values` [B, S, ...] as [N, ...]."""
        return self.resolve(values.shape[:2]).gather(values)

    def resolve(self, shape: torch.Size) -> Targets:
        """Return the N tokens among the positions of a model.

        Args:
            shape: (B, S) of the model's hidden states.

        Raises:
            DistillError: S differs from that of an earlier call, or the padding cannot be located among the positions.
        """
        if self._resolved is None:
            mask, device = self._mask, self._targets.labels.device
            if mask is not None and mask.shape != shape and bool((mask == 0).any()):
                raise DistillError(
                    f"The attention_mask has shape {tuple(mask.shape)} and the hidden states have shape "
                    f"{tuple(shape)}, so padding cannot be found among the positions: use batches without "
                    "padding, or remove the losses on hidden states and attention."
                )
            self._resolved = self._targets.all_tokens_of_rows(_documents(shape, mask, None, device), self.causal)
        if self._resolved.shape != shape:
            raise DistillError(
                f"One model has hidden states of shape {tuple(self._resolved.shape)} and the other of shape "
                f"{tuple(shape)} for the same batch. Losses on hidden states and attention compare position by "
                "position: remove these losses, or use models with the same number of positions."
            )
        return self._resolved

    def resolved(self) -> Targets:
        """Return the N tokens; a model must have run before."""
        assert self._resolved is not None, "no model has run"
        return self._resolved


FeatureTokens: TypeAlias = Targets | RowPositions


def _documents(shape: torch.Size, mask: Tensor | None, position_ids: Tensor | None, device: torch.device) -> Tensor:
    """Return the document of each token, [B, S]: counted from 1 where `position_ids` restart at 0; 0 for padding."""
    documents = torch.ones(shape, dtype=torch.long, device=device)
    if position_ids is not None and position_ids.shape == shape:
        documents = (position_ids == 0).cumsum(1)
    if mask is not None and mask.shape == shape:
        documents = documents * (mask != 0)
    return documents
