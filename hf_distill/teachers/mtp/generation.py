"""Self-speculative greedy decoding: the model's multi-token prediction heads draft and the model verifies."""

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
    """Generated ids, and how many drafted tokens were accepted.

    ids:      [1, S + new], the prompt and the generated tokens
    accepted: accepted drafted tokens of each forward; a forward adds these and one token of the model
    """

    ids: Tensor
    accepted: list[int]


@torch.no_grad()
def generate_with_mtp(
    model: nn.Module, heads: MTPHeads, input_ids: Tensor, max_new_tokens: int, eos_token_id: int | None = None
) -> SpeculativeOutput:
    """Generate greedily; each forward accepts the drafted tokens that the model itself predicts, and adds one token.

    The function measures how many drafted tokens are accepted. It has no KV cache, so it is not a fast decoder.

    Args:
        model: a causal language model in eval mode.
        heads: the heads of this model, in eval mode.
        input_ids: [1, S], without padding.
        max_new_tokens: maximum number of generated tokens.
        eos_token_id: id of the token that ends the generation; None: only `max_new_tokens` ends it.

    Returns:
        the ids that greedy decoding without drafts generates.

    Raises:
        DistillError: `input_ids` has several rows or none, is empty, or `max_new_tokens` is below 1.
    """
    if input_ids.dim() != 2 or len(input_ids) != 1 or not input_ids.numel() or max_new_tokens < 1:
        raise DistillError(
            f"input_ids has shape {tuple(input_ids.shape)} and max_new_tokens is {max_new_tokens}: give one "
            "prompt [1, S] of at least one token, and generate at least one; call the function once for each prompt."
        )
    ids, drafts, accepted, end = input_ids, input_ids[:, :0], [], input_ids.shape[1] + max_new_tokens
    while True:
        logits, hidden, block_kwargs = _run(model, torch.cat([ids, drafts], dim=1))
        predicted = logits[:, ids.shape[1] - 1 :].argmax(-1)  # after `ids`, and after each drafted token
        num_accepted = int((predicted[:, :-1] == drafts).cumprod(1).sum())
        new = predicted[:, : num_accepted + 1]
        if eos_token_id is not None and (new == eos_token_id).any():
            new = new[:, : int((new == eos_token_id).int().argmax()) + 1]
        ids = torch.cat([ids, new], dim=1)
        accepted.append(new.shape[1] - 1)
        if ids.shape[1] == end or new[0, -1] == eos_token_id:
            return SpeculativeOutput(ids, accepted)
        drafts = _draft(model, heads, ids, hidden, block_kwargs)[:, : end - ids.shape[1] - 1]


def _draft(model: nn.Module, heads: MTPHeads, ids: Tensor, hidden: Tensor, block_kwargs: dict[str, Any]) -> Tensor:
    """Return [1, k] tokens that the heads predict after `ids` [1, n]; row i of `hidden` is of token i for i < n - 1."""
    inner: Any = unwrap_model(model)
    head, embed, scaling = inner.get_output_embeddings(), inner.get_input_embeddings(), LogitScaling.of(inner.config)
    width, last = hidden.shape[1], ids.shape[1] - 2
    # Rows after `last` are those of rejected drafts; causal attention hides them, so their tokens do not matter.
    tokens = torch.nn.functional.pad(ids, (0, width + len(heads) + 1 - ids.shape[1]))
    for d, module in enumerate(heads.depths, 1):
        hidden, rows = module(hidden, embed(tokens[:, d : d + width]), block_kwargs)
        source = LazyLogits(rows[0, last : last + 1], head.weight, head.bias, scaling)
        tokens[:, last + d + 1] = source.project().argmax(-1)
    return tokens[:, ids.shape[1] : ids.shape[1] + len(heads)]


def _run(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return the logits [1, S, V], the inputs of the output head [1, S, H], and the arguments of the last layer."""
    inner: Any = unwrap_model(model)
    head_inputs: list[Tensor] = []
    hook = inner.get_output_embeddings().register_forward_pre_hook(lambda _module, args: head_inputs.append(args[0]))
    try:
        with record_last_block_kwargs(model) as block_kwargs:
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        hook.remove()
    return outputs.logits, head_inputs[0], block_kwargs
