"""Teachers that are given by path or Hub id: their config, their class, and the weights that the checkpoint holds."""

import json
import os
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from ..core.references import is_file, path_exists, reference_kind
from ..errors import DistillError, require_package
from ..hub import reading
from ..models.model_types import (
    decoder_type,
    encoder_decoder_type,
    how_to_match,
    model_type_of_class,
    unwrap_model,
    with_config,
)
from ..models.type_catalog import ENCODER, GENERATIVE_TYPES, ModelType

HUB_OPTIONS = ("revision", "trust_remote_code", "token", "cache_dir", "subfolder", "local_files_only", "code_revision")
_ADAPTER_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only")


def as_path(model: Any) -> Any:
    """Return a path or id as a string, with `~` expanded, and a model unchanged.

    Raises:
        DistillError: the value is neither a path, an id nor a module, or the path is no folder.
    """
    if isinstance(model, str | os.PathLike):
        path = os.path.expanduser(os.fspath(model))
        if reference_kind(path) == "path" and not path_exists(path):
            raise DistillError(
                f"The teacher {path} is a path, and there is no such folder: correct it (relative paths start at "
                f"{Path.cwd()}), or give the id of a repository on the Hub, such as org/name."
            )
        if is_file(Path(path)):
            raise DistillError(
                f"The teacher {path} is a file: give the folder of a model, with its config.json and weights, or the "
                "id of a repository on the Hub, such as org/name."
            )
        return path
    if isinstance(model, type):
        raise DistillError(
            f"The teacher is the class {model.__name__}: give an instance, such as {model.__name__}(...), or the path "
            "or id of a model."
        )
    if not isinstance(model, str | nn.Module):
        raise DistillError(
            f"The teacher is of the type {type(model).__name__}: give a transformers model, the path or id of one, or "
            "an instance of a class derived from hf_distill.Teacher."
        )
    return model


