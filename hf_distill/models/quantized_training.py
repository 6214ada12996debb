"""Quantization-aware training with torchao: a student computes with rounded weights and trains the full ones."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..core.quantization_scheme import QuantizationScheme
from ..errors import DistillError, require_package
from .blocks import find_blocks, get_layer_stack, has_encoder_and_decoder
from .model_types import is_zero3_partitioned, unwrap_model

logger = logging.get_logger(__name__)
_MIN_GROUP_SIZE = 8  # smaller groups are possible, and are not suggested: their scales take as much as the weights
_MIN_QUANTIZED_SHARE = 0.9  # of the weights in the transformer layers, below which a warning is logged
_BLACKWELL = (10, 0)  # compute capability from which NVFP4 kernels exist


def prepare_quantized_student(model: nn.Module, scheme: QuantizationScheme) -> nn.Module:
    """Replace the nn.Linear modules in the layers of a student by modules that compute with quantized weights.

    The weights stay in full precision and are trained. In each forward they are rounded as `convert_quantized_student`
    rounds them, and the gradient passes the rounding unchanged (straight-through, 1308.3432). Embeddings, output head
    and norms stay as they are. The names in the state dict do not change, so that checkpoints are those of the plain
    model.

    Args:
        model: The student, a transformers model, in place. It is on its device, or still on the CPU.
        scheme: The quantization.

    Returns:
        The model.

    Raises:
        DistillError: torchao is not installed; the machine or the model does not support the scheme; the width of a
            layer is no multiple of the group size; the model has adapters, or is quantized or sharded already.
    """
    require_package("torchao", "torchao", "A quantized student")
    check_machine(scheme)
    _check_plain(model)
    layers = _linear_layers(model)
    check_group_widths(scheme, {name: layer.in_features for name, layer in layers.items()})
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(model, QATConfig(base_config(scheme), step="prepare"), filter_fn=lambda _, name: name in layers)
    return model


def convert_quantized_student(model: nn.Module, scheme: QuantizationScheme) -> nn.Module:
    """Quantize the weights of a student that `prepare_quantized_student` prepared, for serving.

    `save_pretrained` of a transformers model then writes a checkpoint that `from_pretrained` loads with torchao. The
    model cannot be trained any more.

    Args:
        model: The student, in place, without adapters and unsharded.
        scheme: The quantization it was prepared with.

    Returns:
        The model.

    Raises:
        DistillError: The model was not prepared.
    """
    if not is_fake_quantized(model):
        raise DistillError(
            f"{type(unwrap_model(model)).__name__} has no fake-quantized layer: call prepare_quantized_student first."
        )
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    unquantized_layers = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not _is_fake(module)
    ]
    quantize_(model, QATConfig(base_config(scheme), step="convert"), filter_fn=lambda module, _: _is_fake(module))
    if isinstance(model, PreTrainedModel):
        model.config.quantization_config = TorchAoConfig(base_config(scheme), modules_to_not_convert=unquantized_layers)
        cast(Any, model).hf_quantizer = AutoHfQuantizer.from_config(
            model.config.quantization_config, pre_quantized=True
        )
    return model


def is_fake_quantized(model: nn.Module) -> bool:
    """Whether a model has layers that torchao prepared for quantization-aware training."""
    return any(_is_fake(module) for module in model.modules())


def check_machine(scheme: QuantizationScheme) -> None:
    """Check that this machine can train with a scheme.

    Raises:
        DistillError: It cannot.
    """
    if scheme.name != "nvfp4":
        return
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if capability is None or capability < _BLACKWELL:
        device = (
            "no CUDA GPU" if capability is None else f"a GPU of compute capability {'.'.join(map(str, capability))}"
        )
        raise DistillError(
            f"The scheme nvfp4 needs a GPU of compute capability 10.0 or above (Blackwell), and this machine has "
            f"{device}. int8_weight_only, int4_weight_only and int8_dynamic_activation run on every machine."
        )


def base_config(scheme: QuantizationScheme) -> Any:
    """Return torchao's config of a scheme."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerAxis, PerGroup

    if scheme.name == "nvfp4":
        from torchao.prototype.mx_formats import NVFP4DynamicActivationNVFP4WeightConfig

        return NVFP4DynamicActivationNVFP4WeightConfig()
    dtype = torch.int4 if scheme.weight_bits == 4 else torch.int8  # type: ignore[attr-defined]  # PyTorch has no stub
    granularity = PerAxis(0) if scheme.group_size is None else PerGroup(scheme.group_size)
    if scheme.name == "int8_dynamic_activation":
        return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)


