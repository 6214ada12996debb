"""Where a model keeps its transformer blocks, found without a table of model names."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..errors import DistillError
from .model_types import model_type_of, unwrap_model

SIDECAR = "distill_sidecar"  # the name under which modules that are not the model's own hang on it


@dataclass(frozen=True)
class LayerStack:
    """A model's blocks, or those of its encoder or decoder.

    name:      "encoder" or "decoder" of a model that has both, else None
    blocks:    in the order in which they run
    width:     H, of what they put out
    causal:    whether a position sees none after it
    attention: its attention's implementation: "sdpa", "eager", ...
    """

    name: str | None
    blocks: nn.ModuleList
    width: int
    causal: bool
    attention: str


def get_layer_stack(model: nn.Module, which: str | None = None) -> LayerStack:
    """The blocks of a model.

    Args:
        model: a transformers model, in wrappers or not.
        which: "encoder" or "decoder" for a model that has both (None: its decoder), else None.

    Raises:
        DistillError: the model has no such stack, or its blocks cannot be found.
    """
    model = unwrap_model(model)
    if model.config.is_encoder_decoder:
        which = which or "decoder"
        root = model.get_encoder() if which == "encoder" else model.get_decoder()
    elif which is not None:
        raise DistillError(f"{type(model).__name__} has one stack of blocks, no {which}: leave `stack` out.")
    else:
        root = model
    _, blocks = find_blocks(root, which)
    causal = model_type_of(model).shifts_labels or any(
        getattr(module, "is_causal", False) for module in blocks[0].modules()
    )
    config = root.config.get_text_config()
    return LayerStack(which, blocks, config.hidden_size, causal, config._attn_implementation)


def find_blocks(model: nn.Module, which: str | None = None) -> tuple[str, nn.ModuleList]:
    """The model's transformer blocks and their name inside it.

    The blocks are the outermost `nn.ModuleList` with as many members as the config says.

    Args:
        model: a transformers model.
        which: whose depth the config is asked for: "encoder" or "decoder"; None: the model's only one.

    Raises:
        DistillError: there is none, or more than one (an encoder and a decoder).
    """
    model = unwrap_model(model)
    config = model.config.get_text_config(decoder=which == "decoder" or None, encoder=which == "encoder" or None)
    depth = config.num_hidden_layers
    lists = dict(_outermost_lists(model))
    found = {name: blocks for name, blocks in lists.items() if len(blocks) == depth}
    if len(found) != 1:
        seen = ", ".join(f"{n} ({len(m)})" for n, m in lists.items()) or "none"
        raise DistillError(
            f"{type(model).__name__} has {len(found)} lists of {depth} blocks; exactly one is needed. Lists found: "
            f"{seen}."
        )
    return next(iter(found.items()))


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists that are in no list; what is inside them is not walked, so that this may be asked at each step."""
    for name, child in module.named_children():
        if name == SIDECAR:
            continue
        if isinstance(child, nn.ModuleList):
            yield prefix + name, child
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")
