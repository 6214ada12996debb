"""A checkpoint's weights, read back into the model that they were saved from.

transformers saves many classes under other names, and in other shapes, than their modules have (fused or split experts,
renamed blocks). `from_pretrained` converts them back; so does `load_weights`, into a model that is in use: parameters
stay the objects that optimizers and hooks know.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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

_SHOWN = 5  # keys that a message names


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy a checkpoint's weights into a model, in place.

    Args:
        model: without parallel wrappers and not sharded. Of one with adapters, checkpoints hold the adapters alone.
        folder: a checkpoint of one weights file, or of several with an index.

    Raises:
        DistillError: there are no weights; keys are missing, unexpected or of another shape. Parameters that are tied
            to one that is there are not missing.
    """
    if hasattr(model, "peft_config"):
        _load_adapters(model, folder)
    elif isinstance(model, PreTrainedModel):
        _load_converted(model, _read(folder), folder)
    else:
        _load_plain(model, _read(folder), folder)


def _read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, on the CPU."""
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            return _read_file(folder / name)
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if (folder / name).is_file():
            state: dict[str, Tensor] = {}
            for shard in sorted(set(json.loads((folder / name).read_text())["weight_map"].values())):
                if not (folder / shard).is_file():
                    raise DistillError(f"{folder} has no {shard}, which its {name} lists: restore it.")
                state |= _read_file(folder / shard)
            return state
    if not folder.is_dir():
        raise DistillError(f"Can't find a valid checkpoint at {folder}: there is no such folder.")
    raise DistillError(
        f"Can't find a valid checkpoint at {folder}: it has no {SAFE_WEIGHTS_NAME} and no index of several files."
    )


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _load_converted(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    """Load through the conversions with which this model would be saved; else those of its class."""
    tried = getattr(model, "_weight_conversions", None)
    mappings = [] if tried is None else [copy.deepcopy(tried)]
    mappings.append(get_model_conversion_mapping(model))
    for mapping in mappings:
        problems = _convert_into(model, state, mapping)
        if not problems:
            return
    _refuse(model, folder, problems)


@torch.no_grad()
def _convert_into(model: PreTrainedModel, state: dict[str, Tensor], mapping: list) -> list[str]:
    """Convert a state dict and copy it into a model; what does not fit, and then nothing is copied."""
    before, conversions = list(_tensors(model)), getattr(model, "_weight_conversions", None)
    try:
        config = LoadStateDictConfig(weight_mapping=mapping)
        info, _ = convert_and_load_state_dict_in_model(model, dict(state), config)
        loaded = [held[name] for held, name, _ in before]
    finally:  # conversion puts new tensors into the modules
        for held, name, tensor in before:
            held[name] = tensor
        model._weight_conversions = conversions
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
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # of other shapes
        raise DistillError(f"{folder} does not fit this {type(model).__name__}: {error}") from error
    _refuse(model, folder, _differences(model, missing, unexpected))


def _load_adapters(model: Any, folder: Path) -> None:
    """Read adapters through peft's own conversion, in the dtype that they are trained in.

    peft's file of a `default` adapter is in the checkpoint itself, and those of others are in folders of their names.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    for name, config in model.peft_config.items():
        places = [place for place in (folder / name, folder) if _has_adapter(place)]
        if not places:
            raise DistillError(
                f"Can't find a valid checkpoint at {folder}: it has no {ADAPTER_SAFE_WEIGHTS_NAME} of {name!r}."
            )
        try:
            state = load_peft_weights(str(places[0]), device="cpu")
            missing, unexpected = set_peft_model_state_dict(model, state, adapter_name=name)
        except (KeyError, RuntimeError) as error:  # a module that is saved as a whole is missing; other shapes
            raise DistillError(f"{places[0]} does not fit the adapter {name!r} of this model: {error}") from error
        trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        lacking = [key for key in missing if key in trained and not _is_of_another(key, name, model.peft_config)]
        if config.is_prompt_learning:  # of which peft loads the prompts by another call, strictly
            lacking = [key for key in lacking if not key.startswith("prompt_encoder.")]
            unexpected = [key for key in unexpected if "prompt" not in key]
        _refuse(model, places[0], _differences(model, lacking, unexpected))


def _has_adapter(place: Path) -> bool:
    return any((place / name).is_file() for name in (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME))


def _is_of_another(key: str, adapter: str, adapters: Mapping[str, Any]) -> bool:
    words = key.split(".")
    return adapter not in words and any(other in words for other in adapters)


def _tensors(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Each parameter and buffer with the dict of its module that holds it."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            yield from ((held, name, tensor) for name, tensor in held.items() if tensor is not None)


def _differences(model: nn.Module, missing: Any, unexpected: Any) -> list[str]:
    """Keys that a checkpoint lacks or has too many, but for those that a model does without."""
    missing, unexpected = set(missing), set(unexpected)
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    there = {id(tensor) for name, tensor in named.items() if name not in missing}
    tied = {name for name in missing if name in named and id(named[name]) in there}
    if isinstance(model, PreTrainedModel):
        unsaved = set(model._keys_to_ignore_on_save or ())
        missing -= {name for name in unsaved & missing if not getattr(named.get(name), "requires_grad", False)}
    return [f"{key} is missing" for key in sorted(missing - tied)] + [
        f"{key} is unknown to the model" for key in sorted(unexpected)
    ]


def _refuse(model: nn.Module, folder: Path, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DistillError(
            f"The weights in {folder} are not those of this {type(model).__name__}: "
            f"{'; '.join(problems[:_SHOWN])}{more}. Resume with the model that wrote it, made with the same config "
            "and adapters."
        )
