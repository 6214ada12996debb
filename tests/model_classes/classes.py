"""All classes of the installed transformers that predict ids or classes, which `DistillTrainer` could accept."""

import importlib
import inspect
import logging
import re
from functools import cache
from pathlib import Path

import transformers
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.auto import modeling_auto as auto

_MAPPINGS = (
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
_LOSSES = {
    LOSS_MAPPING[f"For{kind}"] for kind in ("CausalLM", "MaskedLM", "SequenceClassification", "TokenClassification")
}
_GROUPS = re.compile("|".join(LOSS_MAPPING))


@cache
def candidates() -> dict[str, type[PreTrainedModel]]:
    """Return class name -> class, in alphabetical order."""
    mapped = {
        name
        for mapping in _MAPPINGS
        for value in mapping.values()
        for name in ([value] if isinstance(value, str) else value)
    }
    classes = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text()
        if not any(name in source for name in ("For", "LMHead")):
            continue
        module = f"transformers.models.{path.parent.name}.{path.stem}"
        try:
            members = vars(importlib.import_module(module))
        except ImportError as error:
            logging.getLogger(__name__).warning("%s cannot be imported: %s", module, error)
            continue
        for name, cls in members.items():
            if not (inspect.isclass(cls) and issubclass(cls, PreTrainedModel)) or cls.__module__ != module:
                continue
            if "PreTrainedModel" not in name and (name in mapped or _loss(name) in _LOSSES):
                classes[name] = cls
    return dict(sorted(classes.items()))


def _loss(name: str):
    """Return the loss of transformers for a class of this name."""
    group = _GROUPS.search(name)
    return LOSS_MAPPING[group[0]] if group else None
