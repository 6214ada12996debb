"""Packing: several full documents in a row of almost equal length, separated by their position ids."""

import torch
from accelerate.utils import send_to_device
from datasets import IterableDataset
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, PreTrainedModel

from ..core.row_values import ORIGIN, WEIGHT
from ..errors import DistillError, require_package
from ..models.model_call import accepted_inputs, accepts_any_input, input_names, prepare_inputs
from ..models.model_types import unwrap_model
from ..models.module_state import eval_mode
from .collator import returns_document_lengths
from .formats import PARAPHRASE, TEACHER_PROMPT
from .load import Examples

_SHUFFLE_BUFFER_ROWS = 1000


def pack(rows: Examples, max_length: int, seed: int = 0) -> Examples:
    """Pack documents into rows by best-fit decreasing (2404.10830).

    Args:
        rows: `input_ids` and `labels` of at most `max_length` tokens; with several sources also `source`; they may
            have `weight` and `origin`.
        max_length: maximum tokens of a packed row.
        seed: seed of the order of a stream. Packing sorts by length; a trainer shuffles data sets, but not streams.

    Returns:
        rows with `seq_lengths`, the lengths of their documents; `source`, `weight` and `origin` have one value per
            token.

    Raises:
        DistillError: the rows have a second prompt.
    """
    require_package("trl", "trl", "Packing")
    from trl import pack_dataset

    columns = rows.column_names or list(next(iter(rows)))
    for second in (PARAPHRASE, TEACHER_PROMPT):
        if second.columns[0] in columns:
            raise DistillError(
                f"packing: rows and their {second.column} have different lengths and cannot be packed together. Turn "
                "packing off, or use a view without paraphrase and a teacher without a prompt."
            )
    for column in ("source", WEIGHT, ORIGIN):
        if column in columns:
            rows = rows.map(_spread, fn_kwargs={"column": column}, remove_columns=[column])
            rows = rows.rename_column(f"{column}s", column)
    packed = pack_dataset(rows, max_length, strategy="bfd")
    return (
        packed.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER_ROWS) if isinstance(packed, IterableDataset) else packed
    )


def _spread(row: dict, column: str) -> dict:
    return {f"{column}s": [row[column]] * len(row["input_ids"])}


def check_packed_attention(model: nn.Module, role: str, collator: object = None) -> None:
    """Refuse a model in which a packed document attends to the document before it.

    This is measured: the logits of a document must not change with the document before it.

    Args:
        model: a causal language model on the device that it runs on, wrapped or not. If it is sharded, every rank has
            to call this, with the model in its wrappers.
        role: student or teacher, for the error.
        collator: the collator of the training; if its batches have the lengths of documents, the model gets them too.

    Raises:
        DistillError: the model takes no position_ids, or does not separate documents by them.
    """
    if problem := packed_attention_problem(model, role, collator):
        raise DistillError(problem)


def packed_attention_problem(model: nn.Module, role: str, collator: object = None) -> str | None:
    """Return why a model is refused, see `check_packed_attention`; None if it separates documents."""
    if problem := missing_positions_problem(model, role):
        return problem
    inner = unwrap_model(model)
    why = f"its attention {inner.config._attn_implementation!r} does not separate documents by position_ids"
    return _refusal(inner, role, why) if _documents_leak(model, collator) else None


def missing_positions_problem(model: nn.Module, role: str) -> str | None:
    """Return why a model is refused that takes no position_ids; None if it takes them. The model does not run."""
    inner = unwrap_model(model)
    takes_positions = accepts_any_input(inner) or "position_ids" in input_names(inner)
    return None if takes_positions else _refusal(inner, role, "it takes no position_ids")


def _refusal(model: nn.Module, role: str, why: str) -> str:
    return (
        f"packing: in the {role} ({type(model).__name__}) a packed document attends to the one before it: {why}. "
        "Turn packing and padding_free off, or load the model with attn_implementation='sdpa' or "
        "'flash_attention_2' if it supports one of them."
    )


def _documents_leak(model: nn.Module, collator: object) -> bool:
    """Whether the logits of the second of two packed documents change with the first document."""
    collate = DataCollatorWithFlattening(
        return_flash_attn_kwargs=returns_document_lengths(collator),
        return_seq_idx=getattr(collator, "padding_free", False),  # of TRL's collator
    )
    inner, logits = unwrap_model(model), list[Tensor]()
    # Short rows would make the shapes of compiled layers dynamic.
    with eval_mode(model), torch.compiler.set_stance("force_eager"):
        for first in ([1, 2, 3, 4], [4, 3, 2, 1]):
            batch = collate([{"input_ids": first}, {"input_ids": [1, 2, 3, 4]}])
            batch = send_to_device(accepted_inputs(model, batch), _input_device(inner))
            logits.append(model(**prepare_inputs(inner, batch)).logits[:, 4:].float())
    return bool((logits[0] - logits[1]).abs().max() > 1e-3 * logits[0].std().clamp(min=1e-6))


def _input_device(model: PreTrainedModel) -> torch.device:
    """Return the device of a model's inputs; the hooks of a model that accelerate spreads move them from there."""
    device: torch.device = next(model.get_input_embeddings().parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
