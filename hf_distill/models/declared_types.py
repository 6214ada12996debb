"""Model types that the user names: `model_type=` of a trainer, and types that the user registers.

A module outside transformers does not tell what its outputs are. The type is an attribute of the module, so that a copy
of the module, such as a moving average, has it too.
"""

import inspect
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from ..errors import DistillError, did_you_mean, raise_if_any
from ..losses.output_types import OutputType
from ..losses.registry import get_loss
from .image_inputs import placeholder_ids
from .model_types import DECLARED_TYPE, model_type_of, transformers_model_in, unwrap_model
from .type_catalog import TYPE_BY_NAME, ModelType


def register_model_type(
    name: str,
    output_type: OutputType,
    *,
    shifts_labels: bool = False,
    vocabulary: bool = False,
    pipeline_tag: str | None = None,
) -> None:
    """Register a type of models, which a trainer then accepts as `model_type=name`.

    Args:
        name: name of the type.
        output_type: an object of a class derived from `OutputType`: what the outputs are, and the losses, labels and
            metrics that follow from it.
        shifts_labels: whether the logits at position i predict the label at i + 1.
        vocabulary: whether the outputs are a distribution over the ids of a tokenizer.
        pipeline_tag: pipeline tag of the Hub for the model card.

    Raises:
        DistillError: the name is used already or no identifier, or a loss of the output type is not registered or is
            not defined for its outputs; the message names all problems.
    """
    problems = []
    if not name.isidentifier():
        problems.append(f"{name!r} is no name for a model type: give letters, digits and _ only, and no digit first")
    known = TYPE_BY_NAME.get(name)
    if known is not None and type(known.output_type).__qualname__ != type(output_type).__qualname__:
        problems.append(f"The model type {name!r} is registered already: choose another name")
    if not isinstance(output_type, OutputType):
        description = output_type.__name__ if inspect.isclass(output_type) else repr(output_type)
        problems.append(f"output_type is {description}: give an object of a class derived from hf_distill.OutputType")
    else:
        losses = [
            get_loss(getattr(output_type, field), f"{field} of {type(output_type).__name__}")
            for field in ("soft_loss", "hard_loss")
        ]
        problems += output_type.unfitting_losses(losses)
    raise_if_any(problems)
    title = name.replace("_", " ") + " model"
    TYPE_BY_NAME[name] = ModelType(title, None, pipeline_tag, shifts_labels, vocabulary, output_type, has_classes=False)


def declare_model_type(model: nn.Module, name: str | None) -> None:
    """Set the type of a model to the one that the user named; None removes an earlier one, so its class decides.

    Args:
        model: a model, with or without wrappers.
        name: a key of `TYPE_BY_NAME`.

    Raises:
        DistillError: no type has this name, or the forward of the model cannot be called without labels.
    """
    model = unwrap_model(model)
    vars(model).pop(DECLARED_TYPE, None)
    if name is not None:
        _declare(model, replace(_type_named(name), is_declared=True))


def check_type_name(name: object) -> None:
    """Check that a model type has this name, or that the name is None.

    Raises:
        DistillError: none has.
    """
    if name is not None:
        _type_named(name)


def type_as_teacher(teacher: nn.Module, student: nn.Module) -> ModelType:
    """Return the type of a teacher; a module that has no type of its own gets that of the student.

    If the user named the type of the student, it is also that of a transformers model with the same outputs.

    Args:
        teacher: a model, with or without wrappers.
        student: the student, likewise.

    Raises:
        DistillError: the type of a model is not known, or the forward of the teacher cannot be called without labels.
    """
    student_type, model = model_type_of(student), unwrap_model(teacher)
    vars(model).pop(DECLARED_TYPE, None)
    try:
        own_type = model_type_of(model)
    except DistillError:
        if isinstance(model, PreTrainedModel) and not student_type.is_declared:
            raise
        own_type = None
    names_type = student_type.is_declared and own_type is not None and own_type.name != student_type.name
    if own_type is None or (names_type and own_type.teaches(student_type)):
        _declare(model, replace(student_type, is_declared=True))
    return model_type_of(model)


def _declare(model: nn.Module, model_type: ModelType) -> None:
    parameters = inspect.signature(model.forward).parameters
    required = [
        name
        for name in model_type.output_type.label_names
        if name in parameters and parameters[name].default is inspect.Parameter.empty
    ]
    if required:
        raise DistillError(
            f"{type(model).__name__}.forward requires {' and '.join(required)}, and the loss of a distillation is "
            f"computed from the logits: give {'them' if len(required) > 1 else 'it'} the default None, and return the "
            "logits without a loss then."
        )
    if model_type.is_decoder:
        config = getattr(transformers_model_in(model), "config", None)
        model_type = replace(model_type, placeholders=placeholder_ids(config))
    vars(model)[DECLARED_TYPE] = model_type


def _type_named(name: object) -> ModelType:
    if not isinstance(name, str) or name not in TYPE_BY_NAME:
        raise DistillError(
            f"model_type is {name!r}, which is no model type{did_you_mean(str(name), TYPE_BY_NAME)}. The types are "
            f"{', '.join(TYPE_BY_NAME)}; hf_distill.register_model_type adds others."
        )
    return TYPE_BY_NAME[name]
