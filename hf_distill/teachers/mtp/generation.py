"""Greedy decoding in which a model's own multi-token prediction heads draft and the model verifies."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.logits import LazyLogits, LogitScaling
from ...errors import DistillError
from ...models.model_types import unwrap_model
from .heads import MTPHeads, record_last_block_kwargs


@dataclass(frozen=True)
class SpeculativeOutput:
    """What was written, and how many drafted tokens were accepted.

    ids:      [1, S + new] the prompt and what follows it
    accepted: drafted tokens among those that each forward of the model added; it adds one more, which is its own
    """

    ids: Tensor
    accepted: list[int]


@torch.no_grad()
def generate_with_mtp(
    model: nn.Module, heads: MTPHeads, input_ids: Tensor, max_new_tokens: int, eos_token_id: int | None = None
) -> SpeculativeOutput:
    """Greedy decoding: each forward keeps the drafted tokens that the model would have written itself, and one more.

    It shows how much of the drafts is accepted. It keeps no cache, so it is no fast decoder.

    Args:
        model: a causal language model in eval mode.
        heads: of this model, in eval mode.
        input_ids: [1, S], without padding.
        max_new_tokens: how many tokens are written at most.
        eos_token_id: the token that ends the text; None: none does.

    Returns:
        the ids that plain greedy decoding writes.

    Raises:
        DistillError: several rows, an empty one, or no token to write.
    """
    if input_ids.dim() != 2 or len(input_ids) != 1 or not input_ids.numel() or max_new_tokens < 1:
        raise DistillError(
            f"input_ids has shape {tuple(input_ids.shape)} and max_new_tokens is {max_new_tokens}: give one prompt "
            "[1, S] of at least one token, and write at least one; several prompts go one after the other."
        )
    ids, drafts, accepted, end = input_ids, input_ids[:, :0], [], input_ids.shape[1] + max_new_tokens
    while True:
        logits, hidden, call = _run(model, torch.cat([ids, drafts], dim=1))
        own = logits[:, ids.shape[1] - 1 :].argmax(-1)  # the model's token after `ids`, and after each draft
        agreed = int((own[:, :-1] == drafts).cumprod(1).sum())
        new = own[:, : agreed + 1]
        if eos_token_id is not None and (new == eos_token_id).any():
            new = new[:, : int((new == eos_token_id).int().argmax()) + 1]
        ids = torch.cat([ids, new], dim=1)
        accepted.append(new.shape[1] - 1)
        if ids.shape[1] == end or new[0, -1] == eos_token_id:
            return SpeculativeOutput(ids, accepted)
        drafts = _draft(model, heads, ids, hidden, call)[:, : end - ids.shape[1] - 1]


def _draft(model: nn.Module, heads: MTPHeads, ids: Tensor, hidden: Tensor, call: dict[str, Any]) -> Tensor:
    """[1, k] tokens that the heads expect after `ids` [1, n]; the first n - 1 rows of `hidden` are of these ids."""
    inner: Any = unwrap_model(model)
    head, embed, scaling = inner.get_output_embeddings(), inner.get_input_embeddings(), LogitScaling.of(inner.config)
    width, last = hidden.shape[1], ids.shape[1] - 2
    # Rows after `last` are of rejected drafts; no causal row sees them, so any token may stand there.
    told = torch.nn.functional.pad(ids, (0, width + len(heads) + 1 - ids.shape[1]))
    for d, depth in enumerate(heads.depths, 1):
        hidden, rows = depth(hidden, embed(told[:, d : d + width]), call)
        source = LazyLogits(rows[0, last : last + 1], head.weight, head.bias, scaling)
        told[:, last + d + 1] = source.project().argmax(-1)
    return told[:, ids.shape[1] : ids.shape[1] + len(heads)]


def _run(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits [1, S, V], what the output head was given [1, S, H], and what the last block was called with."""
    inner: Any = unwrap_model(model)
    given: list[Tensor] = []
    hook = inner.get_output_embeddings().register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    try:
        with record_last_block_kwargs(model) as call:
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        hook.remove()
    return outputs.logits, given[0], call
