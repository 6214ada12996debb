"""Features of a model's layers, kept while it runs: only of the layers and tokens asked for.

Hidden states are taken by a forward hook on the block. Values and maps of attention never leave its module, so they
are read where every attention of transformers passes, `AttentionInterface`, for the time of the call.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from ..core.signals import FeatureKey
from ..core.targets import RowPositions, Targets
from ..errors import DistillError
from .blocks import get_layer_stack


@contextmanager
def capture_features(
    model: nn.Module, feature_requests: Mapping[FeatureKey, Targets]
) -> Iterator[dict[FeatureKey, Tensor]]:
    """Keep features while a model runs, in a `with` block.

    Args:
        model: a transformers model, in wrappers or not.
        feature_requests: for each tap, the N tokens of which features are kept.

    Yields:
        tap -> feature, with its graph if gradients are on; see `Tap` for shapes.

    Raises:
        DistillError: a block's attention does not pass transformers' interface, or makes no maps.
    """
    found: dict[FeatureKey, Tensor] = {}
    running: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}  # block -> values and maps of its self-attention
    feature_keys: dict[nn.Module, list[FeatureKey]] = defaultdict(list)
    stacks = {name: get_layer_stack(model, name) for name in {key.stack for key in feature_requests}}
    for key in feature_requests:
        feature_keys[stacks[key.stack].blocks[key.layer]].append(key)

    def take(block: nn.Module, _args: Any, output: Any) -> None:
        seen = running.pop(block, None)
        for key in feature_keys[block]:
            found[key] = _feature(key, feature_requests[key], output, seen, block)

    handles = [block.register_forward_hook(take) for block in feature_keys]
    inside = {
        module: block
        for block, of_block in feature_keys.items()
        if any(key.kind != "hidden" for key in of_block)
        for module in block.modules()
    }
    try:
        with _patch_attention(inside, running):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _feature(key: FeatureKey, tokens: Targets, output: Any, seen: Any, block: nn.Module) -> Tensor:
    if key.kind == "hidden":
        return tokens.gather(output[0] if isinstance(output, tuple) else output)
    if seen is None:
        raise DistillError(
            f"{type(block).__name__} does not compute its attention through transformers' AttentionInterface, so its "
            f"{key.kind} cannot be read. Use a loss on hidden states: hidden_cosine, hidden_mse, hidden_relation."
        )
    values, maps = seen
    if key.kind == "values":
        if isinstance(tokens, RowPositions):
            tokens.at(torch.Size((values.shape[0], values.shape[2])))
        return values
    if maps is None:
        raise DistillError(
            f"The attention of {type(block).__name__} makes no maps: load with attn_implementation='eager'."
        )
    return tokens.gather(maps.transpose(1, 2))


@contextmanager
def _patch_attention(inside: Mapping[nn.Module, nn.Module], running: dict) -> Iterator[None]:
    """Note the first attention of each block (a decoder's cross-attention comes second)."""
    if not inside:
        yield
        return
    get_interface, gradients = AttentionInterface.get_interface, torch.is_grad_enabled()

    def get_recording(self, name: str, default: Callable) -> Callable:
        attend = get_interface(self, name, default)

        def record_attention(module, query, key, value, *args, dropout: float = 0.0, **kwargs):
            output, maps = attend(module, query, key, value, *args, dropout=dropout, **kwargs)
            block = inside.get(module)
            if block is not None and block not in running:
                if gradients and not torch.is_grad_enabled():
                    raise DistillError(
                        "Reentrant activation checkpointing hides the graph of a block's attention: set "
                        'activation_checkpointing_kwargs={"use_reentrant": False}.'
                    )
                if maps is not None and dropout and module.training:  # what was dropped is no distribution
                    maps = attend(module, query, key, value, *args, dropout=0.0, **kwargs)[1]
                running[block] = (value, maps)
            return output, maps

        return record_attention

    AttentionInterface.get_interface = get_recording
    try:
        yield
    finally:
        AttentionInterface.get_interface = get_interface
