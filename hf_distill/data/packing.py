"""Packing: whole documents in rows of almost equal length, kept apart by their positions."""

from typing import Any

import torch
from datasets import IterableDataset
from torch import nn

from ..errors import DistillError, need
from ..forward import parameters_of
from ..tasks import bare
from .load import Examples

_BUFFER = 1000  # what is packed at a time


def pack(rows: Examples, max_length: int, seed: int = 0) -> Examples:
    """Rows of several documents each, by best-fit decreasing (2404.10830).

    Args:
        rows: `input_ids` and `labels` of at most `max_length` tokens; with `source` of several sources.
        max_length: tokens.
        seed: of a stream's order. Packing sorts by length, which a trainer's own shuffling undoes for data sets alone.

    Returns:
        rows with `seq_lengths`, the lengths of their documents; `source` becomes one a token.
    """
    need("trl", "trl", "Packing")
    from trl import pack_dataset

    columns = rows.column_names or list(next(iter(rows)))
    if "source" in columns:
        rows = rows.map(_spread_source, remove_columns=["source"]).rename_column("sources", "source")
    packed = pack_dataset(rows, max_length, strategy="bfd")
    return packed.shuffle(seed=seed, buffer_size=_BUFFER) if isinstance(packed, IterableDataset) else packed


def _spread_source(row: dict) -> dict:
    return {"sources": [row["source"]] * len(row["input_ids"])}


@torch.no_grad()
def check_isolation(model: nn.Module, who: str) -> None:
    """Refuse a model whose attention lets packed documents see each other.

    Tried, not looked up: what a document's logits are must not depend on the document before it.

    Args:
        model: a causal language model whose weights are whole.
        who: student or teacher, for the error.

    Raises:
        DistillError: it does not take positions, or does not keep documents apart by them.
    """
    inner: Any = bare(model)
    attention = getattr(inner.config, "_attn_implementation", None)
    advice = "Leave packing out, or choose an attn_implementation that does (sdpa, eager, flash_attention_2)."
    if "position_ids" not in parameters_of(inner.__class__):
        raise DistillError(
            f"packing: the {who}, a {type(inner).__name__}, takes no position_ids, so it cannot tell packed documents "
            "apart. Leave packing out."
        )
    device, mode = inner.get_input_embeddings().weight.device, model.training
    ids = torch.arange(8, device=device)[None] % 4 + 1
    other = torch.cat([ids[:, :4].flip(1), ids[:, 4:]], dim=1)
    positions = (torch.arange(8, device=device) % 4)[None]
    model.eval()
    one, two = (model(input_ids=x, position_ids=positions, use_cache=False).logits[:, 4:].float() for x in (ids, other))
    model.train(mode)
    leak = (one - two).abs().max() / one.std().clamp(min=1e-6)
    if leak > 1e-3:
        raise DistillError(
            f"packing: with attention {attention!r} the {who}'s documents see each other across a packed row (logits "
            f"move by {float(leak):.1e} of their spread). {advice}"
        )
