"""Faster sampling on a CPU: the method `sample`, which replaces that of `transformers.GenerationMixin.generate`.

The distribution of the completions is that of transformers. These differences save time:

1. A token is drawn by inverting the cumulative distribution, with one random number for each row.
   `torch.multinomial` draws one for each entry of the vocabulary.
2. Prompts run in groups of similar length, without most of the padding, and the caches of the groups are joined.
3. A row leaves the batch when its completion ends.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, GenerationConfig, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMode

_TEXT_INPUTS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep"}
_ROPE_OF_THE_LONGEST_ROW = ("dynamic", "longrope")  # types of rotary embeddings
_SHORTEST_IN_GROUP = 0.8  # of the tokens of the longest prompt of a group


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Let modules run without dropout and activation checkpointing; they train again afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def sampling_on_cpu(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Let `model.generate` use `sample`, unless the model is on another device or the config sets another method."""
    modes = {config.get_generation_mode(), model.generation_config.get_generation_mode()}
    if (
        model.device.type != "cpu"
        or not config.do_sample
        or modes - {GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH}
    ):
        yield
        return
    generate = model.generate
    model.generate = lambda *args, **kwargs: generate(*args, custom_generate=sample, **kwargs)
    try:
        yield
    finally:
        del model.generate


def sample(
    model: Any,
    input_ids: Tensor,
    logits_processor: Callable[[Tensor, Tensor], Tensor],
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Tensor:
    """Sample completions; a decoding method for the argument `custom_generate` of `generate`.

    It calls the decoding method of transformers instead if the cache consists of more than keys and values, if rows
    depend on the lengths of others through their rotary embeddings, and for inputs other than text.

    Args:
        model: a model with an output head.
        input_ids: prompts, padded on the left, [B, P].
        logits_processor: processors of logits, as `generate` has prepared them.
        stopping_criteria: when a row is finished.
        generation_config: sampling at the temperature and with the limits that `logits_processor` applies.
        synced_gpus: must be False.
        model_kwargs: inputs of the model, and an empty cache.

    Returns:
        Prompts and completions, padded on the right, [B, S].
    """
    names = [name for name, value in model_kwargs.items() if isinstance(value, Cache)]
    if synced_gpus or len(names) != 1 or not _are_rows_independent(model, model_kwargs, model_kwargs[names[0]]):
        return cast(
            Tensor,
            model._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                **model_kwargs,
            ),
        )
    cache: DynamicCache = model_kwargs[names[0]]
    logits = _read_prompts(model, input_ids, cache, names[0], model_kwargs)
    rows = torch.arange(len(input_ids), device=input_ids.device)  # of the batch that are not finished
    sequences: list[Tensor | None] = [None] * len(rows)
    while True:
        tokens = draw_tokens(logits_processor(input_ids, logits))
        input_ids = torch.cat([input_ids, tokens[:, None]], 1)
        is_finished = stopping_criteria(input_ids, None)
        for row in is_finished.nonzero()[:, 0].tolist():
            sequences[int(rows[row])] = input_ids[row]
        if is_finished.all():
            break
        model_kwargs = _with_next_token(model_kwargs)
        if is_finished.any():
            kept = (~is_finished).nonzero()[:, 0]
            rows, input_ids = rows[kept], input_ids[kept]
            cache.batch_select_indices(kept)
            model_kwargs = _of_rows(model_kwargs, kept)
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        logits = _next_logits(model, inputs)
    return pad_sequence(
        [sequence for sequence in sequences if sequence is not None],
        batch_first=True,
        padding_value=generation_config.pad_token_id,
    )


def draw_tokens(scores: Tensor) -> Tensor:
    """Draw one token for each row from softmax(scores) by inverting its cumulative distribution.

    The token is the first one whose cumulative probability is larger than a uniform random number, so that tokens of
    probability 0 are never drawn. Sums are in float64.

    Args:
        scores: logits after all processors, [B, V].

    Returns:
        Token ids, [B].

    Raises:
        RuntimeError: a row has no distribution, because a logit is NaN or infinite.
    """
    cumulative = torch.softmax(scores, -1).cumsum(-1, dtype=torch.float64)
    if not cumulative[:, -1].isfinite().all():
        raise RuntimeError("The student's logits are not finite, so that no token can be sampled from them.")
    draws = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device)
    return torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)[:, 0]


