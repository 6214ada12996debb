"""Measures whether a model's forward compares the logits at position i with the label at i + 1 or at i.

The model's loss is computed for labels with which the two differ. A transformers class that calls `loss_function` needs
no forward for it; a loss that is computed in the forward is measured by one short forward of text.
"""

import inspect
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .module_state import eval_mode

_NUM_TOKENS, _NUM_CLASSES = 6, 11
_MIN_RATIO = 4.0  # the model's loss must be this many times closer to one of the two cross entropies
_shift_by_model: WeakKeyDictionary[nn.Module, tuple[object, bool | None]] = WeakKeyDictionary()


def loss_shifts_labels(model: PreTrainedModel) -> bool | None:
    """Return whether a model's loss shifts its labels.

    Args:
        model: a transformers model that predicts tokens, without wrappers.

    Returns:
        None if it cannot be measured: the model needs other inputs than text, or is sharded.
    """
    loss = getattr(model, "_loss_function", None) or getattr(model, "loss_type", None)
    measurement = _shift_by_model.get(model)
    if measurement is None or measurement[0] is not loss:
        measurement = (loss, _measure(model))
        _shift_by_model[model] = measurement
    return measurement[1]


def _measure(model: PreTrainedModel) -> bool | None:
    try:
        source = inspect.getsource(inspect.unwrap(type(model).forward))
    except (OSError, TypeError):
        source = ""
    calls_loss_function = "loss_function(" in source and hasattr(model, "loss_function")
    if calls_loss_function and "shift" not in source and type(model).__module__.startswith("transformers."):
        return _measure_loss_function(model)
    if any(hasattr(p, "ds_id") or p.is_meta for p in model.parameters()):
        return _measure_loss_function(model) if calls_loss_function else None
    try:
        return _measure_forward(model)
    except Exception:  # it may need other inputs than text
        return _measure_loss_function(model) if calls_loss_function else None


def _measure_loss_function(model: PreTrainedModel) -> bool | None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, _NUM_TOKENS, _NUM_CLASSES, generator=generator)
    labels = torch.randint(0, _NUM_CLASSES, (1, _NUM_TOKENS), generator=generator)
    return _is_shifted(model.loss_function(logits=logits, labels=labels, vocab_size=_NUM_CLASSES), logits, labels)


def _measure_forward(model: PreTrainedModel) -> bool | None:
    generator = torch.Generator().manual_seed(0)
    vocab_size = min(model.config.get_text_config().vocab_size, 1000)
    device = next(model.get_input_embeddings().parameters()).device
    ids, labels = (torch.randint(3, vocab_size, (1, _NUM_TOKENS), generator=generator).to(device) for _ in range(2))
    with eval_mode(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        outputs = model(input_ids=ids, labels=labels, return_dict=True)
    return _is_shifted(outputs.loss, outputs.logits, labels)


def _is_shifted(loss: Tensor, logits: Tensor, labels: Tensor) -> bool | None:
    """Return whether `loss` is the cross entropy of shifted labels; None if it is clearly neither."""
    rows = logits.float()[0]
    shifted_error = (loss - cross_entropy(rows[:-1], labels[0, 1:])).abs().item()
    unshifted_error = (loss - cross_entropy(rows, labels[0])).abs().item()
    if _MIN_RATIO * shifted_error < unshifted_error:
        return True
    return False if _MIN_RATIO * unshifted_error < shifted_error else None
