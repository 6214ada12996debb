"""Loads the weights of a checkpoint into the model that wrote it.

transformers saves the weights of many classes with other names and shapes than those of their modules (fused or split
experts, renamed blocks), and `from_pretrained` converts them back. `load_weights` does so in place, for a model in use:
its parameters stay the objects that optimizers and hooks refer to.
"""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ..errors import DistillError

if TYPE_CHECKING:
    from peft import PeftModel

_MAX_NAMED_KEYS = 5  # in an error message


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy a checkpoint's weights into a model, in place.

    Args:
        model: a model without parallel wrappers, not sharded. With adapters, checkpoints have the adapters only.
        folder: a checkpoint with one weights file, or several with an index.

    Raises:
        DistillError: the checkpoint has no weights, or keys are missing, unexpected or have other shapes. A parameter
            that is tied to a loaded one is not missing.
    """
    if hasattr(model, "peft_config"):
        _load_adapters(cast("PeftModel", model), folder)
    elif isinstance(model, PreTrainedModel):
        _load_converted(model, read_weights(folder), folder)
    else:
        _load_plain(model, read_weights(folder), folder)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, on the CPU."""
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            return _read_file(folder / name)
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if (folder / name).is_file():
            state: dict[str, Tensor] = {}
            for shard in sorted(set(json.loads((folder / name).read_text())["weight_map"].values())):
                if not (folder / shard).is_file():
                    raise DistillError(
                        f"{folder} has no {shard}, which its {name} lists: restore the file, or use another checkpoint."
                    )
                state |= _read_file(folder / shard)
            return state
    if not folder.is_dir():
        raise DistillError(f"Can't find a valid checkpoint at {folder}: the folder does not exist.")
    raise DistillError(
        f"Can't find a valid checkpoint at {folder}: it has no {SAFE_WEIGHTS_NAME} and no index of several files."
    )


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _load_converted(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    """Load with the conversions that this model would be saved with, or else with those of its class."""
    conversions = getattr(model, "_weight_conversions", None)
    mappings = [] if conversions is None else [copy.deepcopy(conversions)]
    mappings.append(get_model_conversion_mapping(model))
    for mapping in mappings:
        problems = _convert_into(model, state, mapping)
        if not problems:
            return
    _raise_problems(model, folder, problems)


@torch.no_grad()
def _convert_into(model: PreTrainedModel, state: dict[str, Tensor], mapping: list) -> list[str]:
    """Convert a state dict and copy it into a model; return problems, in which case nothing is copied."""
    before, conversions = list(_tensors(model)), getattr(model, "_weight_conversions", None)
    try:
        config = LoadStateDictConfig(weight_mapping=mapping)
        info, _ = convert_and_load_state_dict_in_model(model, dict(state), config)
        loaded = [tensors[name] for tensors, name, _ in before]
    finally:  # the conversion replaces the tensors of the modules
        for tensors, name, tensor in before:
            tensors[name] = tensor
        model._weight_conversions = conversions  # type: ignore[assignment]
    errors = [*info.error_msgs, *info.conversion_errors.values()]
    shapes = [f"{key} has shape {tuple(a)} instead of {tuple(b)}" for key, a, b in sorted(info.mismatched_keys)]
    problems = _differences(model, info.missing_keys, info.unexpected_keys) + shapes + errors
    if not problems:
        for (_, _, tensor), new in zip(before, loaded, strict=True):
            if new is not tensor:
                tensor.copy_(new)
    return problems


def _load_plain(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    try:
        keys = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes differ
        raise DistillError(f"{folder} does not fit this {type(model).__name__}: {error}") from error
    _raise_problems(model, folder, _differences(model, keys.missing_keys, keys.unexpected_keys))


def tied_once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in which each tied tensor has its first name only, because safetensors refuses several.

    `load_weights` accepts it: a tied parameter is not missing.
    """
    kept: dict[object, str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        kept.setdefault(place, name)
    names = {*kept.values()}
    return {name: tensor for name, tensor in state.items() if name in names}


def _load_adapters(model: "PeftModel", folder: Path) -> None:
    """Load adapters with peft's conversion, in the dtype that they are trained in.

    peft writes the adapter `default` into the checkpoint folder, and each other adapter into a subfolder of its name.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    for name, config in model.peft_config.items():
        adapter_folder = next((path for path in (folder / name, folder) if _has_adapter(path)), None)
        if adapter_folder is None:
            raise DistillError(
                f"Can't find a valid checkpoint at {folder}: it has no {ADAPTER_SAFE_WEIGHTS_NAME} of {name!r}."
            )
        try:
            state = load_peft_weights(str(adapter_folder), device="cpu")
            keys: Any = set_peft_model_state_dict(model, state, adapter_name=name)
        except (KeyError, RuntimeError) as error:  # a fully saved module is missing, or shapes differ
            raise DistillError(f"{adapter_folder} does not fit the adapter {name!r} of this model: {error}") from error
        trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        lacking = [
            key
            for key in keys.missing_keys
            if key in trained and not _is_of_another_adapter(key, name, model.peft_config)
        ]
        unexpected = keys.unexpected_keys
        if config.is_prompt_learning:  # peft loads the prompts separately and strictly
            lacking = [key for key in lacking if not key.startswith("prompt_encoder.")]
            unexpected = [key for key in unexpected if "prompt" not in key]
        _raise_problems(model, adapter_folder, _differences(model, lacking, unexpected))


def _has_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME))


def _is_of_another_adapter(key: str, adapter: str, adapters: Mapping[str, object]) -> bool:
    parts = key.split(".")
    return adapter not in parts and any(other in parts for other in adapters)


def _tensors(model: nn.Module) -> Iterator[tuple[dict, str, Tensor]]:
    """Yield each parameter and buffer as (dict of its module, name in this dict, tensor)."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            yield from ((tensors, name, tensor) for name, tensor in tensors.items() if tensor is not None)


def _differences(model: nn.Module, missing_keys: Iterable[str], unexpected_keys: Iterable[str]) -> list[str]:
    """Return a message for each missing or unexpected key, without tied parameters and keys that are never saved."""
    missing, unexpected = set(missing_keys), set(unexpected_keys)
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    loaded_ids = {id(tensor) for name, tensor in named.items() if name not in missing}
    tied = {name for name in missing if name in named and id(named[name]) in loaded_ids}
    if isinstance(model, PreTrainedModel):
        unsaved = set(model._keys_to_ignore_on_save or ())
        missing -= {name for name in unsaved & missing if not getattr(named.get(name), "requires_grad", False)}
    return [f"{key} is missing" for key in sorted(missing - tied)] + [
        f"{key} is unknown to the model" for key in sorted(unexpected)
    ]


def _raise_problems(model: nn.Module, folder: Path, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - _MAX_NAMED_KEYS} more" if len(problems) > _MAX_NAMED_KEYS else ""
        raise DistillError(
            f"The weights in {folder} are not those of this {type(model).__name__}: "
            f"{'; '.join(problems[:_MAX_NAMED_KEYS])}{more}. Resume with the model that wrote the checkpoint, built "
            "with the same config and adapters."
        )
