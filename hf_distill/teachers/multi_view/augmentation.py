"""Views of a batch: the same tokens are asked, and what is seen of the rest differs."""

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...core.targets import IGNORE_INDEX, SECOND_VIEW_KEYS, Targets
from ...errors import DistillError, collect_errors, did_you_mean, raise_if_any

_FILLERS = ("mask_token", "unk_token", "pad_token", "eos_token")


def replacement_token_id(tokenizer: Any) -> int:
    """The id that a dropped token becomes: the mask token's, else the unknown token's, else padding's, else the end's.

    Raises:
        DistillError: the tokenizer has none of them.
    """
    for name in _FILLERS:
        if (token := getattr(tokenizer, f"{name}_id", None)) is not None:
            return token
    raise DistillError(
        f"token_dropout needs a token to put in the place of others, and the tokenizer has none of "
        f"{', '.join(_FILLERS)}: set one, such as tokenizer.pad_token."
    )


@dataclass(frozen=True)
class BatchView:
    """How a batch is seen otherwise. What is drawn of a row depends on its own tokens and the step alone.

    token_dropout: share of tokens that a filler replaces, asked ones too; never the first of a row or packed document
    span_deletion: share of the context's tokens that attention_mask hides, positions staying as they are. The context
                   is what is neither asked nor the place from which it is predicted, but for a row's first token
    span_length:   tokens that are hidden together; fewer where a span meets what is no context
    prepend_context_tokens: so many tokens of the batch's next row stand before each row; fewer where a row is shorter
    paraphrase:    the batch's `view_input_ids`, with their mask and labels, take the place of its rows first

    Raises:
        DistillError: a value out of its range, or nothing that differs.
    """

    token_dropout: float = 0.0
    span_deletion: float = 0.0
    span_length: int = 3
    prepend_context_tokens: int = 0
    paraphrase: bool = False

    def __post_init__(self):
        problems = []
        for name in ("token_dropout", "span_deletion"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                problems.append(f"view has {name} {value!r}; it must be a share of tokens, from 0 to below 1")
        for name, least in (("span_length", 1), ("prepend_context_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                problems.append(f"view has {name} {value!r}; it must be a whole number, {least} or more")
        if not isinstance(self.paraphrase, bool):
            problems.append(f"view has paraphrase {self.paraphrase!r}; it must be true or false")
        if not (problems or self.token_dropout or self.span_deletion or self.prepend_context_tokens or self.paraphrase):
            problems.append(
                "view changes nothing: give token_dropout, span_deletion, prepend_context_tokens or paraphrase"
            )
        raise_if_any(problems)

    @classmethod
    def parse(cls, value: Any) -> "BatchView":
        """Read a config's value: a dict of fields, or a view.

        Raises:
            DistillError: unknown fields, and what is wrong with the known ones, all at once.
        """
        known = [field.name for field in fields(cls)]
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise DistillError(f"view is {value!r}; it must be a mapping of {', '.join(known)}")
        problems = [
            f"view has no field {name!r}{did_you_mean(str(name), known)}" for name in value if name not in known
        ]
        with collect_errors(problems):
            view = cls(**{name: its for name, its in value.items() if name in known})
        raise_if_any(problems)
        return view

    def __call__(
        self, inputs: dict, targets: Targets, step: int, fill: int, encoder: bool = False
    ) -> tuple[dict, Targets]:
        """The batch as it is seen, and its asked tokens: the same T in the same order, where they stand now.

        Args:
            inputs: the collator's batch, which stays as it is; its `source` is that of the batch, not of the view.
            targets: the asked tokens of `inputs`.
            step: of the training; every step draws anew.
            fill: see `replacement_token_id`.
            encoder: whether `input_ids` are an encoder's and the asked tokens a decoder's, which then stay.

        Raises:
            DistillError: no `input_ids`, or what the view needs of the batch is not there; packed rows, which have no
                mask, with a view that hides or adds tokens.
        """
        if "input_ids" not in inputs:
            raise DistillError(f"A view changes `input_ids`, and the batch has only {sorted(inputs)}: leave view out.")
        aligned = not encoder and len(targets.shape) == 2
        seen = {name: value for name, value in inputs.items() if name not in SECOND_VIEW_KEYS}
        if self.paraphrase:
            seen, targets = _paraphrased(seen, inputs, targets, aligned)
        ids, mask = seen["input_ids"], seen.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.shape != ids.shape or (aligned and targets.shape != ids.shape):
            raise DistillError(
                f"A view needs input_ids, attention_mask and asked labels of one shape; got {tuple(ids.shape)}, "
                f"{tuple(mask.shape)} and {tuple(targets.shape)}. Say encoder=True where labels are a decoder's."
            )
        real = mask != 0
        firsts = _firsts(real, seen.get("position_ids"))
        self._refuse_packed(firsts)
        dropped, hidden = self._drawn(ids, real, step)
        translate_hub_errors = _asking(seen, targets) if aligned else torch.zeros_like(real)
        seen["input_ids"] = ids.masked_fill(dropped & ~firsts, fill)
        if self.span_deletion:
            seen["attention_mask"] = mask.masked_fill(hidden & ~firsts & ~translate_hub_errors, 0)
        count = min(self.prepend_context_tokens, int(real.sum(1).min()))
        return _behind_others(seen, targets, ids, real, count, aligned) if count and len(ids) > 1 else (seen, targets)

    def _refuse_packed(self, firsts: Tensor) -> None:
        names = [name for name in ("span_deletion", "prepend_context_tokens") if getattr(self, name)]
        if names and firsts.sum(1).max() > 1:
            raise DistillError(
                f"view has {' and '.join(names)}, which packed rows cannot have, for no mask tells their documents "
                "apart: leave packing and padding_free off, or use token_dropout alone."
            )

    def _drawn(self, ids: Tensor, real: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Which tokens are drawn to be dropped, and which to be hidden, [B, S] each; padding never is."""
        dropped, hidden = torch.zeros(2, *ids.shape, dtype=torch.bool)
        for row, (tokens, own) in enumerate(zip(ids.cpu(), real.cpu(), strict=True)):
            draws, count = _generator(tokens[own], step), int(own.sum())
            dropped[row, own] = torch.rand(count, generator=draws) < self.token_dropout
            start = torch.randint(self.span_length, (1,), generator=draws)
            spans = torch.rand(count // self.span_length + 2, generator=draws) < self.span_deletion
            hidden[row, own] = spans[(torch.arange(count) + start) // self.span_length]
        return dropped.to(ids.device), hidden.to(ids.device)


def _generator(tokens: Tensor, step: int) -> torch.Generator:
    """What a row's draws come from: the same for the same tokens [S] and step, in every batch and process."""
    content = torch.cat([torch.tensor([step]), tokens.long()]).numpy().astype("<i8").tobytes()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))


def _firsts(real: Tensor, position_ids: Tensor | None) -> Tensor:
    """The first token of each row, and of each document of a packed one, [B, S]."""
    firsts = torch.zeros_like(real).scatter(1, real.int().argmax(1, keepdim=True), True)
    if position_ids is not None and position_ids.shape == real.shape:
        firsts |= real & (position_ids == 0)
    return firsts


def _shifts(inputs: dict, targets: Targets) -> bool:
    """Whether the asked tokens stand one after the places that predict them."""
    labels = inputs.get("labels")
    if labels is None:
        return True
    # The last label of a batch that is asked in place would be elsewhere had it been shifted: the two never agree.
    return not torch.equal((labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1), targets.positions)


def _asking(inputs: dict, targets: Targets) -> Tensor:
    """The asked tokens and the places that predict them, [B, S]."""
    translate_hub_errors = torch.zeros(targets.shape, dtype=torch.bool, device=targets.positions.device)
    translate_hub_errors.view(-1)[targets.positions] = True
    return (
        translate_hub_errors | torch.nn.functional.pad(translate_hub_errors, (1, -1))
        if _shifts(inputs, targets)
        else translate_hub_errors
    )


def _paraphrased(seen: dict, inputs: dict, targets: Targets, aligned: bool) -> tuple[dict, Targets]:
    """The batch's other rows, which ask the same."""
    needed = SECOND_VIEW_KEYS if aligned else SECOND_VIEW_KEYS[:2]
    if missing := [name for name in needed if name not in inputs]:
        raise DistillError(
            f"view has paraphrase, and the batch has no {', '.join(missing)}, only {sorted(inputs)}. Give each source "
            "a column `paraphrase` beside prompt and completion, read them by rows_of(..., paraphrase=True), and set "
            "remove_unused_columns=False."
        )
    shift = aligned and _shifts(inputs, targets)
    old = ("position_ids", "token_type_ids", "shift_labels")
    seen = {name: value for name, value in seen.items() if name not in old}
    seen |= {"input_ids": inputs["view_input_ids"], "attention_mask": inputs["view_attention_mask"]}
    if not aligned:
        return seen, targets
    seen["labels"] = inputs["view_labels"]
    found = Targets.from_batch(seen, shift)
    if not (torch.equal(found.labels, targets.labels) and torch.equal(found.rows, targets.rows)):
        raise DistillError(
            f"The batch asks {len(targets)} tokens and its paraphrase {len(found)}, which are not the same ones in the "
            "same order: make view_labels by rows_of(..., paraphrase=True), or ask the same completion in both."
        )
    return seen, replace(targets, positions=found.positions, shape=found.shape)


def _behind_others(
    seen: dict, targets: Targets, ids: Tensor, real: Tensor, count: int, aligned: bool
) -> tuple[dict, Targets]:
    """Each row behind the first `count` tokens [B, count] of the next one, itself moved; padding stays outside."""
    width, device = ids.shape[1], ids.device
    start = real.int().argmax(1, keepdim=True)
    columns = torch.arange(width, device=device)
    moved = columns + count * (columns >= start)  # [B, S]
    ahead = torch.arange(count, device=device).expand(len(ids), -1)
    order = torch.sort((~real).int(), dim=1, stable=True).indices[:, :count]
    fronts: dict[str, Any] = {
        "input_ids": ids.gather(1, order).roll(-1, 0),
        "attention_mask": 1,
        "token_type_ids": 0,
        "position_ids": ahead,
    }
    if "position_ids" in seen:
        seen = seen | {"position_ids": seen["position_ids"] + count}
    if aligned:
        fronts |= {"labels": IGNORE_INDEX, "shift_labels": IGNORE_INDEX}
        if seen.get("labels") is not None and _shifts(seen, targets):  # what was a first token still is not asked
            seen = seen | {"labels": seen["labels"].scatter(1, start, IGNORE_INDEX)}

    def widened(name: str, values: Tensor) -> Tensor:
        front = torch.as_tensor(fronts[name], dtype=values.dtype, device=device).expand(len(ids), count)
        wide = values.new_empty(len(ids), width + count).scatter(1, moved, values)
        return wide.scatter(1, start + ahead, front)

    seen = seen | {name: widened(name, seen[name]) for name in fronts if seen.get(name) is not None}
    if not aligned:
        return seen, targets
    positions = targets.rows * (width + count) + moved.flatten()[targets.positions]
    return seen, replace(targets, positions=positions, shape=torch.Size((len(ids), width + count)))