def _check_plain(model: nn.Module) -> None:
    """Check that the weights of a model are those of a plain, unsharded model."""
    inner: Any = unwrap_model(model)
    problem = ""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        problem = (
            "has adapters, which are added to the rounded weights and not rounded with them: merge them first "
            "(merge_and_unload), or train the full student"
        )
    elif getattr(inner, "hf_quantizer", None) is not None or is_fake_quantized(model):
        problem = "is quantized already: load the unquantized model"
    elif is_zero3_partitioned(model):
        problem = "is sharded by ZeRO-3, which torchao does not support: use DDP, ZeRO-1 or ZeRO-2"
    elif any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        problem = "is sharded already: prepare it before it is sharded"
    if problem:
        raise DistillError(f"The student {type(inner).__name__} {problem}.")


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the nn.Linear modules in the layers of a model, by name; warn if the layers have many other weights."""
    names = {id(module): name for name, module in model.named_modules()}
    blocks = [*_blocks(model)]
    layers = {names[id(module)]: module for block in blocks for module in block.modules() if type(module) is nn.Linear}
    if not layers:
        kinds = sorted(
            {type(module).__name__ for block in blocks for module in block.modules() if not [*module.children()]}
        )
        raise DistillError(
            f"The layers of {type(unwrap_model(model)).__name__} have no nn.Linear, which is what torchao quantizes. "
            f"Their modules: {', '.join(kinds)}."
        )
    weights = sum(parameter.numel() for block in blocks for parameter in block.parameters() if parameter.ndim > 1)
    share = sum(layer.weight.numel() for layer in layers.values()) / max(weights, 1)
    if share < _MIN_QUANTIZED_SHARE:
        logger.warning_once(
            f"Only {share:.0%} of the weights in the layers of {type(unwrap_model(model)).__name__} are in nn.Linear "
            "modules and are quantized. The others, such as experts that are stored as one tensor, stay in full "
            "precision."
        )
    return layers


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    if has_encoder_and_decoder(model):
        for which in ("encoder", "decoder"):
            yield from get_layer_stack(model, which).blocks
    else:
        yield from find_blocks(model)[1]


def check_group_widths(scheme: QuantizationScheme, widths: Mapping[str, int]) -> None:
    """Check that the groups of a scheme divide the widths of all layers.

    Args:
        scheme: The quantization.
        widths: Name of a linear layer -> its number of inputs.

    Raises:
        DistillError: They do not. The message names layers and the sizes that are possible.
    """
    size = scheme.required_divisor
    broken = {name: width for name, width in widths.items() if width % size}
    if not broken:
        return
    common = math.gcd(*widths.values())
    sizes = [divisor for divisor in range(_MIN_GROUP_SIZE, common + 1) if common % divisor == 0]
    possible = f"Sizes that divide all of them: {', '.join(map(str, sizes))}." if sizes else ""
    advice = possible if scheme.name != "nvfp4" else "Use another scheme."
    listed = ", ".join(f"{name} ({width})" for name, width in [*broken.items()][:3])
    others = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    raise DistillError(
        f"{scheme.name} has groups of {size} weights, which do not divide the width (in_features) of {listed}{others}. "
        f"{advice}".rstrip()
    )


def _is_fake(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).__module__.startswith(
        ("torchao.quantization.qat", "torchao.prototype.qat")
    )
