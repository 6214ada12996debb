"""Captures features of a model's layers during its forward, for the requested layers and tokens only.

Hidden states are taken by a forward hook on the layer. Values and maps of the attention do not leave its module, so
`AttentionInterface`, which all attention of transformers uses, is patched during the forward.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from ..core.loss_kinds import EMBEDDING
from ..core.pooling import PooledRows
from ..core.signals import FeatureKey
from ..core.targets import FeatureTokens, RowPositions
from ..errors import DistillError
from .blocks import embedding_module, get_layer_stack

Attention: TypeAlias = tuple[Tensor, Tensor | None]  # values [B, heads, S, d] and maps [B, heads, S, S]


@contextmanager
def capture_features(
    model: nn.Module, feature_requests: Mapping[FeatureKey, FeatureTokens]
) -> Iterator[dict[FeatureKey, Tensor]]:
    """Capture features of the forwards in a `with` block.

    Args:
        model: a transformers model, with or without wrappers.
        feature_requests: feature key -> the N tokens whose features are captured.

    Yields:
        feature key -> feature, set by a forward, with its graph if gradients are enabled; see `FeatureKey` for shapes.

    Raises:
        DistillError: a layer's attention does not use transformers' AttentionInterface, or returns no maps.
    """
    features: dict[FeatureKey, Tensor] = {}
    recorded: dict[nn.Module, Attention] = {}  # layer -> values and maps of its self-attention
    feature_keys: dict[nn.Module, list[FeatureKey]] = defaultdict(list)
    of_layers = [key for key in feature_requests if key.kind != EMBEDDING]
    stacks = {name: get_layer_stack(model, name) for name in {key.stack for key in of_layers}}
    for key in of_layers:
        feature_keys[stacks[key.stack].blocks[key.layer]].append(key)
    pooled = {key: tokens for key, tokens in feature_requests.items() if isinstance(tokens, PooledRows)}

    def capture_block(block: nn.Module, _args: tuple, output: Tensor | tuple) -> None:
        attention = recorded.pop(block, None)
        for key in feature_keys[block]:
            features[key] = _read_feature(key, feature_requests[key], output, attention, block)

    def pool_outputs(module: nn.Module, _args: tuple, output: object) -> None:
        hidden = _last_hidden_state(module, output)
        for key, rows in pooled.items():
            features[key] = rows.embed(hidden, str(key.pooling), module)

    handles = [block.register_forward_hook(capture_block) for block in feature_keys]
    if pooled:  # before hooks that read the features at the end of the same forward
        handles.append(embedding_module(model).register_forward_hook(pool_outputs, prepend=True))
    block_of_module = {
        module: block
        for block, block_keys in feature_keys.items()
        if any(key.kind != "hidden" for key in block_keys)
        for module in block.modules()
    }
    try:
        with _patch_attention(block_of_module, recorded):
            yield features
    finally:
        for handle in handles:
            handle.remove()


def _last_hidden_state(module: nn.Module, output: Any) -> Tensor:
    hidden = output.get("last_hidden_state") if isinstance(output, Mapping) else output
    hidden = hidden[0] if isinstance(hidden, tuple | list) else hidden
    if not isinstance(hidden, Tensor):
        raise DistillError(
            f"{type(module).__name__} returns a {type(output).__name__} without `last_hidden_state`, which embeddings "
            "are pooled from: remove the losses on embeddings, or use a model of transformers that returns it."
        )
    return hidden


def _read_feature(
    key: FeatureKey, tokens: FeatureTokens, output: Tensor | tuple, attention: Attention | None, block: nn.Module
) -> Tensor:
    if key.kind == "hidden":
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor):
            raise DistillError(
                f"{type(block).__name__} returns a {type(hidden).__name__} and not its hidden states, so they cannot "
                "be read: use losses on logits."
            )
        return tokens.gather(hidden)
    if attention is None:
        raise DistillError(
            f"{type(block).__name__} does not compute its attention through transformers' AttentionInterface, so its "
            f"{key.kind} cannot be read. Use a loss on hidden states: hidden_cosine, hidden_mse, hidden_relation."
        )
    values, maps = attention
    if key.kind == "values":
        if isinstance(tokens, RowPositions):
            tokens.resolve(torch.Size((values.shape[0], values.shape[2])))
        return values
    if maps is None:
        raise DistillError(
            f"The attention of {type(block).__name__} returns no maps: load the model with attn_implementation='eager'."
        )
    return tokens.gather(maps.transpose(1, 2))


@contextmanager
def _patch_attention(
    block_of_module: Mapping[nn.Module, nn.Module], recorded: dict[nn.Module, Attention]
) -> Iterator[None]:
    """Record values and maps of the first attention of each layer (a decoder's cross-attention is the second)."""
    if not block_of_module:
        yield
        return
    get_interface, gradients = AttentionInterface.get_interface, torch.is_grad_enabled()

    def get_recording(self: AttentionInterface, attn_implementation: str, default: Callable) -> Callable:
        attend = get_interface(self, attn_implementation, default)

        def record_attention(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            *args: object,
            dropout: float = 0.0,
            **kwargs: object,
        ) -> tuple[Tensor, Tensor | None]:
            output, maps = attend(module, query, key, value, *args, dropout=dropout, **kwargs)
            block = block_of_module.get(module)
            if block is not None and block not in recorded:
                if gradients and not torch.is_grad_enabled():
                    raise DistillError(
                        "Reentrant activation checkpointing runs the layers without a graph, so a loss on "
                        "attention has no gradient: set "
                        'activation_checkpointing_kwargs={"use_reentrant": False}.'
                    )
                if maps is not None and dropout and module.training:  # with dropout, rows are no distributions
                    maps = attend(module, query, key, value, *args, dropout=0.0, **kwargs)[1]
                recorded[block] = (value, maps)
            return output, maps

        return record_attention

    AttentionInterface.get_interface = get_recording  # type: ignore[method-assign]
    try:
        yield
    finally:
        AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
