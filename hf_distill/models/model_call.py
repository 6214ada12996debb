"""The inputs that a model is called with, and its outputs by name.

Each model of a step gets the inputs that its forward accepts. Labels are not passed on, because a model would compute
a loss from them.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TypeVar, cast, get_args
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import is_flash_attention_requested

from ..core.row_values import ORIGIN, WEIGHT
from ..core.targets import SECOND_VIEW_KEYS, TEACHER_INDEX
from ..core.teacher_inputs import is_teacher_key
from ..errors import DistillError
from .model_types import transformers_model_in, unmeasured_type_of, unwrap_model

FLASH_ATTENTION_INPUTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # of packed documents

_T = TypeVar("_T")
_NOT_INPUTS = (  # and the labels of the type of the model
    *("labels", "shift_labels", "has_labels", "num_items_in_batch"),
    *(*SECOND_VIEW_KEYS, TEACHER_INDEX, WEIGHT, ORIGIN),
)
_NAMES_OF: WeakKeyDictionary[nn.Module, tuple[frozenset[str], bool]] = WeakKeyDictionary()


def input_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the inputs that a model's forward accepts.

    These are its named parameters and, if it has `**kwargs`, those of the classes and submodules that it may pass them
    to.

    Args:
        model: a model, with or without wrappers.
    """
    return _accepted(model)[0]


def accepts_any_input(model: nn.Module) -> bool:
    """Whether the model's forward accepts any input: a class outside transformers has `**kwargs`."""
    return _accepted(model)[1]


def readable_inputs(model: nn.Module) -> frozenset[str] | None:
    """Return the names of the inputs that a model's forward accepts; None if it accepts any."""
    names, accepts_any = _accepted(model)
    return None if accepts_any else names


def accepted_inputs(model: nn.Module, inputs: Mapping[str, _T]) -> dict[str, _T]:
    """Return the inputs of a batch that a model's forward accepts, and the labels."""
    names, accepts_any = _accepted(model)
    accepted_names = {*names, *_not_inputs(model)}
    return {k: v for k, v in inputs.items() if accepts_any or k in accepted_names}


def uses_flash_attention(model: nn.Module) -> bool:
    """Whether a model runs flash attention, which reads where packed documents begin and end."""
    config = getattr(unwrap_model(model), "config", None)
    return isinstance(config, PretrainedConfig) and any(
        is_flash_attention_requested(part) for part in (config, config.get_text_config())
    )


def without_foreign_inputs(model: nn.Module, inputs: Mapping[str, _T], foreign: Iterable[str]) -> dict[str, _T]:
    """Return a batch without the inputs that only another model accepts.

    Args:
        model: the model that is called.
        inputs: the collator's batch.
        foreign: names of the inputs that the other model accepts.
    """
    names, accepts_any = _accepted(model)
    dropped = set() if accepts_any else {*foreign} - names - _not_inputs(model)
    return {k: v for k, v in inputs.items() if k not in dropped}


def generation_inputs(model: nn.Module, inputs: Mapping[str, _T], foreign: Iterable[str]) -> dict[str, _T]:
    """Return the inputs of a batch for a model's `generate`, with the labels, which `Seq2SeqTrainer` pads.

    Args:
        model: the model that generates.
        inputs: the collator's batch.
        foreign: names of the inputs that another model accepts.
    """
    own_inputs = without_foreign_inputs(model, inputs, foreign)
    not_inputs = _not_inputs(model)
    return {k: v for k, v in own_inputs.items() if k == "labels" or not (k in not_inputs or is_teacher_key(k))}


