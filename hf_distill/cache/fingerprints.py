"""By what a cache knows a teacher and a tokenizer again."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLED = 4096  # numbers of each tensor, about
_PROBE = "The quick brown fox, 1234: naïve façade?\n\tdef f(x): return x"


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """A checksum of about every k-th number of each parameter, of a whole, quantised or sharded model.

    Called on all processes; a parameter that is sharded is gathered for a moment.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = _whole(parameter).detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLED)].cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {sample.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _whole(parameter: Any) -> Tensor:
    if hasattr(parameter, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.data.clone()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """A checksum of what ids mean and of how a text is split; None where there is no tokenizer."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    split = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return _sha256(json.dumps([sorted(tokenizer.get_vocab().items()), split]))


def template_fingerprint(tokenizer: Any) -> str | None:
    """A checksum of the chat template; None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else _sha256(json.dumps(template, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
