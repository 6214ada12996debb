"""What passes between the parts: which tokens are asked, and what a model said about them.

Shape legend, used in every docstring of the package:
    B batch rows · S positions of a row · V vocabulary (or classes) · T asked tokens of a batch · H hidden width
    K ids of a sparse teacher · t, r asked tokens of a chunk, of a block · N tokens whose features are compared
    h attention heads · L layers
"""

import builtins
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import DistillError

IGNORE_INDEX = -100
SECOND_VIEW_KEYS = ("view_input_ids", "view_attention_mask", "view_labels")  # a batch's second view of itself


def target_labels(inputs: dict, shift: bool) -> Tensor:
    """The label that each position of the logits predicts, -100 where none is asked.

    Args:
        inputs: the collator's batch; `labels` [B, S] or [B], or `shift_labels` [B, S] where a collator made them.
        shift: True when the prediction at position i is for the label at i + 1 (causal language models). The first
            token of a left-padded row is not asked then: it would be predicted from padding.

    Returns:
        [B, S] or [B].

    Raises:
        DistillError: no labels.
    """
    if shift and inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]
    labels = inputs.get("labels")
    if labels is None:
        raise DistillError(
            f"The batch has no `labels`, only {sorted(inputs)}. Distillation asks for the tokens whose label is not "
            "-100: use a collator that makes labels, such as DataCollatorForLanguageModeling(mlm=False)."
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
    """The asked tokens of a batch: those whose label is not -100, after the one shift that causal models need.

    labels:    [T] the id to be predicted
    positions: [T] where its prediction stands among the B*S rows of the flattened logits
    rows:      [T] the batch row it belongs to
    shape:     (B, S) of the logits, or (B,) for a classifier of whole sequences
    labelled:  [T] whether the label is the data's; None: all are. A completion that the student wrote has no label
    documents: [B, S] for features: which document of its row a token belongs to, counted from 1; 0 for padding
    causal:    for features: whether a token sees none after it
    """

    labels: Tensor
    positions: Tensor
    rows: Tensor
    shape: torch.Size
    has_label_mask: Tensor | None = None
    documents: Tensor | None = None
    causal: bool = False

    @classmethod
    def from_batch(cls, inputs: dict, shift: bool) -> "Targets":
        """Read the targets of a batch; see `target_labels`, and `has_labels` [B] where some rows have no labels.

        Raises:
            DistillError: no labels, or labels that are not ids.
        """
        labels = target_labels(inputs, shift)
        if labels.is_floating_point():
            raise DistillError(
                f"`labels` has dtype {labels.dtype}: a regression or multi-label head has no distribution over classes "
                "to distil. Use integer labels, or train it without a teacher."
            )
        flat = labels.reshape(-1)
        positions = (flat != IGNORE_INDEX).nonzero().squeeze(1)
        width = labels.shape[1] if labels.dim() > 1 else 1
        rows, has_label_mask = positions // width, inputs.get("has_labels")
        return cls(
            flat[positions], positions, rows, labels.shape, None if has_label_mask is None else has_label_mask[rows]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def divisor(self, num_items: Tensor | int | None) -> Tensor:
        """What a sum over asked tokens is divided by, []: `num_items` of the whole global batch; None: these."""
        return torch.as_tensor(len(self) if num_items is None else num_items).clamp(min=1)

    def gather(self, values: Tensor) -> Tensor:
        """Asked rows of `values` [*shape, ...] as [T, ...].

        Raises:
            DistillError: `values` does not have one row a position.
        """
        lead = len(self.shape)
        if values.shape[:lead] != self.shape:
            raise DistillError(self._other_positions(values))
        return values.flatten(0, lead - 1)[self.positions.to(values.device)]

    def gather_logits(self, logits: Tensor) -> Tensor:
        """Target rows of the logits of a model, [*shape, V], as [T, V].

        Raises:
            DistillError: the logits do not have one row for each label.
        """
        if logits.dim() != len(self.shape) + 1:
            raise DistillError(self._other_positions(logits))
        return self.gather(logits)

    def _other_positions(self, values: Tensor) -> str:
        return (
            f"The model answered with shape {tuple(values.shape)} for labels of shape {tuple(self.shape)}: predictions "
            "and labels must stand at the same positions. Use a collator whose labels have one entry for each row of "
            "logits, or a model that predicts at every position of its input."
        )

    def check_ids(self, vocab_size: int) -> None:
        """Refuse labels that the student cannot predict.

        Raises:
            DistillError: a label below 0 or at least `vocab_size`.
        """
        wrong = self.labels[(self.labels < 0) | (self.labels >= vocab_size)]
        if len(wrong):
            raise DistillError(
                f"{len(wrong)} labels are outside the student's {vocab_size} ids (first: {int(wrong[0])}). Check that "
                "the data was tokenised with the student's tokenizer, or resize the student's embeddings."
            )

    def slice(self, rows: builtins.slice) -> "Targets":
        """The same for some of the asked tokens."""
        has_label_mask = None if self.has_label_mask is None else self.has_label_mask[rows]
        return Targets(self.labels[rows], self.positions[rows], self.rows[rows], self.shape, has_label_mask)

    def first_rows(self, count: int) -> "Targets":
        """The target tokens of the first rows of the batch."""
        first = self.rows < count
        has_label_mask = None if self.has_label_mask is None else self.has_label_mask[first]
        shape = torch.Size((min(count, self.shape[0]), *self.shape[1:]))
        return Targets(self.labels[first], self.positions[first], self.rows[first], shape, has_label_mask)

    def feature_positions(self, inputs: dict, causal: bool, stack: str | None = None) -> "Targets":
        """The N tokens whose features are compared: the asked ones; or, where the asked are not among the tokens (a
        class of a whole row, the encoder of a decoder's tokens), every token of the rows that ask.

        Args:
            inputs: the collator's batch.
            causal: whether a token sees none after it.
            stack: "encoder" or "decoder" of a model that has both: whose features.
        """
        aligned, device = len(self.shape) == 2 and stack != "encoder", self.labels.device
        ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if aligned and stack == "decoder":
            documents = _documents(self.shape, inputs.get("decoder_attention_mask"), None, device)
        elif ids is None and not aligned:
            rows: Any = RowPositions(self, inputs.get("attention_mask"), causal)  # becomes targets once a model ran
            return rows
        else:
            shape = self.shape if ids is None else ids.shape[:2]
            documents = _documents(shape, inputs.get("attention_mask"), inputs.get("position_ids"), device)
        if aligned:
            return replace(self, documents=documents, causal=causal)
        return self._whole_rows(documents, causal)

    def _whole_rows(self, documents: Tensor, causal: bool) -> "Targets":
        """Every token of the rows that have target tokens, given the documents [B, S]."""
        asks = torch.zeros(len(documents), dtype=torch.bool, device=documents.device)
        asks[self.rows] = True
        positions = ((documents > 0) & asks[:, None]).flatten().nonzero().squeeze(1)
        labels = torch.full_like(positions, IGNORE_INDEX)
        rows = positions // documents.shape[1]
        return Targets(labels, positions, rows, documents.shape, documents=documents, causal=causal)

    def own_documents(self) -> Tensor:
        """The document of each of N tokens, within its row, [N]."""
        assert self.documents is not None, "only `feature_positions()` knows documents"
        return self.documents.flatten()[self.positions]

    def by_row(self) -> list[tuple[int, builtins.slice]]:
        """Each batch row that has some of the N tokens, and which of them, in order."""
        rows, counts = torch.unique_consecutive(self.rows, return_counts=True)
        ends = counts.cumsum(0).tolist()
        return [(row, slice(*span)) for row, span in zip(rows.tolist(), pairwise([0, *ends]), strict=True)]

    def visible(self) -> Tensor:
        """Which positions of its row each of N tokens may see, [N, S]: its document, up to itself where causal."""
        assert self.documents is not None, "only `feature_positions()` knows what is padding"
        width = self.documents.shape[1]
        seen = self.documents[self.rows] == self.own_documents()[:, None]
        if self.causal:
            seen &= torch.arange(width, device=seen.device) <= (self.positions % width)[:, None]
        return seen

    def to_target_tokens(self, values: Tensor, asked: "Targets") -> Tensor:
        """Values of N tokens as [T] of the asked ones: as they are where these are the asked, else means of rows."""
        if self.positions is asked.positions:
            return values
        sums = values.new_zeros(self.shape[0]).index_add(0, self.rows, values)
        counts = torch.bincount(self.rows, minlength=self.shape[0]).clamp(min=1)
        return (sums / counts)[asked.rows]


class RowPositions:
    """Every position of the rows that have target tokens, in a batch without ids: how many is known once a model ran.

    Args:
        targets: the target tokens.
        attention_mask: of the inputs; where it has another length than the model's positions, it must mask nothing.
        causal: whether a token sees none after it.
    """

    def __init__(self, targets: Targets, attention_mask: Tensor | None, causal: bool):
        self._targets, self._mask, self._causal = targets, attention_mask, causal
        self._known: Targets | None = None

    def gather(self, values: Tensor) -> Tensor:
        """The rows of `values` [B, S, ...] as [N, ...]."""
        return self.at(values.shape[:2]).gather(values)

    def at(self, shape: torch.Size) -> Targets:
        """The N tokens among [B, S] positions.

        Raises:
            DistillError: another S than before, or padding that cannot be found in the positions.
        """
        if self._known is None:
            mask, device = self._mask, self._targets.labels.device
            if mask is not None and mask.shape != shape and bool((mask == 0).any()):
                raise DistillError(
                    f"The attention_mask has shape {tuple(mask.shape)} and the model {tuple(shape)} positions, so that "
                    "padding cannot be found among them: use batches without padding, or leave the losses on hidden "
                    "states and attention out."
                )
            self._known = self._targets._whole_rows(_documents(shape, mask, None, device), self._causal)
        if self._known.shape != shape:
            raise DistillError(
                f"One model has {tuple(self._known.shape)} positions and the other {tuple(shape)} for the same batch: "
                "losses on hidden states and attention compare position by position. Leave them out."
            )
        return self._known

    def found(self) -> Targets:
        """The N tokens, after a model ran."""
        assert self._known is not None, "no model has run"
        return self._known


def _documents(shape: torch.Size, mask: Tensor | None, position_ids: Tensor | None, device: torch.device) -> Tensor:
    """[B, S]: documents of packed rows counted from 1, where positions start again; 0 for padding."""
    documents = torch.ones(shape, dtype=torch.long, device=device)
    if position_ids is not None and position_ids.shape == shape:
        documents = (position_ids == 0).cumsum(1)
    if mask is not None and mask.shape == shape:
        documents = documents * (mask != 0)
    return documents
