"""Teachers given by path or id: their config, their class, and whether the checkpoint has all of their weights."""

import json
import os
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from ..core.references import path_exists, reference_kind
from ..errors import DistillError, require_package
from ..hub import reading
from ..models.model_types import CAUSAL, SEQ2SEQ, ModelType, check_has_classes, model_type_of_class, unwrap_model

HUB_OPTIONS = ("revision", "trust_remote_code", "token", "cache_dir", "subfolder", "local_files_only", "code_revision")
_ADAPTER_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only")


def as_path(model: Any) -> Any:
    """A path or id as a string, with the user's folder for `~`; anything else as it is.

    Raises:
        DistillError: neither a path, an id nor a module; or a path where there is nothing.
    """
    if isinstance(model, str | os.PathLike):
        path = os.path.expanduser(os.fspath(model))
        if reference_kind(path) == "path" and not path_exists(path):
            raise DistillError(
                f"The teacher {path} is a path, and there is no such folder: correct it (relative paths start at "
                f"{Path.cwd()}), or give the id of a repository on the Hub, such as org/name."
            )
        return path
    if not isinstance(model, str | nn.Module):
        raise DistillError(
            f"The teacher is of the type {type(model).__name__}: give a transformers model, the path or id of one, or "
            "an instance of a class derived from hf_distill.Teacher."
        )
    return model


def hub_options(init_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that say which files are read, for a config or a tokenizer."""
    return {name: value for name, value in init_kwargs.items() if name in HUB_OPTIONS}


def read_config(path: str, init_kwargs: dict[str, Any]) -> PretrainedConfig:
    """The config of a model given by path; of a folder with adapters that of their base.

    Raises:
        DistillError: there is no such model, or its config cannot be read.
    """
    options = {"trust_remote_code": False, **hub_options(init_kwargs)}
    adapter = read_adapter_config(path, init_kwargs)
    with reading(f"The config of the teacher {path}"):
        if adapter is None:
            return AutoConfig.from_pretrained(path, **options)
        require_package("peft", "peft", f"The teacher {path}, which is a folder of adapters,")
        options = {k: v for k, v in options.items() if k not in ("revision", "subfolder")}
        return AutoConfig.from_pretrained(
            adapter["base_model_name_or_path"], revision=adapter.get("revision") or "main", **options
        )


def read_adapter_config(path: str, init_kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The config of the adapters that a folder or repository holds; None where it holds none.

    Raises:
        DistillError: it is no JSON object, or does not name the model that the adapters are for.
    """
    options = {k: v for k, v in init_kwargs.items() if k in _ADAPTER_OPTIONS} | init_kwargs.get("adapter_kwargs", {})
    with reading(f"The teacher {path}"):
        file = find_adapter_config_file(path, **options)
        config = None if file is None else json.loads(Path(file).read_text())
    if config is not None and not (isinstance(config, dict) and config.get("base_model_name_or_path")):
        raise DistillError(f"adapter_config.json of the teacher {path} names no base_model_name_or_path.")
    return config


def load_pretrained(
    path: str, task: ModelType, student: nn.Module, config: PretrainedConfig, kwargs: dict
) -> nn.Module:
    """The model of a checkpoint, in the class that wrote it, else in the student's auto class.

    Args:
        path: or id.
        task: the student's kind.
        student: the student.
        config: of the checkpoint; see `read_config`.
        kwargs: of `from_pretrained`.

    Raises:
        DistillError: the checkpoint is of another kind, cannot be read, or lacks weights of the model.
    """
    adapter = read_adapter_config(path, kwargs)
    model_class = _class_of(path, task, student, config, adapter is not None)
    with reading(f"The teacher {path}"):
        model, report = model_class.from_pretrained(path, output_loading_info=True, **kwargs)
    trained = (adapter or {}).get("modules_to_save") or ()
    missing = [key for key in report["missing_keys"] if not {*key.split(".")} & {*trained} and "lora_" not in key]
    missing += [key[0] for key in report["mismatched_keys"]]
    if missing:
        raise DistillError(
            f"The teacher {path} has no weights for {', '.join(sorted(missing)[:3])}"
            f"{f' and {len(missing) - 3} others' if len(missing) > 3 else ''} of a "
            f"{type(unwrap_model(model)).__name__}: they would be random, and so would its predictions. Give the "
            "checkpoint of a model that was trained for this task; if these weights do not matter, load the model and "
            "pass it in place of its path."
        )
    return model


def check_checkpoint(path: str, task: ModelType, config: PretrainedConfig, is_adapter: bool = False) -> None:
    """Refuse a checkpoint of another kind than the student, by the class that wrote it.

    Raises:
        DistillError: it is of another kind, or no classifier of single labels.
    """
    check_has_classes(f"The teacher {path}", task, config)
    written_by = _written_by(config)
    kind = None if written_by is None or is_adapter else model_type_of_class(written_by)
    if kind in (CAUSAL, SEQ2SEQ):
        kind = SEQ2SEQ if getattr(config, "is_encoder_decoder", False) else CAUSAL
    if kind is not None and kind.name != task.name:
        raise DistillError(
            f"The teacher {path} is a {kind.name} ({written_by.__name__}) and the student a {task.name}: use two "
            "models of one kind."
        )


def _written_by(config: PretrainedConfig) -> Any:
    names = getattr(config, "architectures", None) or [""]
    return getattr(transformers, names[0], None)


def _class_of(path: str, task: ModelType, student: nn.Module, config: PretrainedConfig, is_adapter: bool) -> Any:
    check_checkpoint(path, task, config, is_adapter)
    written_by = _written_by(config)
    if written_by is not None and model_type_of_class(written_by) is not None and not is_adapter:
        return written_by
    return getattr(transformers, auto_class_of(type(unwrap_model(student)), task))


def auto_class_of(model_class: type, task: ModelType) -> str:
    """The auto class whose table names a model class; that of its kind where none or several do."""
    names = {base.__name__ for base in model_class.__mro__}
    found = []
    for name in dir(transformers):
        mapping = (
            getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModelFor") else None
        )
        for value in getattr(mapping, "_model_mapping", {}).values():
            if names & ({value} if isinstance(value, str) else {*value}):
                found.append(name)
                break
    return task.auto_class if task.auto_class in found or not found else found[0]
