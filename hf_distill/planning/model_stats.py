"""Shapes and sizes of a model, counted on the meta device: no weights are loaded or allocated."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..models.blocks import find_blocks


@dataclass(frozen=True)
class ModelStats:
    """Sizes of a causal language model; counts are in parameters unless another unit is named.

    parameters:   all parameters; tied ones count once
    depth:        number of layers, L
    block:        parameters of the largest layer
    outside:      parameters outside layers: embeddings, output head, last norm
    head:         parameters of the output head, V * H, whether it is tied or not
    tied:         whether the output head shares the embeddings' weight
    linear:       name -> (in, out) of every linear layer except the output head
    experts:      parameters of all experts that are stored as one tensor
    active:       share of the experts that a token passes
    hidden:       H
    vocab:        V
    intermediate: width of the feed-forward layers that a token passes
    heads:        number of query heads
    kv_heads:     number of key and value heads
    head_dim:     width of an attention head
    norms:        number of norms of width H in a layer
    head_norms:   whether queries and keys are normalized
    eager:        whether attention materializes its maps [heads, S, S]
    softcap:      whether attention logits are soft-capped
    dtype:        dtype of the checkpoint
    """

    parameters: int
    depth: int
    block: int
    outside: int
    head: int
    tied: bool
    linear: dict[str, tuple[int, int]]
    experts: int
    active: float
    hidden: int
    vocab: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    norms: int
    head_norms: bool
    eager: bool
    softcap: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, config: PretrainedConfig, attention: str | None = None) -> "ModelStats":
        """Count the causal language model that a config describes.

        Args:
            config: the config of the model.
            attention: its attention implementation; None: the default of transformers.

        Raises:
            DistillError: the layers of the model cannot be found.
        """
        model, text = meta_model(config), config.get_text_config()
        blocks = find_blocks(model)[1]
        sizes = [_count(block.parameters()) for block in blocks]
        head = model.get_output_embeddings()
        norms = [
            weight.numel()
            for m in blocks[0].modules()
            if "Norm" in type(m).__name__ and isinstance(weight := getattr(m, "weight", None), Tensor)
        ]
        experts = [p for block in blocks for p in block.parameters() if p.ndim == 3]
        chosen, width = getattr(text, "num_experts_per_tok", None), getattr(text, "moe_intermediate_size", None)
        intermediate = chosen * width if experts and chosen and width else getattr(text, "intermediate_size", None)
        heads, parameters = text.num_attention_heads, _count(model.parameters())
        return cls(
            parameters=parameters,
            depth=len(blocks),
            block=max(sizes),
            outside=parameters - sum(sizes),
            head=head.weight.numel(),
            tied=head.weight is model.get_input_embeddings().weight,
            linear=linear_layers(model),
            experts=_count(experts),
            active=chosen / experts[0].shape[0] if experts and chosen else 1.0,
            hidden=text.hidden_size,
            vocab=head.weight.shape[0],
            intermediate=intermediate or 4 * text.hidden_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            norms=sum(size == text.hidden_size for size in norms),
            head_norms=any(size != text.hidden_size for size in norms),
            eager=(attention or model.config._attn_implementation) == "eager",
            softcap=getattr(text, "attn_logit_softcapping", None) is not None,
            dtype=cast(torch.dtype, config.dtype) or torch.float32,
        )

    @cached_property
    def linear_weights(self) -> int:
        """Weights of the linear layers except the output head, without biases."""
        return sum(map(prod, self.linear.values()))

    def adapters(self, rank: int, targets: str | Sequence[str]) -> int:
        """Count the parameters that LoRA trains: rank * (in + out) for each layer that peft adapts (2106.09685)."""
        names = self.linear if targets == "all-linear" else [n for n in self.linear if _is_adapted(n, targets)]
        return sum(rank * sum(self.linear[name]) for name in names)


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build the causal language model of a config on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def linear_layers(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return name -> (in, out) of every linear layer except the output head."""
    head, layers = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            layers[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            layers[name] = (module.nx, module.nf)
    return layers


def _is_adapted(name: str, targets: str | Sequence[str]) -> bool:
    """Whether peft adapts a layer: `targets` is a pattern for the full name, or a list of names that may end it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