def prepare_inputs(model: nn.Module, inputs: Mapping[str, object]) -> dict[str, object]:
    """Return the keyword arguments of a model's forward: without labels, and with decoder inputs if it needs them.

    Args:
        model: a model, without wrappers.
        inputs: the collator's batch, with the inputs that the model accepts.

    Raises:
        DistillError: an encoder-decoder model needs decoder inputs, and they cannot be made from the labels; or a
            module outside transformers requires an input that the batch does not have.
    """
    labels, not_inputs = cast(Tensor | None, inputs.get("labels")), _not_inputs(model)
    inputs = {k: v for k, v in inputs.items() if not (k in not_inputs or is_teacher_key(k))}
    has_decoder_inputs = "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs
    if unmeasured_type_of(model).vocabulary and not has_decoder_inputs:
        inner = transformers_model_in(model)
        if inner is not None and getattr(inner.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = decoder_input_ids(inner, labels)
    if "use_cache" in _parameters_of(type(model).forward)[0]:
        inputs["use_cache"] = False  # with a cache, packed documents would attend to each other
    if not isinstance(model, PreTrainedModel):
        _check_required_inputs(model, inputs)
    elif getattr(model.config, "return_dict", True) is False:
        inputs["return_dict"] = True
    return inputs


def _check_required_inputs(model: nn.Module, inputs: Mapping[str, object]) -> None:
    parameters = inspect.signature(model.forward).parameters.values()
    required = (
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    )
    if missing := [name for name in required if name not in inputs]:
        raise DistillError(
            f"{type(model).__name__}.forward requires {', '.join(missing)}, and the batch has {sorted(inputs)}: the "
            "inputs are passed by name, so name the columns of the data (or the keys of the collator's batch) as the "
            "parameters of the forward."
        )


def _not_inputs(model: nn.Module) -> frozenset[str]:
    """Return the keys of a batch that are not passed to a model."""
    return frozenset((*_NOT_INPUTS, *unmeasured_type_of(model).output_type.label_names))


def decoder_input_ids(model: PreTrainedModel, labels: Tensor | None) -> Tensor:
    """Return the labels shifted right by the model's own function, [B, S].

    Args:
        model: an encoder-decoder model, without wrappers.
        labels: [B, S], or None if the batch has none.

    Raises:
        DistillError: there are no labels, the model has no such function, or it lacks a special token.
    """
    name = type(model).__name__
    if labels is None:
        raise DistillError(
            f"{name} needs `decoder_input_ids` or `labels`, and the batch has neither: use a collator that makes them, "
            "such as DataCollatorForSeq2Seq(tokenizer, model=model)."
        )
    labels = labels.clone()  # some models, such as FSMT, change their labels in place
    parts = (model.config, getattr(model.config, "decoder", None), model.config.get_text_config())
    pad, start = (
        next((value for part in parts if (value := getattr(part, key, None)) is not None), None)
        for key in ("pad_token_id", "decoder_start_token_id")
    )
    try:
        if (prepare := getattr(model, "prepare_decoder_input_ids_from_labels", None)) is not None:
            return prepare(labels=labels)
        if (shift_right := getattr(model, "_shift_right", None)) is not None:
            return shift_right(labels)
        for cls in type(model).__mro__:
            shift = getattr(sys.modules.get(cls.__module__), "shift_tokens_right", None)
            if shift is not None:
                start_argument = (start,) if len(inspect.signature(shift).parameters) > 2 else ()
                return shift(labels, pad, *start_argument)
    except (TypeError, ValueError, AssertionError) as error:
        raise DistillError(
            f"{name} cannot make decoder inputs from the labels: {error} (pad_token_id is {pad}, "
            f"decoder_start_token_id is {start}). Set both in its config, or use a collator that makes "
            "`decoder_input_ids`, such as DataCollatorForSeq2Seq(tokenizer, model=model)."
        ) from error
    raise DistillError(
        f"{name} has no function that makes decoder inputs from labels: use a collator that makes `decoder_input_ids`."
    )


def named_outputs(outputs: object, model: nn.Module) -> ModelOutput:
    """Return a model's outputs as a ModelOutput with `logits`, which its output type makes of them.

    Args:
        outputs: a ModelOutput, another mapping, a tuple, an object with attributes, or the logits. In a tuple the
            logits are the first member, or the second after a scalar loss.
        model: the model.

    Raises:
        DistillError: the outputs have no logits.
    """
    output_type = unmeasured_type_of(model).output_type
    named = _by_name(outputs)
    logits = output_type.logits_of(named)
    if isinstance(outputs, ModelOutput) and logits is not None and logits is named.get("logits"):
        return outputs
    if not isinstance(logits, Tensor):
        is_default = output_type.logit_names == ("logits",)
        under = "this name, or as the first member of a tuple" if is_default else "these names"
        names = " and ".join(f"`{name}`" for name in output_type.logit_names)
        raise DistillError(
            f"{type(unwrap_model(model)).__name__} returns no {names} (it returns {type(outputs).__name__} "
            f"{sorted(map(str, named))}): distillation needs a model whose outputs have the logits under {under}."
        )
    named["logits"] = logits
    result = ModelOutput()
    for name, value in named.items():
        if value is not None:
            result[name] = value
    return result


def _by_name(outputs: object) -> dict:
    """Return the outputs of a model by name; `logits` and `loss` for those of a tuple."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if isinstance(outputs, Tensor):
        return {"logits": outputs}
    if isinstance(outputs, tuple | list):
        has_loss = bool(outputs) and isinstance(outputs[0], Tensor) and outputs[0].dim() == 0
        first = ["loss", "logits"] if has_loss else ["logits"]
        rest = [f"output_{i}" for i in range(len(first), len(outputs))]
        return dict(zip(getattr(outputs, "_fields", None) or [*first, *rest], outputs, strict=False))
    return dict(vars(outputs)) if hasattr(outputs, "__dict__") else {}


def without_made_logits(outputs: ModelOutput, model: nn.Module) -> ModelOutput:
    """Return outputs without the `logits` that `named_outputs` made of outputs with other names."""
    names = unmeasured_type_of(model).output_type.logit_names
    if "logits" in names or not all(name in outputs for name in names):
        return outputs
    return ModelOutput({name: value for name, value in outputs.items() if name != "logits"})


def _accepted(model: nn.Module) -> tuple[frozenset[str], bool]:
    model = unwrap_model(model)
    if model not in _NAMES_OF:
        _NAMES_OF[model] = _read_signatures(model)
    return _NAMES_OF[model]


def _read_signatures(model: nn.Module) -> tuple[frozenset[str], bool]:
    names = set(_parameters(model.forward)[0])
    has_kwargs = accepts_any = False
    for cls in type(model).__mro__:
        if "forward" not in vars(cls) or cls is nn.Module:
            continue
        parameters, has_kwargs, typed = _parameters_of(vars(cls)["forward"])
        names |= parameters | typed
        accepts_any |= has_kwargs and not cls.__module__.startswith("transformers.")
        if not has_kwargs:
            break
    if has_kwargs:
        for module in model.modules():
            if module is not model and isinstance(module, PreTrainedModel):
                parameters, _, typed = _parameters_of(type(module).forward)
                names |= parameters | typed
        if getattr(model, "_supports_flash_attn", False):  # `**kwargs` without a type go to the attention too
            names |= {*FLASH_ATTENTION_INPUTS}
    return frozenset(names) - {"self"}, accepts_any


def _parameters(forward: Callable) -> tuple[frozenset[str], bool, frozenset[str]]:
    """Return (named parameters, whether there are `**kwargs`, names of a TypedDict that annotates these)."""
    parameters = inspect.signature(forward).parameters.values()
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = frozenset(p.name for p in parameters if p.kind not in variadic)
    typed: set[str] = set()
    has_kwargs = False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            has_kwargs = True
            for dictionary in get_args(parameter.annotation):
                typed |= set(getattr(dictionary, "__annotations__", ()))
    return named, has_kwargs, frozenset(typed)


_parameters_of = lru_cache(_parameters)  # of the forward of a class; a bound method would keep its model alive
