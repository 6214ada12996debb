"""Checksums by which a cache recognizes its teacher, tokenizer and chat template."""

import hashlib
import json

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..models.compilation import uncompiled_name
from ..models.model_types import unwrap_parallel
from ..models.sharding import full_tensor, gathered

_VALUES_PER_TENSOR = 4096  # approximate number of sampled values
_PROBE = "The quick brown fox, 1234: naïve façade?\n\tdef f(x): return x"


@torch.no_grad()
def weights_fingerprint(model: nn.Module, only_frozen: bool = False) -> str:
    """Return a checksum of evenly spaced values of each parameter, also of a quantized or sharded model.

    Sharding does not change it. All processes must call it; each sharded parameter is gathered temporarily. Of
    parameters that a device map has offloaded, only name and shape are read.

    Args:
        model: the model.
        only_frozen: whether parameters that are trained are left out.
    """
    digest = hashlib.sha256()
    named = {uncompiled_name(name): parameter for name, parameter in unwrap_parallel(model).named_parameters()}
    for name, parameter in sorted(named.items()):
        if only_frozen and parameter.requires_grad:
            continue
        with gathered([parameter]):
            value = full_tensor(parameter).detach()
            if hasattr(value, "__tensor_flatten__"):  # a quantized weight of torchao, which cannot be flattened
                value = value.dequantize()
            flat = value.flatten()
            if flat.is_meta:
                digest.update(f"{name} {tuple(parameter.shape)}".encode())
                continue
            sample = flat[:: max(1, len(flat) // _VALUES_PER_TENSOR)].cpu().contiguous()
            digest.update(f"{name} {tuple(parameter.shape)} {sample.dtype}".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Return a checksum of the vocabulary and of the tokens of a probe text; None without a tokenizer."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):  # a processor of images or audio has none
        return None
    probe_ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return _sha256(json.dumps([sorted(tokenizer.get_vocab().items()), probe_ids]))


def template_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Return a checksum of the chat template; None without a template."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else _sha256(json.dumps(template, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
