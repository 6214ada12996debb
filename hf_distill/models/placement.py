"""On which devices the weights of a model are, and how its parts are spread over devices and processes."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.distributed.fsdp import is_fsdp_managed_module

from .model_types import unwrap_model
from .sharding import is_sharded


def devices_of(model: nn.Module) -> list[torch.device]:
    """Return the devices of a model's parameters, each once, in their order."""
    return list(dict.fromkeys(p.device for p in model.parameters()))


def parameters_without_values(model: nn.Module) -> list[str]:
    """Return the names of parameters on the meta device, unless hooks of accelerate load their values when they run."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return []
    return [name for name, p in model.named_parameters() if p.is_meta and type(p.data) is torch.Tensor]


def input_device(model: nn.Module) -> torch.device | None:
    """Return the device to which the inputs of a model have to be moved before its forward.

    Returns:
        that of its first parameter, which is the embedding's; None if hooks of accelerate move the inputs, or if the
        model is sharded over processes and runs on the device of its process.
    """
    if hasattr(unwrap_model(model), "_hf_hook") or is_sharded(model) or is_fsdp_managed_module(model):
        return None
    return next((p.device for p in model.parameters()), None)


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether the output head of a model is divided over processes by tensor parallelism."""
    model = unwrap_model(model)
    if (getattr(model, "_tp_size", None) or 1) > 1:
        return True
    getter = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    is_fsdp = is_fsdp_managed_module(model) or any(isinstance(module, FSDPModule) for module in model.modules())
    return isinstance(getattr(head, "weight", None), DTensor) and not is_fsdp
