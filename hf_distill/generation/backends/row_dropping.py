"""Generation of a padded batch that goes on without the rows that have ended."""

from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .prompt_groups import read_prompts

_DROPPED_SHARE = 1 / 8  # of the rows that must have ended before the others are copied
_SELECTABLE = {DynamicLayer, DynamicSlidingWindowLayer}  # layers of a cache that hold keys and values of each row


@runtime_checkable
class FollowsRows(Protocol):
    """A logits processor with values for each row of a batch."""

    def keep_rows(self, rows: Tensor, input_ids: Tensor) -> None:
        """Reduce the batch to these rows, [N]; `input_ids` [B, S] are those of all rows until now."""
        ...


@torch.no_grad()
def generate_and_drop_rows(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: None = None,
    groups_prompts: bool = False,
    **model_kwargs: Any,
) -> Tensor:
    """Sample as `generate` does, and remove rows from the batch when they have ended.

    It is the argument `custom_generate` of `generate`. A step costs what its rows cost, so that a batch of completions
    of different lengths needs less time. If the rows of the cache cannot be selected, all of them stay. Criteria and
    processors see the rows that are left; a processor with values for each row needs `keep_rows`.

    Args:
        model: a decoder-only language model.
        input_ids: [B, S] padded on the left.
        logits_processor: changes the logits of a step.
        stopping_criteria: say which rows have ended.
        generation_config: settings.
        synced_gpus: not used.
        streamer: not used.
        groups_prompts: read prompts of similar length together, see `read_prompts`. Hooks of the model then see several
            parts of the batch, in another order.
        model_kwargs: further inputs of the model.

    Returns:
        [B, S + T] the ids of prompts and completions, padded on the right.
    """
    helpers, config = cast(Any, model), cast(Any, generation_config)
    pad = config._pad_token_tensor.to(input_ids.device)
    rows = torch.arange(len(input_ids), device=input_ids.device)  # of `input_ids` that are left
    ended = torch.zeros_like(rows, dtype=torch.bool)
    results = list[tuple[Tensor, Tensor]]()
    read = partial(read_prompts, model) if groups_prompts else helpers._prefill
    outputs = read(input_ids, generation_config, model_kwargs)
    with helpers._optimize_model_for_decode():
        while True:
            model_kwargs = helpers._update_model_kwargs_for_generation(outputs, model_kwargs)
            tokens = _next_tokens(outputs.logits, input_ids, logits_processor, generation_config)
            del outputs
            input_ids = torch.cat([input_ids, torch.where(ended, pad, tokens)[:, None]], dim=1)
            ended = ended | stopping_criteria(input_ids, cast(Any, None))
            left = (~ended).nonzero()[:, 0]
            if not len(left):
                results.append((rows, input_ids))
                return _padded_on_the_right(results, pad)
            if len(rows) - len(left) >= _DROPPED_SHARE * len(rows) and _can_drop_rows(model_kwargs):
                results.append((rows[ended], input_ids[ended]))
                model_kwargs = _keep_rows(model_kwargs, left, len(rows))
                for processor in logits_processor:
                    if isinstance(processor, FollowsRows):
                        processor.keep_rows(left, input_ids)
                rows, input_ids, ended = rows[left], input_ids[left], ended[left]
            length = 1 if model_kwargs["use_cache"] else None
            inputs = helpers.prepare_inputs_for_generation(input_ids, next_sequence_length=length, **model_kwargs)
            outputs = model(**inputs, return_dict=True)


def _next_tokens(
    logits: Tensor, input_ids: Tensor, logits_processor: LogitsProcessorList, config: GenerationConfig
) -> Tensor:
    """Return the next token of each row, [N]."""
    scores = logits_processor(
        cast(Any, input_ids), logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
    )
    return sample(scores) if config.do_sample else scores.argmax(-1)


def sample(scores: Tensor) -> Tensor:
    """Return a random token for each row, [N], of logits [N, V], by inversion of the cumulative distribution.

    `torch.multinomial` draws a number for each entry of the vocabulary, and this function one for each row. Sums are in
    float64, so that improbable tokens keep their probabilities. Tokens of probability 0 are never drawn.

    Raises:
        RuntimeError: a row has no distribution, because a logit is NaN or infinite.
    """
    cumulative = torch.softmax(scores.float(), -1).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    if not total.isfinite().all():
        raise RuntimeError("The model's logits are not finite, so that no token can be sampled from them.")
    below = torch.nextafter(total, torch.zeros_like(total))  # the product may be rounded up to the total
    drawn = torch.minimum(torch.rand_like(total) * total, below)
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0]


def _can_drop_rows(model_kwargs: dict[str, Any]) -> bool:
    """Whether the rows of the cache and of all other inputs can be selected."""
    caches = [value for value in model_kwargs.values() if isinstance(value, DynamicCache)]
    positions = model_kwargs.get("position_ids")
    return (
        len(caches) == 1
        and all(type(layer) in _SELECTABLE for layer in caches[0].layers)
        and (positions is None or positions.dim() == 2)
    )


def _keep_rows(model_kwargs: dict[str, Any], rows: Tensor, count: int) -> dict[str, Any]:
    """Return the inputs of the model for some of `count` rows; the cache is changed."""
    kept = dict(model_kwargs)
    for name, value in model_kwargs.items():
        if isinstance(value, DynamicCache):
            value.batch_select_indices(rows)
        elif isinstance(value, Tensor) and value.dim() and len(value) == count:
            kept[name] = value[rows]
    return kept


def _padded_on_the_right(results: list[tuple[Tensor, Tensor]], pad: Tensor) -> Tensor:
    """Return the rows in their order, [B, S + T], of parts (numbers of rows [N], ids [N, S + t])."""
    count, width = sum(len(rows) for rows, _ in results), max(ids.shape[1] for _, ids in results)
    ids = pad.new_zeros(count, width) + pad
    for rows, part in results:
        ids[rows, : part.shape[1]] = part
    return ids
