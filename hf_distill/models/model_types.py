"""Which kinds of models distil, and what is peculiar to each.

Whether the labels of a causal model are shifted is decided by its own loss; every other kind predicts in place. The
logits of a classifier are just a small vocabulary.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import transformers
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.auto import modeling_auto as auto

from ..errors import DistillError
from .label_shift import loss_shifts_labels


@dataclass(frozen=True)
class ModelType:
    """A kind of model.

    auto_class: of transformers
    pipeline:   as the Hub calls what it does
    shift:      whether its own loss shifts labels; of `CAUSAL` itself: what most models of the kind do
    vocabulary: whether V is a tokenizer's
    """

    name: str
    auto_class: str
    pipeline: str
    shifts_labels: bool
    vocabulary: bool

    def num_outputs(self, model: nn.Module) -> int:
        """V: how many ids or classes an unwrapped model tells apart."""
        if not self.vocabulary:
            return model.config.num_labels
        head = model.get_output_embeddings()
        # peft's copy of a tied head takes `out_features` from the embedding: what it was copied from is right.
        head = getattr(head, "original_module", None) or head
        return getattr(head, "out_features", None) or model.config.get_text_config().vocab_size


CAUSAL = ModelType(
    "causal language model", "AutoModelForCausalLM", "text-generation", shifts_labels=True, vocabulary=True
)
MASKED = ModelType("masked language model", "AutoModelForMaskedLM", "fill-mask", shifts_labels=False, vocabulary=True)
SEQ2SEQ = ModelType(
    "sequence-to-sequence language model",
    "AutoModelForSeq2SeqLM",
    "text2text-generation",
    shifts_labels=False,
    vocabulary=True,
)
SEQUENCE = ModelType(
    "sequence classifier",
    "AutoModelForSequenceClassification",
    "text-classification",
    shifts_labels=False,
    vocabulary=False,
)
TOKEN = ModelType(
    "token classifier", "AutoModelForTokenClassification", "token-classification", shifts_labels=False, vocabulary=False
)

_BY_CLASS = {
    class_name: task
    for names, task in (
        (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, TOKEN),
        (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, SEQUENCE),
        (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, MASKED),
        (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, SEQ2SEQ),
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, CAUSAL),
    )
    for value in names.values()
    for class_name in ([value] if isinstance(value, str) else value)
}
_BY_LOSS = {
    LOSS_MAPPING["ForCausalLM"]: CAUSAL,
    LOSS_MAPPING["ForMaskedLM"]: MASKED,
    LOSS_MAPPING["ForSequenceClassification"]: SEQUENCE,
    LOSS_MAPPING["ForTokenClassification"]: TOKEN,
}


def unwrap_parallel(model: nn.Module) -> nn.Module:
    """The model inside parallel and compiled wrappers, its adapters included."""
    from accelerate.utils import extract_model_from_parallel

    if isinstance(model, transformers.PreTrainedModel):  # no wrapper; accelerate would look through all of its modules
        return model
    return extract_model_from_parallel(model, keep_torch_compile=False)


def unwrap_model(model: nn.Module) -> nn.Module:
    """The transformers model inside parallel, compiled and PEFT wrappers (never to be called: that skips DDP)."""
    model = unwrap_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_zero3_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds shares of a model's parameters; without an engine around it such a model cannot run."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def model_type_of_class(cls: type) -> ModelType | None:
    """The kind of the models of a class, from its name or that of a base; None if it is none of those that distil."""
    for base in cls.__mro__:
        named = re.findall(f"({'|'.join(LOSS_MAPPING)})", base.__name__)
        loss = LOSS_MAPPING.get(base.__name__) or LOSS_MAPPING.get(named[0] if named else "")
        if task := _BY_CLASS.get(base.__name__) or _BY_LOSS.get(loss):
            return task
    return None


def model_type_of(model: nn.Module) -> ModelType:
    """The kind of `model`, from its class; for classes outside transformers, from its `loss_type`.

    Raises:
        DistillError: it is no transformers model, or has no per-token or per-row distribution over ids or classes.
    """
    model = unwrap_model(model)
    config = getattr(model, "config", None)
    task = _BY_CLASS.get(type(model).__name__) or _BY_LOSS.get(LOSS_MAPPING.get(getattr(model, "loss_type", None)))
    task = task or model_type_of_class(type(model))
    if task is None or not isinstance(model, transformers.PreTrainedModel):
        what = f"none of {', '.join(t.name for t in MODEL_TYPES)}"
        raise DistillError(
            f"{type(model).__name__} cannot be distilled: it is "
            f"{what if isinstance(model, transformers.PreTrainedModel) else 'no transformers model'}. "
            f"Use a transformers model ({', '.join(t.name for t in MODEL_TYPES)}; the model itself, not a module "
            "around it), derive a teacher from hf_distill.Teacher, or train without a teacher."
        )
    check_has_classes(type(model).__name__, task, config)
    if task in (CAUSAL, SEQ2SEQ):
        if getattr(config, "is_encoder_decoder", False):
            return SEQ2SEQ
        shift = loss_shifts_labels(model)
        return CAUSAL if shift is None else replace(CAUSAL, shifts_labels=shift)
    return task


def check_has_classes(name: str, task: ModelType, config: Any) -> None:
    """Refuse a classifier whose outputs are no distribution over classes.

    Args:
        name: of its class, for the error.
        task: its kind.
        config: its config.

    Raises:
        DistillError: it is set up for regression or for several labels at once.
    """
    problem = getattr(config, "problem_type", None)
    one_output = task is SEQUENCE and getattr(config, "num_labels", 2) == 1
    if not task.vocabulary and (problem in ("regression", "multi_label_classification") or one_output):
        raise DistillError(
            f"{name} is set up for {problem or 'regression'}: its outputs are no distribution over classes. Use "
            "single-label classification, or train it without a teacher."
        )


MODEL_TYPES = (CAUSAL, MASKED, SEQ2SEQ, SEQUENCE, TOKEN)
