"""Whether a model's own loss compares position i with the label at i + 1 or with the label at i.

The loss is measured, on numbers for which the two differ. A transformers class that calls `loss_function` needs no
forward for it; a loss that is written into the forward is measured by one short forward of text.
"""

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .module_state import eval_mode

_LENGTH, _CLASSES = 6, 11
_MARGIN = 4.0  # the own loss must be this many times closer to one of the two
_measured: WeakKeyDictionary[nn.Module, tuple[Any, bool | None]] = WeakKeyDictionary()


def loss_shifts_labels(model: nn.Module) -> bool | None:
    """Whether a model's own loss shifts its labels.

    Args:
        model: a transformers model that predicts tokens, without wrappers.

    Returns:
        None where it cannot be measured: the model does not run on text alone, or is sharded.
    """
    loss = getattr(model, "_loss_function", None) or getattr(model, "loss_type", None)
    known = _measured.get(model)
    if known is None or known[0] is not loss:
        known = (loss, _measure(model))
        _measured[model] = known
    return known[1]


def _measure(model: nn.Module) -> bool | None:
    try:
        source = inspect.getsource(inspect.unwrap(type(model).forward))
    except (OSError, TypeError):
        source = ""
    calls_it = "loss_function(" in source and hasattr(model, "loss_function")
    if calls_it and "shift" not in source and type(model).__module__.startswith("transformers."):
        return _of_loss_function(model)
    if any(hasattr(p, "ds_id") or p.is_meta for p in model.parameters()):
        return _of_loss_function(model) if calls_it else None
    try:
        return _of_forward(model)
    except Exception:  # it may need inputs other than text
        return _of_loss_function(model) if calls_it else None


def _of_loss_function(model: Any) -> bool | None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, _LENGTH, _CLASSES, generator=generator)
    labels = torch.randint(0, _CLASSES, (1, _LENGTH), generator=generator)
    return _nearer(model.loss_function(logits=logits, labels=labels, vocab_size=_CLASSES), logits, labels)


def _of_forward(model: Any) -> bool | None:
    generator = torch.Generator().manual_seed(0)
    vocab_size = min(model.config.get_text_config().vocab_size, 1000)
    device = model.get_input_embeddings().weight.device
    ids, labels = (torch.randint(3, vocab_size, (1, _LENGTH), generator=generator).to(device) for _ in range(2))
    with eval_mode(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        own = model(input_ids=ids, labels=labels, return_dict=True)
    return _nearer(own.loss, own.logits, labels)


def _nearer(own: Tensor, logits: Tensor, labels: Tensor) -> bool | None:
    """Whether `own` is nearer to the cross entropy of shifted labels; None where neither is clearly nearer."""
    rows = logits.float()[0]
    shifted = (own - cross_entropy(rows[:-1], labels[0, 1:])).abs().item()
    in_place = (own - cross_entropy(rows, labels[0])).abs().item()
    if _MARGIN * shifted < in_place:
        return True
    return False if _MARGIN * in_place < shifted else None