def hub_options(init_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return those arguments of `from_pretrained` that select files, for loading a config or a tokenizer."""
    return {name: value for name, value in init_kwargs.items() if name in HUB_OPTIONS}


def read_config(path: str, init_kwargs: dict[str, Any]) -> PretrainedConfig:
    """Load the config of a model, or of the base model of adapters.

    Raises:
        DistillError: there is no such model, or its config cannot be read.
    """
    options = {"trust_remote_code": False, **hub_options(init_kwargs)}
    adapter = read_adapter_config(path, init_kwargs)
    with reading(f"The config of the teacher {path}"):
        if adapter is None:
            return AutoConfig.from_pretrained(path, **options)
        require_package("peft", "peft", f"The teacher {path}, which is a folder of adapters,")
        options = {name: value for name, value in options.items() if name not in ("revision", "subfolder")}
        return AutoConfig.from_pretrained(
            adapter["base_model_name_or_path"], revision=adapter.get("revision") or "main", **options
        )


def read_adapter_config(path: str, init_kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Read the adapter config of a folder or repository; return None if it holds no adapters.

    Raises:
        DistillError: the file is no JSON object, or does not name the base model of the adapters.
    """
    options = {name: value for name, value in init_kwargs.items() if name in _ADAPTER_OPTIONS}
    options |= init_kwargs.get("adapter_kwargs", {})
    with reading(f"The teacher {path}"):
        file = find_adapter_config_file(path, **options)
        config = None if file is None else json.loads(Path(file).read_text())
    if config is not None and not (isinstance(config, dict) and config.get("base_model_name_or_path")):
        raise DistillError(
            f"adapter_config.json of the teacher {path} has no base_model_name_or_path: set it to the path or id of "
            "the model that the adapters were trained on."
        )
    return config


def load_pretrained(
    path: str, model_type: ModelType, student: nn.Module, config: PretrainedConfig, kwargs: dict
) -> nn.Module:
    """Load a checkpoint in the class that wrote it, or in the student's auto class if that class is unknown.

    Args:
        path: folder or id of the checkpoint.
        model_type: the student's model type.
        student: the student.
        config: config of the checkpoint; see `read_config`.
        kwargs: arguments of `from_pretrained`.

    Raises:
        DistillError: the checkpoint is of another model type, cannot be read, or lacks weights of the model.
    """
    adapter = read_adapter_config(path, kwargs)
    model_class = _class_of(path, model_type, student, config, adapter is not None)
    with reading(f"The teacher {path}"):
        model, report = model_class.from_pretrained(path, output_loading_info=True, **kwargs)
    adapter_modules = (adapter or {}).get("modules_to_save") or ()
    missing = [
        key for key in report["missing_keys"] if not {*key.split(".")} & {*adapter_modules} and "lora_" not in key
    ]
    if model_type is ENCODER:  # embeddings are pooled from the last hidden states
        missing = [key for key in missing if not key.startswith("pooler.")]
    missing += [key[0] for key in report["mismatched_keys"]]
    if missing:
        raise DistillError(
            f"The teacher {path} has no weights for {', '.join(sorted(missing)[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''} of a "
            f"{type(unwrap_model(model)).__name__}: they would be initialized at random, and the predictions would be "
            "random too. Give the checkpoint of a model that was trained for this task; if these weights do not "
            "matter, load the model yourself and pass it instead of its path."
        )
    return model


def check_checkpoint(path: str, model_type: ModelType, config: PretrainedConfig, is_adapter: bool = False) -> None:
    """Check that the class that wrote a checkpoint is of the student's model type.

    Raises:
        DistillError: it is of another model type, or of a type that cannot be distilled.
    """
    written_by = _written_by(config)
    written_type = None if written_by is None or is_adapter else model_type_of_class(written_by)
    if ENCODER in (written_type, model_type):  # a head can be put on an encoder, and AutoModel loads one without it
        return
    if written_type in GENERATIVE_TYPES:
        is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
        written_type = encoder_decoder_type(written_type) if is_encoder_decoder else decoder_type(written_type)
    written_type = None if written_type is None else with_config(written_type, config, f"The teacher {path}")
    if written_type is not None and not written_type.teaches(model_type):
        raise DistillError(
            f"The teacher {path} is {written_type.with_article} ({written_by.__name__}) and the student "
            f"{model_type.with_article}: {how_to_match(written_type, model_type)}"
        )


def _written_by(config: PretrainedConfig) -> Any:
    names = getattr(config, "architectures", None) or [""]
    return getattr(transformers, names[0], None)


def _class_of(path: str, model_type: ModelType, student: nn.Module, config: PretrainedConfig, is_adapter: bool) -> Any:
    check_checkpoint(path, model_type, config, is_adapter)
    written_by = _written_by(config)
    written_type = None if written_by is None else model_type_of_class(written_by)
    if written_type is not None and not is_adapter and (written_type is ENCODER) == (model_type is ENCODER):
        return written_by
    if (auto_class := auto_class_of(type(unwrap_model(student)), model_type)) is None:
        raise DistillError(
            f"The class that wrote the teacher {path} is not known, and the student is a {model_type.name}, for which "
            "transformers has no auto class: load the teacher, and pass the model instead of its path."
        )
    return getattr(transformers, auto_class)


def auto_class_of(model_class: type, model_type: ModelType) -> str | None:
    """Return the name of the auto class that maps to a model class; that of its model type if none or several do.

    It is None for a registered type.
    """
    names = {base.__name__ for base in model_class.__mro__}
    auto_classes = []
    for name in dir(transformers):
        mapping = (
            getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModelFor") else None
        )
        for value in getattr(mapping, "_model_mapping", {}).values():
            if names & ({value} if isinstance(value, str) else {*value}):
                auto_classes.append(name)
                break
    is_default = not auto_classes or model_type.auto_class in auto_classes
    return model_type.auto_class if is_default else auto_classes[0]