def _are_rows_independent(model: Any, model_kwargs: dict, cache: Cache) -> bool:
    """Whether rows can be read in groups and taken out of the batch.

    The inputs must be those of a text, and the cache must hold the keys and values of all tokens, [B, heads, tokens,
    width].
    """
    inputs = {name for name, value in model_kwargs.items() if value is not None and value is not cache}
    positions = model_kwargs.get("position_ids")
    is_plain = (
        type(cache) is DynamicCache and not cache.offloading and {type(each) for each in cache.layers} <= {DynamicLayer}
    )
    rope = str(getattr(model.config.get_text_config(), "rope_parameters", None))
    return (
        inputs <= _TEXT_INPUTS
        and (positions is None or positions.dim() == 2)
        and is_plain
        and not any(name in rope for name in _ROPE_OF_THE_LONGEST_ROW)
    )


def _next_logits(model: Any, inputs: dict) -> Tensor:
    """Return the logits of the next tokens, [B, V], in float32; the others are freed."""
    return cast(Tensor, model(**inputs, return_dict=True).logits[:, -1].to(torch.float32, copy=True))


def _read_prompts(model: Any, input_ids: Tensor, cache: DynamicCache, name: str, model_kwargs: dict) -> Tensor:
    """Fill the cache with the prompts, and return the logits of the next tokens, [B, V]."""
    mask = model_kwargs.get("attention_mask")
    lengths = [input_ids.shape[1]] * len(input_ids) if mask is None else _spans(mask)
    groups = _groups(lengths)
    if len(groups) == 1:
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
        return _next_logits(model, inputs)
    logits, caches = [], []
    for group in groups:
        width = max(lengths[row] for row in group)
        rows = torch.tensor(group, device=input_ids.device)
        part = _of_rows(model_kwargs, rows, width) | {name: DynamicCache()}
        inputs = model.prepare_inputs_for_generation(input_ids[rows, -width:], is_first_iteration=True, **part)
        logits.append(_next_logits(model, inputs))
        caches.append(part[name])
    order = torch.tensor([row for group in groups for row in group], device=input_ids.device).argsort()
    for index, layer in enumerate(caches[0].layers):
        if not layer.is_initialized:  # it shares the keys and values of another layer
            continue
        keys, values = (
            torch.cat([_padded(getattr(each.layers[index], kind), input_ids.shape[1]) for each in caches])[order]
            for kind in ("keys", "values")
        )
        cache.update(keys, values, index)
        for each in caches:
            each.layers[index].reset()
    return torch.cat(logits)[order]


def _spans(mask: Tensor) -> list[int]:
    """Return the number of positions of each row from its first token on."""
    return (mask.shape[1] - mask.argmax(1)).tolist()


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Group rows by their lengths, so that no row is much shorter than the longest of its group."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and lengths[row] >= _SHORTEST_IN_GROUP * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _padded(states: Tensor, length: int) -> Tensor:
    """Pad keys or values, [B, heads, tokens, width], on the left."""
    return pad(states, (0, 0, length - states.shape[2], 0))


def _of_rows(model_kwargs: dict, rows: Tensor, width: int | None = None) -> dict:
    """Return inputs of some rows, and of their last `width` positions if it is given."""
    last = slice(None) if width is None else slice(-width, None)
    return model_kwargs | {
        name: model_kwargs[name][rows, last]
        for name in ("attention_mask", "position_ids")
        if model_kwargs.get(name) is not None
    }


def _with_next_token(model_kwargs: dict) -> dict:
    """Return inputs whose mask and positions include one more token."""
    inputs = dict(model_kwargs)
    if (mask := inputs.get("attention_mask")) is not None:
        inputs["attention_mask"] = pad(mask, (0, 1), value=1)
    if (positions := inputs.get("position_ids")) is not None:
        inputs["position_ids"] = torch.cat([positions, positions[:, -1:] + 1], 1)
    return inputs
