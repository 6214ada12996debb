"""Views of a batch: the target tokens stay the same, and the inputs around them are augmented."""

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...core.component_options import ViewOptions, option_errors
from ...core.targets import IGNORE_INDEX, SECOND_VIEW_KEYS, Targets
from ...errors import DistillError
from ...models.model_call import FLASH_ATTENTION_INPUTS

_REPLACEMENT_TOKENS = ("mask_token", "unk_token", "pad_token", "eos_token")


def replacement_token_id(tokenizer: Any) -> int:
    """Return the id that replaces dropped tokens: the first of mask, unknown, padding and end token that is defined.

    Raises:
        DistillError: the tokenizer has none of them.
    """
    for name in _REPLACEMENT_TOKENS:
        if (token := getattr(tokenizer, f"{name}_id", None)) is not None:
            return token
    raise DistillError(
        f"token_dropout replaces tokens by a special token, and the tokenizer has none of "
        f"{', '.join(_REPLACEMENT_TOKENS)}: set one, such as tokenizer.pad_token."
    )


class BatchView(ViewOptions):
    """An augmentation of a batch. The random numbers of a row depend only on its tokens and the step.

    token_dropout: share of tokens that are replaced, target tokens included, but not the first token of a row or packed
                   document
    span_deletion: share of the context tokens that attention_mask hides; positions stay as they are. Context tokens are
                   neither target tokens, nor the tokens from which these are predicted, nor the first token of a row
    span_length:   number of adjacent tokens that are hidden together; fewer at the border of the context
    prepend_context_tokens: number of tokens of the batch's next row that are prepended to each row; fewer if a row of
                   the batch is shorter
    paraphrase:    whether the batch's `view_input_ids`, with their mask and labels, replace its rows first
    """

    @classmethod
    def parse(cls, value: Any) -> "BatchView":
        """Build a view from a dict of its options; return a view unchanged.

        Raises:
            DistillError: an option is unknown, its value is out of range, or the view changes nothing; the message
                lists all problems.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise DistillError(f"view is {value!r}; it must be a mapping of {', '.join(cls.model_fields)}")
        with option_errors("view", list(cls.model_fields)):
            return cls(**value)

    def __call__(
        self, inputs: dict, targets: Targets, step: int, fill: int, encoder: bool = False
    ) -> tuple[dict, Targets]:
        """Return the augmented batch, and the same T target tokens, in the same order, at their new positions.

        Args:
            inputs: the collator's batch, which is not changed; `source` stays that of the batch.
            targets: the target tokens of `inputs`.
            step: step of the training; every step draws new random numbers.
            fill: id that replaces dropped tokens; see `replacement_token_id`.
            encoder: whether `input_ids` are read by an encoder and the target tokens are a decoder's, which then keep
                their positions.

        Raises:
            DistillError: the batch has no `input_ids` or lacks what the view needs; the rows are packed, so they
                have no mask, and the view hides or prepends tokens.
        """
        if "input_ids" not in inputs:
            raise DistillError(
                f"A view changes `input_ids`, and the batch has only {sorted(inputs)}: use a teacher without a view."
            )
        is_aligned = not encoder and len(targets.shape) == 2
        view = {name: value for name, value in inputs.items() if name not in SECOND_VIEW_KEYS}
        if self.paraphrase:
            view, targets = _paraphrased(view, inputs, targets, is_aligned)
        ids, mask = view["input_ids"], view.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.shape != ids.shape or (is_aligned and targets.shape != ids.shape):
            raise DistillError(
                f"A view needs input_ids, attention_mask and labels of one shape; got {tuple(ids.shape)}, "
                f"{tuple(mask.shape)} and {tuple(targets.shape)}. Pass encoder=True if the labels are a decoder's."
            )
        is_token = mask != 0
        first_tokens = _first_tokens(is_token, view.get("position_ids"))
        self._refuse_packed(first_tokens)
        is_dropped, is_hidden = self._draw(ids, is_token, step)
        is_needed = _target_and_predicting_tokens(view, targets) if is_aligned else torch.zeros_like(is_token)
        view["input_ids"] = ids.masked_fill(is_dropped & ~first_tokens, fill)
        if self.span_deletion:
            view["attention_mask"] = mask.masked_fill(is_hidden & ~first_tokens & ~is_needed, 0)
        count = min(self.prepend_context_tokens, int(is_token.sum(1).min()))
        if not count or len(ids) == 1:
            return view, targets
        return _prepend_context(view, targets, ids, is_token, count, is_aligned)

    def _refuse_packed(self, first_tokens: Tensor) -> None:
        """Raise a DistillError for packed rows, where the view hides or prepends tokens."""
        names = [name for name in ("span_deletion", "prepend_context_tokens") if getattr(self, name)]
        if names and first_tokens.sum(1).max() > 1:
            raise DistillError(
                f"view has {' and '.join(names)}, which does not work with packed rows, because they have no mask that "
                "separates their documents: turn packing and padding_free off, or use token_dropout alone."
            )

    def _draw(self, ids: Tensor, is_token: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Draw which tokens are dropped and which are hidden, [B, S] each; padding never is."""
        is_dropped, is_hidden = torch.zeros(2, *ids.shape, dtype=torch.bool)
        for row, (tokens, mask) in enumerate(zip(ids.cpu(), is_token.cpu(), strict=True)):
            generator, count = _generator(tokens[mask], step), int(mask.sum())
            is_dropped[row, mask] = torch.rand(count, generator=generator) < self.token_dropout
            start = torch.randint(self.span_length, (1,), generator=generator)
            spans = torch.rand(count // self.span_length + 2, generator=generator) < self.span_deletion
            is_hidden[row, mask] = spans[(torch.arange(count) + start) // self.span_length]
        return is_dropped.to(ids.device), is_hidden.to(ids.device)


def _generator(tokens: Tensor, step: int) -> torch.Generator:
    """Return the generator of a row: the same for the same tokens [S] and step, in every batch and process."""
    content = torch.cat([torch.tensor([step]), tokens.long()]).numpy().astype("<i8").tobytes()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))


