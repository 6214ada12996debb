"""Finds the transformer layers of a model, without a table of model names."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PretrainedConfig

from ..core.loss_kinds import EMBEDDING
from ..errors import DistillError
from ..losses.output_types import EMBEDDING_OUTPUTS
from .model_types import model_type_of, transformers_model_in, unwrap_model
from .type_catalog import IMAGE_TEXT

SIDECAR = "distill_sidecar"  # name of the submodule that holds trained modules outside the student


@dataclass(frozen=True)
class LayerStack:
    """The transformer layers of a model, or of its encoder or decoder.

    name:      "encoder" or "decoder" of a model that has both, else None
    blocks:    the layers, in the order in which they run
    width:     H, hidden size of their outputs
    causal:    whether attention is causal
    attention: attention implementation: "sdpa", "eager", ...
    layerdrop: option of the config by which training skips layers at random (LayerDrop); None if it skips none
    """

    name: str | None
    blocks: nn.ModuleList
    width: int
    causal: bool
    attention: str
    layerdrop: str | None = None


def get_layer_stack(model: nn.Module, which: str | None = None) -> LayerStack:
    """Return the layers of a model.

    Args:
        model: a transformers model, with or without wrappers.
        which: "encoder" or "decoder" for a model that has both (None for its decoder), else None. "embedding": the
            layers before its embeddings, those of the encoder of a model that has both.

    Raises:
        DistillError: the model has no such stack, or its layers cannot be found.
    """
    inner: Any = _with_config(model)
    if which == EMBEDDING:
        which = "encoder" if inner.config.is_encoder_decoder else None
    if inner.config.is_encoder_decoder:
        which = which or "decoder"
        root = inner.get_encoder() if which == "encoder" else inner.get_decoder()
    elif which is not None and model_type_of(model).name == IMAGE_TEXT.name:
        raise DistillError(
            f"{type(inner).__name__} is a {IMAGE_TEXT.name}, and losses on features compare the layers of its language "
            f"model at the target tokens, not those of its {which}: remove `stack`."
        )
    elif which is not None:
        raise DistillError(f"{type(inner).__name__} has one stack of layers and no {which}: remove `stack`.")
    else:
        root = inner
    _, blocks = find_blocks(root, which)
    causal = model_type_of(model).shifts_labels or any(
        getattr(module, "is_causal", False) for module in blocks[0].modules()
    )
    config = root.config.get_text_config()
    if getattr(config, "hidden_size", None) is None:
        raise DistillError(
            f"The config of {type(inner).__name__} has no `hidden_size`, so the width of the hidden states of its "
            "layers is not known: use losses on logits alone, without torch_compile."
        )
    layerdrop = f"{which}_layerdrop" if which else "layerdrop"
    is_dropped = bool(getattr(root, "layerdrop", getattr(config, layerdrop, 0.0)))  # some models copy it when created
    dropped = layerdrop if is_dropped else None
    return LayerStack(which, blocks, config.hidden_size, causal, config._attn_implementation, dropped)


def embedding_module(model: nn.Module) -> nn.Module:
    """Return the module whose last hidden states are pooled to embeddings: a model without its head or its decoder.

    Args:
        model: a model, with or without wrappers.

    Raises:
        DistillError: neither the model nor a transformers model inside it has a config.
    """
    if model_type_of(model).output_type is EMBEDDING_OUTPUTS:
        return unwrap_model(model)
    inner: Any = _with_config(model)
    return inner.get_encoder() if inner.config.is_encoder_decoder else getattr(inner, "base_model", inner)


def has_encoder_and_decoder(model: nn.Module) -> bool:
    """Whether a model has two stacks of layers.

    Raises:
        DistillError: neither the model nor a transformers model inside it has a config.
    """
    return bool(cast(Any, _with_config(model)).config.is_encoder_decoder)


def find_blocks(model: nn.Module, which: str | None = None) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of a model's transformer layers.

    The layers are the outermost `nn.ModuleList` with as many members as the config has layers, with attention if there
    are several such lists; in a vision-language model, that of its language model.

    Args:
        model: a transformers model.
        which: "encoder" or "decoder": the stack whose number of layers is read from the config; None for the model's
            only stack.

    Returns:
        (name of the list inside the model, the list).

    Raises:
        DistillError: no list or several lists have this length, or the model has an encoder and a decoder.
    """
    inner: Any = _with_config(model)
    config = inner.config.get_text_config(decoder=which == "decoder" or None, encoder=which == "encoder" or None)
    depth = getattr(config, "num_hidden_layers", None)
    if depth is None:
        raise DistillError(
            f"The config of {type(inner).__name__} has no `num_hidden_layers`, so its layers cannot be found: use "
            "losses on logits alone, without torch_compile."
        )
    lists = dict(_outermost_lists(inner))
    matches = {name: blocks for name, blocks in lists.items() if len(blocks) == depth}
    if len(matches) > 1 and which is None and not inner.config.is_encoder_decoder and hasattr(inner, "get_decoder"):
        of_language_model = [*dict(_outermost_lists(inner.get_decoder())).values()]
        matches = {name: stack for name, stack in matches.items() if any(stack is one for one in of_language_model)}
    if len(matches) > 1:  # such as the convolutions of a speech model, or the parametrizations of a weight
        matches = {name: stack for name, stack in matches.items() if _has_attention(stack[0])} or matches
    has_both = which is None and inner.config.is_encoder_decoder and len(lists) > 1
    if len(matches) != 1 or has_both:
        names = ", ".join(f"{name} ({len(blocks)})" for name, blocks in lists.items()) or "none"
        subject = "an encoder and a decoder" if has_both else f"{len(matches)} lists of {depth} layers"
        raise DistillError(
            f"{type(inner).__name__} has {subject}, but its layers must be in exactly one list. Its lists and their "
            f"lengths: {names}."
        )
    return next(iter(matches.items()))


def _has_attention(block: nn.Module) -> bool:
    return any(type(module).__name__.endswith("Attention") for module in block.modules())


def _with_config(model: nn.Module) -> nn.Module:
    """Return the module whose config describes the layers: the model, or the only transformers model inside it.

    Raises:
        DistillError: no module has one.
    """
    model = unwrap_model(model)
    described = model if isinstance(getattr(model, "config", None), PretrainedConfig) else transformers_model_in(model)
    if described is None:
        lists = ", ".join(f"{name} ({len(blocks)})" for name, blocks in _outermost_lists(model)) or "none"
        raise DistillError(
            f"{type(model).__name__} is no transformers model and does not contain exactly one, so its layers and the "
            "width of their hidden states are not known. Set `self.config = transformers.PretrainedConfig("
            "num_hidden_layers=..., hidden_size=...)` in the module; the layers are then its nn.ModuleList of this "
            f"length (its lists and their lengths: {lists}). Or use losses on logits alone, without torch_compile."
        )
    return described


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the lists that are in no other list, without walking their members: this runs at each step."""
    for name, child in module.named_children():
        if name == SIDECAR:
            continue
        if isinstance(child, nn.ModuleList):
            yield prefix + name, child
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")
