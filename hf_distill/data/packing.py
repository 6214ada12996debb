"""Packing: whole documents in rows of almost equal length, kept apart by their positions."""

from typing import Any

import torch
from datasets import IterableDataset
from torch import nn
from transformers.utils import logging

from ..errors import DistillError, require_package
from ..models.model_call import accepts_any_input, input_names
from ..models.model_types import is_zero3_partitioned, unwrap_model, unwrap_parallel
from .load import Examples

logger = logging.get_logger(__name__)

_BUFFER = 1000  # what is packed at a time


def pack(rows: Examples, max_length: int, seed: int = 0) -> Examples:
    """Rows of several documents each, by best-fit decreasing (2404.10830).

    Args:
        rows: `input_ids` and `labels` of at most `max_length` tokens; with `source` of several sources.
        max_length: tokens.
        seed: of a stream's order. Packing sorts by length, which a trainer's own shuffling undoes for data sets alone.

    Returns:
        rows with `seq_lengths`, the lengths of their documents; `source` becomes one a token.

    Raises:
        DistillError: rows with paraphrases.
    """
    require_package("trl", "trl", "Packing")
    from trl import pack_dataset

    columns = rows.column_names or list(next(iter(rows)))
    if "view_input_ids" in columns:
        raise DistillError(
            "packing: rows and their paraphrases have different lengths and cannot share packed rows. Leave packing "
            "off, or use a view without paraphrase."
        )
    if "source" in columns:
        rows = rows.map(_spread_source, remove_columns=["source"]).rename_column("sources", "source")
    packed = pack_dataset(rows, max_length, strategy="bfd")
    return packed.shuffle(seed=seed, buffer_size=_BUFFER) if isinstance(packed, IterableDataset) else packed


def _spread_source(row: dict) -> dict:
    return {"sources": [row["source"]] * len(row["input_ids"])}


@torch.no_grad()
def check_packed_attention(model: nn.Module, who: str) -> None:
    """Refuse a model in which a packed document sees the one before it.

    Tried, not looked up in a table of names: a document's logits must not move with the document before it. A student
    that ZeRO-3 holds in shares cannot run before it is prepared: that it was not tried is said once.

    Args:
        model: a causal language model, in wrappers or not.
        who: student or teacher, for the error.

    Raises:
        DistillError: it does not take positions, or does not keep documents apart by them.
    """
    inner: Any = unwrap_model(model)
    if model is unwrap_parallel(model) and is_zero3_partitioned(model):
        logger.warning_once(f"The {who} is sharded, so it was not tried whether it keeps packed documents apart.")
        return
    if accepts_any_input(inner) or "position_ids" in input_names(inner):
        why = f"attention {inner.config._attn_implementation!r} does not keep them apart by position_ids"
        leaks = _documents_leak(model, inner.get_input_embeddings().weight.device)
    else:
        why, leaks = "it takes no position_ids", True
    if leaks:
        raise DistillError(
            f"packing: in the {who} ({type(inner).__name__}) a packed document sees the one before it: {why}. Leave "
            "packing and padding_free off, or load it with attn_implementation='sdpa' or 'flash_attention_2' if it has "
            "them."
        )


def _documents_leak(model: nn.Module, device: torch.device) -> bool:
    """Whether the second of two packed documents is answered otherwise when the first is another."""
    ids = torch.arange(8, device=device)[None] % 4 + 1
    other = torch.cat([ids[:, :4].flip(1), ids[:, 4:]], dim=1)
    positions, training = (torch.arange(8, device=device) % 4)[None], model.training
    model.eval()
    one, two = (model(input_ids=x, position_ids=positions, use_cache=False).logits[:, 4:].float() for x in (ids, other))
    model.train(training)
    return bool((one - two).abs().max() > 1e-3 * one.std().clamp(min=1e-6))
