"""Which type a model has, from its class, its config or its declaration, and the model inside its wrappers.

The loss of a causal model decides whether its labels are shifted; models of other types predict the label at their
position. `type_catalog` defines the types.
"""

import re
from dataclasses import replace
from functools import partial
from typing import cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.auto import modeling_auto as auto

from ..errors import DistillError
from ..losses.output_types import BERNOULLI_OUTPUTS, REAL_VALUE_OUTPUTS, Frames, Pixels
from .frame_counts import count_frames
from .image_inputs import placeholder_ids
from .label_shift import loss_shifts_labels
from .type_catalog import (
    AUDIO,
    CAUSAL,
    CTC,
    ENCODER,
    GENERATIVE_TYPES,
    IMAGE,
    IMAGE_TEXT,
    MASKED,
    MULTI_LABEL,
    MULTIPLE_CHOICE,
    NEXT_SENTENCE,
    QUESTION_ANSWERING,
    REGRESSION,
    SEMANTIC_SEGMENTATION,
    SEQ2SEQ,
    SEQUENCE,
    SPEECH_SEQ2SEQ,
    TOKEN,
    TYPE_BY_NAME,
    VIDEO,
    ModelType,
)

# What a classifier of rows is for `problem_type`: (for several labels, for real numbers).
_BY_PROBLEM = {SEQUENCE: (MULTI_LABEL, REGRESSION)} | {
    classifier: (
        replace(classifier, name=f"multi-label {classifier.name}", output_type=BERNOULLI_OUTPUTS),
        replace(classifier, name=f"{classifier.name.split()[0]} regression model", output_type=REAL_VALUE_OUTPUTS),
    )
    for classifier in (IMAGE, AUDIO, VIDEO)
}

_BY_CLASS = {
    class_name: model_type
    for names, model_type in (
        (auto.MODEL_MAPPING_NAMES, ENCODER),
        (auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, ENCODER),
        (auto.MODEL_FOR_CTC_MAPPING_NAMES, CTC),
        (auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES, SEMANTIC_SEGMENTATION),
        (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, IMAGE),
        (auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, AUDIO),
        (auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES, VIDEO),
        (auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES, MULTIPLE_CHOICE),
        (auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES, NEXT_SENTENCE),
        (auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, QUESTION_ANSWERING),
        (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, TOKEN),
        (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, SEQUENCE),
        (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, MASKED),
        (auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, SPEECH_SEQ2SEQ),
        (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, SEQ2SEQ),
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, CAUSAL),
        (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, IMAGE_TEXT),
    )
    for value in names.values()
    for class_name in ([value] if isinstance(value, str) else value)
}
_BY_LOSS: dict[object, ModelType] = {
    LOSS_MAPPING["ForCausalLM"]: CAUSAL,
    LOSS_MAPPING["ForMaskedLM"]: MASKED,
    LOSS_MAPPING["ForSequenceClassification"]: SEQUENCE,
    LOSS_MAPPING["ForTokenClassification"]: TOKEN,
    LOSS_MAPPING["ForQuestionAnswering"]: QUESTION_ANSWERING,
    LOSS_MAPPING["ForCTC"]: CTC,
    LOSS_MAPPING["ForSemanticSegmentation"]: SEMANTIC_SEGMENTATION,
}
# Classifiers of rows have one loss function; the name of a class or its main input says what the rows are.
_BY_LOSS_NAME = {"ForImageClassification": IMAGE, "ForAudioClassification": AUDIO, "ForVideoClassification": VIDEO}
_BY_INPUT = {
    "pixel_values": IMAGE,
    "pixel_values_videos": VIDEO,
    "input_values": AUDIO,
    "input_features": AUDIO,
}
DECLARED_TYPE = "_hf_distill_model_type"  # attribute of a model whose type the user named


def unwrap_parallel(model: nn.Module) -> nn.Module:
    """Return the model inside parallel and compiled wrappers, with its adapters."""
    from accelerate.utils import extract_model_from_parallel

    if isinstance(model, PreTrainedModel):  # accelerate would walk all of its modules
        return model
    return extract_model_from_parallel(model, keep_torch_compile=False)


