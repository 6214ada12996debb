"""Target tokens: the tokens of a batch whose label is not -100.

Shape legend, used in every docstring of the package:
    B batch rows · S positions of a row · V vocabulary (or classes) · T target tokens of a batch · H hidden width
    K ids of a sparse teacher · t, r target tokens of a chunk, of a block · N tokens whose features are compared
    h attention heads · L layers
"""

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import DistillError
from .transcripts import TranscriptLabels

IGNORE_INDEX = -100
TEACHER_PREFIX = "teacher_"  # of the keys of a batch that the teacher alone reads; see `teacher_inputs`
TEACHER_INDEX = "teacher_index"  # key of a batch: index of the teacher of each row or token, -1 for none
SECOND_VIEW_KEYS = ("view_input_ids", "view_attention_mask", "view_labels")  # keys of a batch's second view


def real_labels(inputs: dict) -> Tensor:
    """Return `labels` that are real numbers, [B] or [B, C].

    Raises:
        DistillError: the batch has no labels, or integer labels.
    """
    labels = target_labels(inputs, shift=False)
    if not labels.is_floating_point():
        raise DistillError(
            f"`labels` has dtype {inputs['labels'].dtype}, and the labels of a multi-label classifier or a regression "
            "model are floating-point numbers: convert them, for example with torch.float32."
        )
    return labels


def as_int64(labels: Tensor) -> Tensor:
    """Return integer labels as int64, which the losses need; floating-point labels as they are."""
    return labels if labels.is_floating_point() else labels.long()


def target_labels(inputs: dict, shift: bool) -> Tensor:
    """Return the label that each position of the logits predicts; -100 marks positions that are no target token.

    Args:
        inputs: the collator's batch; `labels` [B, S] or [B], or `shift_labels` [B, S], which a collator or the trainer
            made, and which are returned.
        shift: whether the logits at position i predict the label at i + 1 (causal language models). The first token
            of a left-padded row is no target token then, because it would be predicted from padding.

    Returns:
        [B, S] or [B]; integers and booleans of any dtype as int64.

    Raises:
        DistillError: the batch has no labels.
    """
    if shift and inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]
    labels = inputs.get("labels")
    if labels is None:
        raise DistillError(
            f"The batch has no `labels`; it has {sorted(inputs)}. The losses are computed for the targets whose label "
            "is not -100: name the column of the data `labels`, or use a collator that makes labels, such as "
            "DataCollatorForLanguageModeling(mlm=False) for causal language models."
        )
    labels = as_int64(labels)
    if not shift:
        return labels
    labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == labels.shape:
        labels = labels.masked_fill(mask == 0, IGNORE_INDEX)
    return labels


def true_indices(mask: Tensor, count: int) -> Tensor:
    """Return the indices of the true elements of a mask, as `mask.nonzero()`, without waiting for the device.

    Args:
        mask: [n].
        count: number of true elements, which `nonzero` would read from the device.

    Returns:
        [count].
    """
    return torch.nonzero_static(mask, size=count).squeeze(1)


