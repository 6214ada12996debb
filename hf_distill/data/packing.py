"""Packing: several full documents in a row of almost equal length, separated by their position ids."""

import torch
from datasets import IterableDataset
from torch import nn
from transformers.utils import logging

from ..errors import DistillError, require_package
from ..models.model_call import accepts_any_input, input_names
from ..models.model_types import is_zero3_partitioned, unwrap_model, unwrap_parallel
from .load import Examples

logger = logging.get_logger(__name__)

_SHUFFLE_BUFFER_ROWS = 1000


def pack(rows: Examples, max_length: int, seed: int = 0) -> Examples:
    """Pack documents into rows by best-fit decreasing (2404.10830).

    Args:
        rows: `input_ids` and `labels` of at most `max_length` tokens; with several sources also `source`.
        max_length: maximum tokens of a packed row.
        seed: seed of the order of a stream. Packing sorts by length; a trainer shuffles data sets, but not streams.

    Returns:
        rows with `seq_lengths`, the lengths of their documents; `source` has one value per token.

    Raises:
        DistillError: the rows have paraphrases.
    """
    require_package("trl", "trl", "Packing")
    from trl import pack_dataset

    columns = rows.column_names or list(next(iter(rows)))
    if "view_input_ids" in columns:
        raise DistillError(
            "packing: rows and their paraphrases have different lengths and cannot be packed together. Turn packing "
            "off, or use a view without paraphrase."
        )
    if "source" in columns:
        rows = rows.map(_spread_source, remove_columns=["source"]).rename_column("sources", "source")
    packed = pack_dataset(rows, max_length, strategy="bfd")
    return (
        packed.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER_ROWS) if isinstance(packed, IterableDataset) else packed
    )


def _spread_source(row: dict) -> dict:
    return {"sources": [row["source"]] * len(row["input_ids"])}


@torch.no_grad()
def check_packed_attention(model: nn.Module, who: str) -> None:
    """Refuse a model in which a packed document attends to the document before it.

    This is measured: the logits of a document must not change with the document before it. A model that ZeRO-3 has
    partitioned cannot run before it is prepared; it is not checked, and a warning is logged once.

    Args:
        model: a causal language model, wrapped or not.
        who: student or teacher, for the error.

    Raises:
        DistillError: the model takes no position_ids, or does not separate documents by them.
    """
    inner = unwrap_model(model)
    if model is unwrap_parallel(model) and is_zero3_partitioned(model):
        logger.warning_once(f"The {who} is sharded, so it is not checked whether it separates packed documents.")
        return
    if accepts_any_input(inner) or "position_ids" in input_names(inner):
        why = f"its attention {inner.config._attn_implementation!r} does not separate documents by position_ids"
        leaks = _documents_leak(model, next(inner.get_input_embeddings().parameters()).device)
    else:
        why, leaks = "it takes no position_ids", True
    if leaks:
        raise DistillError(
            f"packing: in the {who} ({type(inner).__name__}) a packed document attends to the one before it: {why}. "
            "Turn packing and padding_free off, or load the model with attn_implementation='sdpa' or "
            "'flash_attention_2' if it supports one of them."
        )


def _documents_leak(model: nn.Module, device: torch.device) -> bool:
    """Whether the logits of the second of two packed documents change with the first document."""
    ids = torch.arange(8, device=device)[None] % 4 + 1
    other = torch.cat([ids[:, :4].flip(1), ids[:, 4:]], dim=1)
    positions, training = (torch.arange(8, device=device) % 4)[None], model.training
    model.eval()
    logits, other_logits = (
        model(input_ids=batch, position_ids=positions, use_cache=False).logits[:, 4:].float() for batch in (ids, other)
    )
    model.train(training)
    return bool((logits - other_logits).abs().max() > 1e-3 * logits.std().clamp(min=1e-6))
