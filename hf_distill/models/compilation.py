"""Compiles the transformer layers of a model with `torch.compile`, and finds modules that are compiled already.

Each layer is compiled in place (`nn.Module.compile`), so names of parameters, hooks and wrappers stay as they are, and
layers of one class share one graph. The output head is not compiled, because its forward is replaced in each step, and
a compiled model would keep the forward of an earlier step.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule

from .blocks import get_layer_stack, has_encoder_and_decoder
from .model_types import unwrap_model

_PREFIX = "_orig_mod."  # of the names of parameters inside an `OptimizedModule`


def compile_blocks(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Compile each transformer layer of a model in place; they are traced when they first run.

    Args:
        model: a transformers model, with or without wrappers.
        options: arguments of `torch.compile`.

    Raises:
        DistillError: the layers of the model are not found.
    """
    for block in transformer_blocks(model):
        block.compile(**options)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return all transformer layers of a model: those of the encoder and of the decoder if it has both.

    Raises:
        DistillError: they are not found.
    """
    stacks = ("encoder", "decoder") if has_encoder_and_decoder(model) else (None,)
    return [block for which in stacks for block in get_layer_stack(model, which).blocks]


def compiled_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the compiled modules of a model by name; the model itself has the name ""."""
    return {name: module for name, module in model.named_modules() if _is_compiled(module)}


def compiled_around_head(model: nn.Module) -> list[str]:
    """Return the names of the compiled modules that contain the output head of a model, or the whole model.

    A module that `torch.compile(module)` wraps counts too, wherever it is: it changes the names of parameters.
    """
    compiled = compiled_modules(model)
    if not compiled:
        return []
    inner = unwrap_model(model)
    getter = getattr(inner, "get_output_embeddings", None)
    head = (getter() if getter else None) or inner
    return [
        name
        for name, module in compiled.items()
        if isinstance(module, OptimizedModule) or any(part is head for part in module.modules())
    ]


def without_compilation_around_head(model: nn.Module) -> tuple[nn.Module, bool]:
    """Return a model whose output head is outside of every compiled module, and whether one contained it.

    Modules that `torch.compile(module)` wraps are replaced by the wrapped ones, and modules that are compiled in place
    are no longer. Layers that are compiled in place stay so.
    """
    was_compiled = False
    while (wrapped := getattr(model, "_orig_mod", None)) is not None:
        model, was_compiled = wrapped, True
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, OptimizedModule):
                setattr(parent, name, child._orig_mod)
                was_compiled = True
    modules = dict(model.named_modules())
    for name in compiled_around_head(model):
        modules[name]._compiled_call_impl = None
        modules[name].__dict__.pop("forward", None)
        was_compiled = True
    return model, was_compiled


def uncompiled_name(name: str) -> str:
    """Return the name of a parameter without the parts that `torch.compile(module)` adds to it."""
    return name.replace(_PREFIX, "")


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled: by `torch.compile(module)`, `module.compile()` or as `module.forward`."""
    return (
        isinstance(module, OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    )