@dataclass(frozen=True)
class Targets:
    """The target tokens of a batch: those whose label is not -100, after the shift that causal models need.

    labels:         [T] the ids to predict; real numbers of rows, [B] or [B, C], if the targets are rows
    positions:      [T] indices of their predictions among the B * S rows of the flattened logits
    batch_rows:     [T] indices of their batch rows
    shape:          (B, S) of the logits, or (B,) for a sequence classifier
    label_mask:     [T] whether the label comes from the data; None if all do. Tokens that the student generated are
                    target tokens without a label
    documents:      [B, S] for features: the document of its row that a token belongs to, counted from 1; 0 for padding
    causal:         for features: whether attention is causal
    transcripts:    the labels of the rows if the targets are frames, whose `labels` are 0
    grid:           (H, W) if the targets are the pixels of images, S = H * W
    allowed:        [T, S] the positions of its row that a start or end of a span may have; None for other targets
    weights:        [T] factors of the losses, see `row_values`; None if all are 1
    origins:        [T] indices in `ORIGINS` of the authors of the tokens; None if unknown
    row_counts:     number of target tokens of each batch row, B integers; None if unknown
    label_range:    smallest and largest label; None if unknown
    numbers:        further numbers of the batch that `from_batch` read from the device
    """

    labels: Tensor
    positions: Tensor
    batch_rows: Tensor
    shape: torch.Size
    label_mask: Tensor | None = None
    documents: Tensor | None = None
    causal: bool = False
    transcripts: TranscriptLabels | None = None
    grid: tuple[int, int] | None = None
    allowed: Tensor | None = None
    weights: Tensor | None = None
    origins: Tensor | None = None
    row_counts: Sequence[int] | None = None
    label_range: tuple[int, int] | None = None
    numbers: Mapping[str, Sequence[int]] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def from_batch(cls, inputs: dict, shift: bool, numbers: Mapping[str, Tensor] | None = None) -> "Targets":
        """Find the target tokens of a batch.

        All numbers that the host needs are read from the device at once, because it waits for the device there.

        Args:
            inputs: the collator's batch, see `target_labels`; `has_labels` [B] if some rows have no labels from the
                data.
            shift: whether the logits at position i predict the label at i + 1.
            numbers: name -> [n] integers on the device that are read too, as `Targets.numbers`.

        Raises:
            DistillError: the batch has no labels, or labels that are not ids.
        """
        labels = target_labels(inputs, shift)
        if labels.is_floating_point():
            raise DistillError(
                f"`labels` has dtype {labels.dtype}, and the student predicts one of several ids or classes: use "
                "integer labels, or set problem_type='multi_label_classification' or 'regression' in the config of the "
                "student. Analyses and caches read integer labels only."
            )
        is_target, label_mask = labels != IGNORE_INDEX, inputs.get("has_labels")
        ids = labels.masked_fill(~is_target, 0)
        label_range = torch.stack(ids.aminmax()) if labels.numel() else ids.new_zeros(2)
        sizes = {"rows": is_target.flatten(1).sum(1) if labels.dim() > 1 else is_target, "range": label_range}
        on_host = _read(sizes | dict(numbers or {}))
        row_counts, (smallest, largest) = on_host.pop("rows"), on_host.pop("range")
        return cls.of_counts(labels, row_counts, (smallest, largest), label_mask, None, on_host)

    @classmethod
    def of_rows(cls, labels: Tensor, numbers: Mapping[str, Tensor] | None = None) -> "Targets":
        """Return one target for each row of a batch.

        Args:
            labels: [B, ...], one entry for each row.
            numbers: name -> [n] integers on the device that are read, as `Targets.numbers`.
        """
        rows = torch.arange(len(labels), device=labels.device)
        on_host = _read(numbers) if numbers else {}
        return cls(labels, rows, rows, labels.shape[:1], row_counts=[1] * len(labels), numbers=on_host)

    @classmethod
    def of_counts(
        cls,
        labels: Tensor,
        row_counts: Sequence[int],
        label_range: tuple[int, int] | None,
        has_labels: Tensor | None = None,
        label_mask: Tensor | None = None,
        numbers: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> "Targets":
        """Return the target tokens of labels whose number of target tokens in each row is known.

        Args:
            labels: [B, S] or [B], -100 where there is no target token.
            row_counts: B numbers of target tokens.
            label_range: smallest and largest label.
            has_labels: [B] whether the labels of a row come from the data; None if all do, or `label_mask` is given.
            label_mask: [T] the same for each target token.
            numbers: further numbers that were read.
        """
        positions = true_indices((labels != IGNORE_INDEX).reshape(-1), sum(row_counts))
        batch_rows = positions // (labels.shape[1] if labels.dim() > 1 else 1)
        return cls(
            labels.reshape(-1)[positions],
            positions,
            batch_rows,
            labels.shape,
            label_mask if has_labels is None else has_labels[batch_rows],
            row_counts=row_counts,
            label_range=label_range,
            numbers=numbers,
        )

    @property
    def has_ids(self) -> bool:
        """Whether each label is an id or a class, and not a real number, several numbers, or a position of a span."""
        is_of_row = self.allowed is not None or self.transcripts is not None
        return not is_of_row and self.labels.dim() == 1 and not self.labels.is_floating_point()

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

    def gather_by_row(self, values: Tensor) -> Tensor:
        """Select the target tokens of values of each row [B], or of each position [*shape]; returns [T]."""
        return self.gather(values) if values.dim() == len(self.shape) else values[self.batch_rows]

    def gather_logits(self, logits: Tensor) -> Tensor:
        """Select the target tokens of a model's logits.

        Args:
            logits: [*shape, V]; [B, V, h, w] of images, which are interpolated to the grid of the labels.

        Returns:
            [T, V].

        Raises:
            DistillError: the logits do not have one row for each label.
        """
        if self.grid is not None and logits.dim() == 4:
            logits = torch.nn.functional.interpolate(logits, size=self.grid, mode="bilinear", align_corners=False)
            logits = logits.flatten(2).transpose(1, 2)  # [B, H * W, V]
        if logits.dim() == len(self.shape) == 1 and not self.has_ids:  # one real number for each row
            logits = logits[:, None]
        if logits.dim() != len(self.shape) + 1:
            raise DistillError(self._position_mismatch(logits))
        return self.gather(logits)

    def _position_mismatch(self, values: Tensor) -> str:
        if self.transcripts is not None and values.dim() == 3:
            return (
                f"One model returns {values.shape[1]} frames for each row and the student {self.shape[1]}, so their "
                "frames cannot be compared: use two models that make the same number of frames of the same sound "
                "(conv_kernel, conv_stride and adapters of their configs)."
            )
        return (
            f"The model returned shape {tuple(values.shape)} for labels of shape {tuple(self.shape)}: predictions and "
            "labels must have the same positions. Use a collator whose labels have one entry for each row of logits, "
            "or a model that predicts at every position of its input."
        )

    def check_ids(self, vocab_size: int, is_vocabulary: bool = True) -> None:
        """Check that the student can predict all labels.

        Args:
            vocab_size: V of the student.
            is_vocabulary: whether the labels are ids of tokens, and not classes; for the message.

        Raises:
            DistillError: a label is below 0 or at least `vocab_size`.
        """
        if self.label_range is not None and self.label_range[0] >= 0 and self.label_range[1] < vocab_size:
            return
        invalid = self.labels[(self.labels < 0) | (self.labels >= vocab_size)]
        if not len(invalid):
            return
        kind = "ids" if is_vocabulary else "classes"
        raise DistillError(
            f"{len(invalid)} labels are outside the student's {vocab_size} {kind} (first: {int(invalid[0])}). "
            + (
                "Check that the data was tokenized with the student's tokenizer, or resize the student's embeddings."
                if is_vocabulary
                else f"Classes are counted from 0 to {vocab_size - 1}: correct the labels, or load both models with as "
                "many classes as the data has (num_labels). A label of -100 marks what is no target."
            )
        )

    def slice(self, rows: builtins.slice | Tensor) -> "Targets":
        """Return the targets of some of the target tokens."""
        label_mask, allowed, weights, origins = (
            None if values is None else values[rows]
            for values in (self.label_mask, self.allowed, self.weights, self.origins)
        )
        return Targets(
            self.labels[rows],
            self.positions[rows],
            self.batch_rows[rows],
            self.shape,
            label_mask,
            transcripts=self.transcripts,
            grid=self.grid,
            allowed=allowed,
            weights=weights,
            origins=origins,
        )

    def first_rows(self, count: int) -> "Targets":
        """Return the target tokens of the first `count` rows of the batch."""
        first = self.batch_rows < count
        label_mask = None if self.label_mask is None else self.label_mask[first]
        shape = torch.Size((min(count, self.shape[0]), *self.shape[1:]))
        transcripts = self.transcripts
        if transcripts is not None:
            transcripts = replace(transcripts, labels=transcripts.labels[:count])
        return Targets(
            self.labels[first],
            self.positions[first],
            self.batch_rows[first],
            shape,
            label_mask,
            transcripts=transcripts,
            grid=self.grid,
        )

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
        device = self.labels.device
        if self.documents is not None:  # frames
            return replace(self, causal=causal)
        aligned = len(self.shape) == 2 and self.allowed is None and self.grid is None and stack != "encoder"
        ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if aligned and stack == "decoder":
            documents = _documents(self.shape, inputs.get("decoder_attention_mask"), None, device)
        elif ids is None and not aligned:
            return RowPositions(self, inputs.get("attention_mask"), causal)
        else:
            mask, position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
            documents = _documents(self.shape, mask, position_ids, device) if ids is None else token_documents(inputs)
        if aligned:
            return replace(self, documents=documents, causal=causal)
        return self.all_tokens_of_rows(documents, causal, self.numbers.get("tokens"))

    def all_tokens_of_rows(self, documents: Tensor, causal: bool, counts: Sequence[int] | None = None) -> "Targets":
        """Return all tokens of the rows that have target tokens.

        Args:
            documents: [B, S], 0 for padding; [B * C, S] if each row has the texts of C choices.
            causal: whether attention is causal.
            counts: numbers of tokens, one for each row of `documents`; None: they are read from the device.
        """
        num_texts = len(documents) // self.shape[0] if self.shape[0] else 1
        has_targets = torch.zeros(self.shape[0], dtype=torch.bool, device=documents.device)
        has_targets.index_fill_(0, self.batch_rows, True)
        is_token = (documents > 0) & has_targets.repeat_interleave(num_texts)[:, None]
        if counts is None or self.row_counts is None:
            row_counts = is_token.sum(1).tolist()
        else:
            row_counts = [count if self.row_counts[i // num_texts] else 0 for i, count in enumerate(counts)]
        positions = true_indices(is_token.flatten(), sum(row_counts))
        labels = torch.full_like(positions, IGNORE_INDEX)
        batch_rows = positions // documents.shape[1]
        return Targets(
            labels, positions, batch_rows, documents.shape, None, documents, causal=causal, row_counts=row_counts
        )

    def document_ids(self) -> Tensor:
        """Return the document of each of the N tokens, counted within its row, [N]."""
        assert self.documents is not None, "only `feature_tokens()` sets documents"
        return self.documents.flatten()[self.positions]

    def by_row(self) -> list[tuple[int, builtins.slice]]:
        """Return each batch row that has some of the N tokens, with the slice of its tokens, in order."""
        assert self.row_counts is not None, "only targets of a whole batch have counts"
        spans = pairwise(accumulate(self.row_counts, initial=0))
        return [(row, slice(*span)) for row, span in enumerate(spans) if span[0] < span[1]]

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
        num_rows = targets.shape[0]
        rows = self.batch_rows // (self.shape[0] // num_rows)  # the texts of all choices belong to one row
        sums = values.new_zeros(num_rows).index_add(0, rows, values)
        counts = values.new_zeros(num_rows).index_add(0, rows, torch.ones_like(values))
        return (sums / counts.clamp(min=1))[targets.batch_rows]


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
            mask, device, counts = self._mask, self._targets.labels.device, self._token_counts()
            if mask is not None and mask.shape != shape and min(counts, default=0) < mask.shape[-1]:
                raise DistillError(
                    f"The attention_mask has shape {tuple(mask.shape)} and the hidden states have shape "
                    f"{tuple(shape)}, so padding cannot be found among the positions: use batches without "
                    "padding, or remove the losses on hidden states and attention."
                )
            counts = counts if mask is not None and mask.shape == shape else [shape[1]] * shape[0]
            documents = _documents(shape, mask, None, device)
            self._resolved = self._targets.all_tokens_of_rows(documents, self.causal, counts)
        if self._resolved.shape != shape:
            raise DistillError(
                f"One model has hidden states of shape {tuple(self._resolved.shape)} and the other of shape "
                f"{tuple(shape)} for the same batch. Losses on hidden states and attention compare position by "
                "position: remove these losses, or use models with the same number of positions."
            )
        return self._resolved

    def _token_counts(self) -> Sequence[int]:
        """Return the number of tokens that the mask leaves of each row; empty without a mask."""
        if self._mask is None:
            return []
        counts = self._targets.numbers.get("tokens")
        return (self._mask != 0).flatten(1).sum(1).tolist() if counts is None else counts

    def resolved(self) -> Targets:
        """Return the N tokens; a model must have run before."""
        assert self._resolved is not None, "no model has run"
        return self._resolved


FeatureTokens: TypeAlias = Targets | RowPositions


def token_documents(inputs: dict) -> Tensor:
    """Return the document of each token of a batch with `input_ids` or `inputs_embeds`, [B, S]; see `Targets`.

    The texts of the C choices of a row, [B, C, S] with labels [B], are rows of their own, as in the model: [B * C, S].
    """
    ids = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"][..., 0]
    labels, mask, position_ids = (inputs.get(name) for name in ("labels", "attention_mask", "position_ids"))
    has_choices = ids.dim() == 3 and labels is not None and labels.dim() == 1
    shape = ids.shape if has_choices else ids.shape[:2]
    return _documents(shape, mask, position_ids, ids.device).flatten(0, -2)


def token_counts(inputs: dict) -> dict[str, Tensor]:
    """Return the numbers by which `feature_tokens` finds all tokens of a row, for `Targets.from_batch`.

    Args:
        inputs: the collator's batch.

    Returns:
        {"tokens": [B]}, the number of tokens of each row, or [B * C] for those of C choices; empty if neither ids nor a
        mask tell it.
    """
    ids, mask = inputs.get("input_ids", inputs.get("inputs_embeds")), inputs.get("attention_mask")
    if ids is not None:
        return {"tokens": (token_documents(inputs) > 0).sum(1)}
    return {} if mask is None else {"tokens": (mask != 0).flatten(1).sum(1)}


def _read(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the integers of several tensors, which are read from their device in one copy."""
    numbers = torch.cat([tensor.reshape(-1).long() for tensor in tensors.values()]).tolist()
    spans = pairwise(accumulate((tensor.numel() for tensor in tensors.values()), initial=0))
    return {name: numbers[start:end] for name, (start, end) in zip(tensors, spans, strict=True)}


def _documents(shape: torch.Size, mask: Tensor | None, position_ids: Tensor | None, device: torch.device) -> Tensor:
    """Return the document of each token, [B, S]: counted from 1 where `position_ids` restart at 0; 0 for padding."""
    documents = torch.ones(shape, dtype=torch.long, device=device)
    if position_ids is not None and position_ids.shape == shape:
        documents = (position_ids == 0).cumsum(1)
    if mask is not None and mask.shape == shape:
        documents = documents * (mask != 0)
    return documents
