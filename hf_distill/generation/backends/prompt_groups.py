"""Reading the prompts of a batch in groups of similar length, without most of their padding."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

_TEXT_INPUTS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep"}
_ROPE_OF_THE_LONGEST_ROW = ("dynamic", "longrope")  # types of rotary embeddings
_SHORTEST_IN_GROUP = 0.8  # of the tokens of the longest prompt of a group


def read_prompts(
    model: Any, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> Any:
    """Fill the empty cache of `model_kwargs` with the prompts of a batch, as the first step of `generate` does.

    Prompts of similar length run together, and the caches of the groups are joined. All prompts run together if their
    lengths are similar, if the cache holds more than the keys and values of all tokens, if rotary embeddings depend on
    the longest row, and for inputs other than text.

    Args:
        model: a language model.
        input_ids: [B, P] padded on the left.
        generation_config: settings.
        model_kwargs: further inputs of the model, and the cache.

    Returns:
        The outputs of the model; the last position of their logits is that of the last token of each prompt.
    """
    mask = model_kwargs.get("attention_mask")
    groups = [] if mask is None else _groups((mask.shape[1] - mask.argmax(1)).tolist())
    names = [name for name, value in model_kwargs.items() if isinstance(value, Cache)]
    is_chunked = generation_config.prefill_chunk_size is not None
    if len(groups) <= 1 or len(names) != 1 or is_chunked or not _are_rows_separable(model, model_kwargs, names[0]):
        return model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    logits, caches = [], []
    for rows, width in groups:
        index = torch.tensor(rows, device=input_ids.device)
        part = model_kwargs | {names[0]: DynamicCache()}
        for name in ("attention_mask", "position_ids"):
            if part.get(name) is not None:
                part[name] = part[name][index, -width:]
        inputs = model.prepare_inputs_for_generation(input_ids[index, -width:], is_first_iteration=True, **part)
        logits.append(model(**inputs, return_dict=True).logits[:, -1:].clone())  # the other positions are freed
        caches.append(part[names[0]])
    order = torch.tensor([row for rows, _ in groups for row in rows], device=input_ids.device).argsort()
    _join_caches(model_kwargs[names[0]], caches, order, input_ids.shape[1])
    return CausalLMOutputWithPast(logits=cast(Any, torch.cat(logits)[order]))


def _groups(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """Group rows by length, so that none is much shorter than the longest of its group: (rows, longest length)."""
    groups = list[tuple[list[int], int]]()
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and lengths[row] >= _SHORTEST_IN_GROUP * groups[-1][1]:
            groups[-1][0].append(row)
        else:
            groups.append(([row], lengths[row]))
    return groups


def _are_rows_separable(model: Any, model_kwargs: dict[str, Any], name: str) -> bool:
    """Whether a row is read alike with any other rows, and the cache is one of keys and values of all tokens."""
    cache, positions = model_kwargs[name], model_kwargs.get("position_ids")
    rope = str(getattr(model.config.get_text_config(), "rope_parameters", None))
    return (
        {each for each, value in model_kwargs.items() if value is not None} <= _TEXT_INPUTS | {name}
        and (positions is None or positions.dim() == 2)
        and type(cache) is DynamicCache
        and not cache.offloading
        and {type(layer) for layer in cache.layers} <= {DynamicLayer}
        and not any(each in rope for each in _ROPE_OF_THE_LONGEST_ROW)
    )


def _join_caches(cache: DynamicCache, parts: Sequence[DynamicCache], order: Tensor, length: int) -> None:
    """Fill a cache with the rows of its parts, which are emptied, padded on the left to `length` tokens.

    Args:
        cache: an empty cache.
        parts: keys and values of each layer, [rows, heads, tokens, width].
        order: the places of the rows of the batch among those of the parts, [B].
        length: number of tokens.
    """
    for index in range(len(parts[0].layers)):
        states = []
        for kind in ("keys", "values"):
            of_parts = [getattr(part.layers[index], kind) for part in parts]
            states.append(torch.cat([pad(each, (0, 0, length - each.shape[2], 0)) for each in of_parts])[order])
        cache.update(states[0], states[1], index)
        for part in parts:
            part.layers[index].reset()