def _first_tokens(is_token: Tensor, position_ids: Tensor | None) -> Tensor:
    """Return the mask of the first token of each row, and of each document of a packed row, [B, S]."""
    first_tokens = torch.zeros_like(is_token).scatter(1, is_token.int().argmax(1, keepdim=True), True)
    if position_ids is not None and position_ids.shape == is_token.shape:
        first_tokens |= is_token & (position_ids == 0)
    return first_tokens


def _shifts(inputs: dict, targets: Targets) -> bool:
    """Whether target tokens are predicted from the position before them."""
    labels = inputs.get("labels")
    if labels is None:
        return True
    # With a shift the last label of a batch is predicted one position earlier, so the two lists never agree.
    return not torch.equal((labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1), targets.positions)


def _target_and_predicting_tokens(inputs: dict, targets: Targets) -> Tensor:
    """Return the mask of the target tokens and of the tokens from which they are predicted, [B, S]."""
    is_predicting = torch.zeros(targets.shape, dtype=torch.bool, device=targets.positions.device)
    is_predicting.view(-1)[targets.positions] = True
    if not _shifts(inputs, targets):
        return is_predicting
    return is_predicting | torch.nn.functional.pad(is_predicting, (1, -1))


def _paraphrased(view: dict, inputs: dict, targets: Targets, is_aligned: bool) -> tuple[dict, Targets]:
    """Replace the rows by their paraphrases, which have the same target tokens."""
    needed = SECOND_VIEW_KEYS if is_aligned else SECOND_VIEW_KEYS[:2]
    if missing := [name for name in needed if name not in inputs]:
        raise DistillError(
            f"view has paraphrase, and the batch has no {', '.join(missing)}, only {sorted(inputs)}. Give each source "
            "a column `paraphrase` in addition to prompt and completion, tokenize with "
            "tokenize_dataset(..., second_prompt=PARAPHRASE), and set remove_unused_columns=False."
        )
    shift = is_aligned and _shifts(inputs, targets)
    replaced = ("position_ids", "token_type_ids", "shift_labels", "seq_idx", *FLASH_ATTENTION_INPUTS)
    view = {name: value for name, value in view.items() if name not in replaced}
    view |= {"input_ids": inputs["view_input_ids"], "attention_mask": inputs["view_attention_mask"]}
    if not is_aligned:
        return view, targets
    view["labels"] = inputs["view_labels"]
    view_targets = Targets.from_batch(view, shift)
    if not (
        torch.equal(view_targets.labels, targets.labels) and torch.equal(view_targets.batch_rows, targets.batch_rows)
    ):
        raise DistillError(
            f"The batch has {len(targets)} target tokens and its paraphrase {len(view_targets)}, which are not the "
            "same tokens in the same order: make view_labels with tokenize_dataset(..., second_prompt=PARAPHRASE), "
            "or use the same completion in both."
        )
    return view, replace(targets, positions=view_targets.positions, shape=view_targets.shape)


def _prepend_context(
    view: dict, targets: Targets, ids: Tensor, is_token: Tensor, count: int, is_aligned: bool
) -> tuple[dict, Targets]:
    """Prepend the first `count` tokens of the next row to each row.

    Padding stays at the outer ends of a row.
    """
    width, device = ids.shape[1], ids.device
    start = is_token.int().argmax(1, keepdim=True)
    columns = torch.arange(width, device=device)
    new_columns = columns + count * (columns >= start)  # [B, S]
    prefix_columns = torch.arange(count, device=device).expand(len(ids), -1)
    order = torch.sort((~is_token).int(), dim=1, stable=True).indices[:, :count]
    prefixes: dict[str, Any] = {
        "input_ids": ids.gather(1, order).roll(-1, 0),
        "attention_mask": 1,
        "token_type_ids": 0,
        "position_ids": prefix_columns,
    }
    if "position_ids" in view:
        view = view | {"position_ids": view["position_ids"] + count}
    if is_aligned:
        prefixes |= {"labels": IGNORE_INDEX, "shift_labels": IGNORE_INDEX}
        if view.get("labels") is not None and _shifts(view, targets):  # the former first token is still no target
            view = view | {"labels": view["labels"].scatter(1, start, IGNORE_INDEX)}

    def with_prefix(name: str, values: Tensor) -> Tensor:
        prefix = torch.as_tensor(prefixes[name], dtype=values.dtype, device=device).expand(len(ids), count)
        longer = values.new_empty(len(ids), width + count).scatter(1, new_columns, values)
        return longer.scatter(1, start + prefix_columns, prefix)

    view = view | {name: with_prefix(name, view[name]) for name in prefixes if view.get(name) is not None}
    if not is_aligned:
        return view, targets
    positions = targets.batch_rows * (width + count) + new_columns.flatten()[targets.positions]
    return view, replace(targets, positions=positions, shape=torch.Size((len(ids), width + count)))
