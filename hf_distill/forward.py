"""One forward of a model, reduced to the logits of its asked tokens.

The output head is called on asked tokens only: its `forward` is swapped for the call, inside the model's own forward,
so wrappers (DDP, ZeRO-3, FSDP) gather its weights as they always do and scalings that follow the head still apply.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from .signals import Logits, Targets
from .tasks import bare


def forward(model: nn.Module, inputs: dict, targets: Targets, keep_logits: bool = False) -> tuple[Logits, dict]:
    """Run `model` without its own loss.

    Args:
        model: as prepared, wrappers included.
        inputs: the batch; labels are taken out, decoder inputs made from them where the model does so itself.
        targets: the asked tokens.
        keep_logits: keep the logits of all positions in the outputs (metrics need them).

    Returns:
        (logits of the asked tokens [T, V], the model's outputs). The outputs' logits are [1, T, V] without
        `keep_logits`.
    """
    inner = bare(model)
    inputs = _prepare(inner, inputs)
    head = None if keep_logits else _output_head(inner)
    if head is None:
        outputs = model(**inputs)
        return Logits(targets.pick(outputs.logits)), outputs
    with _asked_only(head, targets) as calls:
        outputs = model(**inputs)
    if not calls:
        return Logits(targets.pick(outputs.logits)), outputs
    return Logits(outputs.logits[0]), outputs


def _prepare(model: nn.Module, inputs: dict) -> dict:
    labels = inputs.get("labels")
    inputs = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels", "num_items_in_batch")}
    if model.config.is_encoder_decoder and "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    if "use_cache" in parameters_of(model.__class__):
        inputs["use_cache"] = False  # a cache lets packed documents see each other
    return inputs


@lru_cache
def parameters_of(model_class: Any) -> frozenset[str]:
    """The named parameters of a model class's forward."""
    return frozenset(inspect.signature(model_class.forward).parameters)


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter else None
    return head if isinstance(head, nn.Module) else None


@contextmanager
def _asked_only(head: nn.Module, targets: Targets) -> Iterator[list]:
    calls: list[bool] = []
    original, own = head.forward, head.__dict__.get("forward")

    def asked_forward(hidden: Tensor) -> Tensor:
        calls.append(True)
        return original(targets.pick(hidden))[None]

    head.forward = asked_forward
    try:
        yield calls
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own
