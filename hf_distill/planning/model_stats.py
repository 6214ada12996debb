"""What memory and compute depend on in a model, counted on the meta device: no weights are loaded or made."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ..models.blocks import find_blocks


@dataclass(frozen=True)
class ModelStats:
    """The parts of a model, in parameters unless it says otherwise.

    parameters:   all of them, tied ones once
    depth:        blocks, L
    block:        of the largest block
    outside:      of what is in no block: embeddings, head, last norm
    head:         of the output head, V * H, whether it is tied or not
    tied:         whether the head's weight is the embeddings'
    linear:       name -> (in, out) of every linear layer but the head
    experts:      of experts that are kept as one tensor, all of them
    active:       the share of the experts that a token passes
    hidden:       H
    vocab:        V
    intermediate: width of the feed-forward layers that a token passes
    heads:        of queries
    kv_heads:     of keys and values
    head_dim:     width of one of them
    norms:        norms of width H in a block
    head_norms:   whether queries and keys have norms of their own
    eager:        whether attention makes maps [heads, S, S]
    softcap:      whether attention logits pass a tanh
    dtype:        of the checkpoint
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
            config: of the model.
            attention: its implementation; None: the default of transformers.

        Raises:
            DistillError: its blocks cannot be found.
        """
        model, text = meta_model(config), config.get_text_config()
        blocks = find_blocks(model)[1]
        sizes = [_count(block.parameters()) for block in blocks]
        head = model.get_output_embeddings()
        norms = [m.weight.numel() for m in blocks[0].modules() if "Norm" in type(m).__name__ and hasattr(m, "weight")]
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
            dtype=config.dtype or torch.float32,
        )

    @cached_property
    def linear_weights(self) -> int:
        """Weights of the linear layers but the head, without biases."""
        return sum(map(prod, self.linear.values()))

    def adapters(self, rank: int, targets: str | Sequence[str]) -> int:
        """Parameters that LoRA trains: rank * (in + out) for each layer that peft would adapt (2106.09685)."""
        names = self.linear if targets == "all-linear" else [n for n in self.linear if _targeted(n, targets)]
        return sum(rank * sum(self.linear[name]) for name in names)


def meta_model(config: PretrainedConfig) -> Any:
    """The causal language model of a config, with shapes and no values."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def linear_layers(model: Any) -> dict[str, tuple[int, int]]:
    """Name -> (in, out) of every linear layer but the output head."""
    head, found = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.nx, module.nf)
    return found


def _targeted(name: str, targets: str | Sequence[str]) -> bool:
    """Whether peft adapts a layer: a pattern for the whole name, or names of which one ends it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)
