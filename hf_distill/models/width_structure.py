"""Finds the units of a causal language model that can be pruned."""

import copy
from functools import lru_cache
from typing import cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import DistillError
from .model_types import unmeasured_type_of, unwrap_parallel
from .type_catalog import CAUSAL
from .width_axes import WidthStructure
from .width_check import check_units
from .width_probe import probe_structure


def check_prunable(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside parallel wrappers.

    Raises:
        DistillError: its units cannot be pruned: it is no causal language model, is quantized, or has adapters.
    """
    inner = unwrap_parallel(model)
    if hasattr(inner, "peft_config"):
        raise DistillError(
            "Units of a model with adapters cannot be pruned: merge the adapters first (`model.merge_and_unload()`), "
            "or pass the base model."
        )
    if not isinstance(inner, PreTrainedModel) or unmeasured_type_of(inner).name != CAUSAL.name:
        raise DistillError(
            f"{type(inner).__name__} is no causal language model of transformers: only layers can be removed from "
            "models of other types (keep_layers, cut_student)."
        )
    if getattr(inner, "quantization_method", None) is not None:
        raise DistillError(
            f"{type(inner).__name__} is quantized, and its weights cannot be divided into units: load it in bfloat16 "
            "or float32 to prune it, and quantize the student."
        )
    return inner


def find_width_structure(model: PreTrainedModel) -> WidthStructure:
    """Find the units of a causal language model, and check on a small model of its class that they can be removed.

    The weights of the model are not read.

    Args:
        model: a transformers model, without wrappers.

    Raises:
        DistillError: its weights are not those of its config.
    """
    structure = _structure_of(_Config(type(model), model.config))
    for name, parameter in cast(nn.Module, model).named_parameters(remove_duplicate=False):
        if (expected := structure.shapes.get(name)) != tuple(parameter.shape):
            raise DistillError(
                f"{name} of {type(model).__name__} has the shape {tuple(parameter.shape)}, and by its config it is "
                f"{expected or 'no weight of the model'}: only models that `from_pretrained` loads can be pruned."
            )
    return structure


class _Config:
    """The class and the config of a model as a key: equal if all values are."""

    def __init__(self, model_class: type[PreTrainedModel], config: PretrainedConfig):
        self.model_class, self.config = model_class, copy.deepcopy(config)
        self._key = (id(model_class), config.to_json_string(use_diff=False))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@lru_cache(maxsize=32)
def _structure_of(key: _Config) -> WidthStructure:
    return check_units(key.model_class, key.config, probe_structure(key.model_class, key.config))
