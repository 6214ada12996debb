"""Which kinds of models distil, and what is peculiar to each.

A causal model predicts the next token, so its labels are shifted once; every other kind predicts in place. The logits
of a classifier are just a small vocabulary.
"""

from dataclasses import dataclass

import transformers
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.auto import modeling_auto as auto

from .errors import DistillError


@dataclass(frozen=True)
class Task:
    """A kind of model.

    auto_class: of transformers
    pipeline:   as the Hub calls what it does
    shift:      whether labels are shifted
    vocabulary: whether V is a tokenizer's
    """

    name: str
    auto_class: str
    pipeline: str
    shift: bool
    vocabulary: bool

    def size(self, model: nn.Module) -> int:
        """V: how many ids or classes an unwrapped model tells apart."""
        if not self.vocabulary:
            return model.config.num_labels
        head = model.get_output_embeddings()
        return getattr(head, "out_features", None) or model.config.get_text_config().vocab_size

    def load(self, path: str, **kwargs) -> nn.Module:
        """`AutoModelFor...from_pretrained(path, **kwargs)` for this kind."""
        return getattr(transformers, self.auto_class).from_pretrained(path, **kwargs)


CAUSAL = Task("causal language model", "AutoModelForCausalLM", "text-generation", shift=True, vocabulary=True)
MASKED = Task("masked language model", "AutoModelForMaskedLM", "fill-mask", shift=False, vocabulary=True)
SEQ2SEQ = Task(
    "sequence-to-sequence language model", "AutoModelForSeq2SeqLM", "text2text-generation", shift=False, vocabulary=True
)
SEQUENCE = Task(
    "sequence classifier", "AutoModelForSequenceClassification", "text-classification", shift=False, vocabulary=False
)
TOKEN = Task(
    "token classifier", "AutoModelForTokenClassification", "token-classification", shift=False, vocabulary=False
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


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside parallel and compiled wrappers, its adapters included."""
    from accelerate.utils import extract_model_from_parallel

    if isinstance(model, transformers.PreTrainedModel):  # no wrapper; accelerate would look through all of its modules
        return model
    return extract_model_from_parallel(model)


def bare(model: nn.Module) -> nn.Module:
    """The transformers model inside parallel, compiled and PEFT wrappers (never to be called: that skips DDP)."""
    model = unwrapped(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds shares of a model's parameters; without an engine around it such a model cannot run."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def task_of(model: nn.Module) -> Task:
    """The kind of `model`, from its class; for classes outside transformers, from its `loss_type`.

    Raises:
        DistillError: the model has no per-token or per-row distribution over ids or classes.
    """
    model = bare(model)
    task = _BY_CLASS.get(type(model).__name__) or _BY_LOSS.get(LOSS_MAPPING.get(getattr(model, "loss_type", None)))
    config = getattr(model, "config", None)
    if task is CAUSAL and getattr(config, "is_encoder_decoder", False):
        task = SEQ2SEQ
    if task is None:
        raise DistillError(
            f"{type(model).__name__} cannot be distilled: it is none of {', '.join(t.name for t in TASKS)}. "
            "Use a model of one of these kinds, or train it without a teacher."
        )
    problem = getattr(config, "problem_type", None)
    regression = problem in ("regression", "multi_label_classification") or (
        task is SEQUENCE and getattr(config, "num_labels", 2) == 1
    )
    if not task.vocabulary and regression:
        raise DistillError(
            f"{type(model).__name__} is set up for {problem or 'regression'}: its outputs are no distribution over "
            "classes. Use single-label classification, or train it without a teacher."
        )
    return task


TASKS = (CAUSAL, MASKED, SEQ2SEQ, SEQUENCE, TOKEN)