def unwrap_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside parallel, compiled and PEFT wrappers.

    Do not call the result: without its wrappers there is no DDP, FSDP2 or ZeRO-3.
    """
    model = unwrap_parallel(model)
    get_base_model = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, model if get_base_model is None else get_base_model())


def transformers_model_in(model: nn.Module) -> PreTrainedModel | None:
    """Return the transformers model inside a model's wrappers, or the only one inside a module around it.

    Returns:
        None if there is none, or a module contains several that are not inside each other.
    """
    model = unwrap_model(model)
    if isinstance(model, PreTrainedModel):
        return model
    inner, waiting = [], [model]
    while waiting and len(inner) < 2:
        for child in waiting.pop().children():
            (inner if isinstance(child, PreTrainedModel) else waiting).append(child)
    return cast(PreTrainedModel, inner[0]) if len(inner) == 1 else None


def is_zero3_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 partitions a model's parameters; such a model cannot run outside its engine."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def model_type_of_class(cls: type) -> ModelType | None:
    """Return the type of the models of a class, from its name or that of a base class; None if it is unknown."""
    for base in cls.__mro__:
        named = re.findall(f"({'|'.join(LOSS_MAPPING)})", base.__name__)
        loss_name = base.__name__ if base.__name__ in LOSS_MAPPING else next(iter(named), "")
        model_type = _BY_CLASS.get(base.__name__) or _model_type_of_loss(loss_name, cls)
        is_derived = base is not cls and model_type is ENCODER  # it may have a head of its own
        if model_type is not None and not is_derived:
            return model_type
    return None


def _model_type_of_loss(name: str, cls: type) -> ModelType | None:
    """Return the type of the models of a class whose loss function has a name; None if it is unknown."""
    model_type = _BY_LOSS_NAME.get(name) or _BY_LOSS.get(LOSS_MAPPING.get(name))
    if model_type is SEQUENCE:
        return _BY_INPUT.get(getattr(cls, "main_input_name", ""), SEQUENCE)
    return model_type


def model_type_of(model: nn.Module) -> ModelType:
    """Return the type of a model: the declared one, or that of its class, or of its `loss_type` outside transformers.

    For a language model it is measured once whether its loss shifts labels, which can run a short forward.

    Args:
        model: a model, with or without wrappers.

    Raises:
        DistillError: neither its class nor the user says what its outputs are.
    """
    model = unwrap_model(model)
    model_type = unmeasured_type_of(model)
    if model_type.is_declared or not model_type.is_decoder:
        return model_type
    shift = loss_shifts_labels(cast(PreTrainedModel, model))
    return model_type if shift is None else replace(model_type, shifts_labels=shift)


def unmeasured_type_of(model: nn.Module) -> ModelType:
    """Return the type of a model as `model_type_of` does, but with the default of `shifts_labels` for its type.

    It runs no forward, so it may be called while one runs or while the loss of the model is replaced.
    """
    model = unwrap_model(model)
    if (declared := declared_type(model)) is not None:
        return declared
    config: PretrainedConfig | None = getattr(model, "config", None)
    model_type = _BY_CLASS.get(type(model).__name__)
    if model_type is SPEECH_SEQ2SEQ and getattr(config, "is_encoder_decoder", False) and _reads_text(model):
        model_type = None  # it reads text and writes audio, such as Dia
    model_type = model_type or _model_type_of_loss(getattr(model, "loss_type", None) or "", type(model))
    model_type = model_type or model_type_of_class(type(model))
    if model_type is None or not isinstance(model, PreTrainedModel):
        raise DistillError(_unknown_type(model))
    model_type = with_config(model_type, config, type(model).__name__)
    if model_type is ENCODER and {"encoder", "decoder"} <= {name for name, _ in model.named_children()}:
        raise DistillError(_NO_ENCODER.format(type(model).__name__))
    if isinstance(model_type.output_type, Frames):
        return replace(
            model_type, output_type=replace(model_type.output_type, count_frames=partial(count_frames, model))
        )
    if model_type in GENERATIVE_TYPES:
        if getattr(config, "is_encoder_decoder", False):
            return encoder_decoder_type(model_type)
        return replace(decoder_type(model_type), placeholders=placeholder_ids(config))
    return model_type


def declared_type(model: nn.Module) -> ModelType | None:
    """Return the type that the user named for a model without wrappers; see `declared_types`."""
    return vars(model).get(DECLARED_TYPE)


def _unknown_type(model: nn.Module) -> str:
    """Return what is known of a model whose type is not, and how to name it."""
    name = type(model).__name__
    if isinstance(model, PreTrainedModel):
        reason = f"{name} is a class of transformers whose type is not supported"
    else:
        reason = f"{name} is not a class of transformers, so what its outputs are is not known"
    parts = {
        f"`{path}` is a {type(part).__name__}, a {known.name}"
        for path, part in model.named_children()
        if isinstance(part, PreTrainedModel) and (known := model_type_of_class(type(part))) not in (None, ENCODER)
    }
    parts_text = f" ({'; '.join(sorted(parts))})" if parts else ""
    return (
        f"{name} cannot be distilled without `model_type`: {reason}{parts_text}. Pass model_type= to the trainer, "
        f"one of {', '.join(TYPE_BY_NAME)}, or register another with hf_distill.register_model_type. Other "
        "teachers derive from hf_distill.Teacher."
    )


_NO_ENCODER = (
    "{} has an encoder and a decoder and no head, so it predicts nothing. Train its encoder with model_type='encoder' "
    "(`model.get_encoder()`, or AutoModelForTextEncoding), or load it with a head, such as AutoModelForSeq2SeqLM."
)


def _reads_text(model: nn.Module) -> bool:
    return getattr(model, "main_input_name", "") == "input_ids"


def encoder_decoder_type(model_type: ModelType) -> ModelType:
    """Return the type of an encoder-decoder model whose class is of one of `GENERATIVE_TYPES`."""
    return SPEECH_SEQ2SEQ if model_type is SPEECH_SEQ2SEQ else SEQ2SEQ


def decoder_type(model_type: ModelType) -> ModelType:
    """Return the type of a model without an encoder whose class is of one of `GENERATIVE_TYPES`."""
    return IMAGE_TEXT if model_type is IMAGE_TEXT else CAUSAL


def with_config(model_type: ModelType, config: PretrainedConfig | None, name: str) -> ModelType:
    """Return the type of a model of a class for its config, which has settings of its outputs.

    `problem_type` says what a classifier predicts. Others are the blank of a CTC model and the label of ignored pixels.

    Args:
        model_type: type of the models of the class.
        config: config of the model.
        name: name of the model, for the error message.

    Raises:
        DistillError: it is a token classifier that is configured for regression or several labels, or it segments
            images into one class.
    """
    if isinstance(model_type.output_type, Frames):
        blank = getattr(config, "blank_token_id", getattr(config, "pad_token_id", None))
        reduction = getattr(config, "ctc_loss_reduction", "sum")
        zero_infinity = getattr(config, "ctc_zero_infinity", False)
        return replace(model_type, output_type=Frames(None, blank or 0, reduction, zero_infinity))
    if isinstance(model_type.output_type, Pixels):
        names = ("semantic_loss_ignore_index", "loss_ignore_index")
        ignored = next((value for each in names if (value := getattr(config, each, None)) is not None), 255)
        if getattr(config, "num_labels", 2) == 1:
            raise DistillError(
                f"{name} segments images into one class (num_labels=1), which has no distribution over classes: use "
                "num_labels=2, the background and the class."
            )
        return replace(model_type, output_type=Pixels(ignored))
    problem = getattr(config, "problem_type", None)
    if model_type in _BY_PROBLEM:
        multi_label, regression = _BY_PROBLEM[model_type]
        if problem == "multi_label_classification":
            return multi_label
        is_default = problem is None and getattr(config, "num_labels", 2) == 1  # the default of transformers
        return regression if problem == "regression" or is_default else model_type
    if model_type is TOKEN and problem in ("regression", "multi_label_classification"):
        raise DistillError(
            f"{name} is {model_type.with_article} and is configured for {problem}, which is for sequence classifiers. "
            "Use single-label classification, or train it without a teacher."
        )
    return model_type


def how_to_match(teacher: ModelType, student: ModelType) -> str:
    """Return what to do about a teacher and a student of different types, for an error message."""
    if student.is_declared:
        return "set model_type= to what the outputs of both are, or use a teacher with the outputs of this type."
    if student is ENCODER:
        return "give the model without its head, as AutoModel loads it (`teacher.base_model`)."
    if teacher.auto_class == student.auto_class:
        return (
            "set the same problem_type in both configs (single_label_classification, multi_label_classification "
            "or regression), as both were trained."
        )
    return "use two models of the same type."
