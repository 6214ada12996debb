"""Layer pruning: students that are their teacher with fewer blocks."""

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import DistillError
from .blocks import find_blocks
from .model_types import unwrap_model


@torch.no_grad()
def block_influence(model: nn.Module, batches: Iterable[dict]) -> list[float]:
    """Block influence: how much each block changes its hidden states.

    1 - mean over tokens of cos(input of the block, output of the block)

    Args:
        model: a model whose blocks `find_blocks` finds.
        batches: inputs, `input_ids` [B, S] and optionally `attention_mask` [B, S]; masked tokens are not counted.

    Returns:
        one number for each block, in [0, 2]; removing the block with the smallest changes the model least.

    Raises:
        DistillError: there is no batch with a token.

    Source: ShortGPT, arXiv 2403.03853.
    """
    _, blocks = find_blocks(model)
    device = next(model.parameters()).device
    sums = torch.zeros(len(blocks), dtype=torch.float64, device=device)
    mask: Tensor | None = None
    count = 0

    def record(i: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[i] += (1 - cosine)[mask].double().sum().to(device)

        return hook

    handles = [block.register_forward_hook(record(i), with_kwargs=True) for i, block in enumerate(blocks)]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {k: v.to(device) for k, v in batch.items() if k in ("input_ids", "attention_mask")}
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            count += int(mask.sum())
            model(**inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if count == 0:
        raise DistillError("block_influence needs at least one batch with a token in it.")
    return (sums / count).tolist()


def cut_student(teacher: nn.Module, layers: Sequence[int]) -> PreTrainedModel:
    """Copy a teacher with only some of its blocks, in their order; the teacher is not changed.

    Args:
        teacher: a transformers model.
        layers: indices of the blocks to keep, each once; block 0 is the first after the embeddings.

    Returns:
        a model of the teacher's class in training mode, whose config has the new number of layers.

    Raises:
        DistillError: an index does not exist or is repeated, or there is no index.
    """
    name, blocks = find_blocks(teacher)
    model, depth, keep = unwrap_model(teacher), len(blocks), sorted(layers)
    if not keep or len(set(keep)) != len(keep) or keep[0] < 0 or keep[-1] >= depth:
        raise DistillError(
            f"layers is {list(layers)}: give each block to keep once, from 0 to {depth - 1} (the teacher has {depth})."
        )
    student = type(model)(prune_config(model.config, keep, depth))
    new_index = {old: new for new, old in enumerate(keep)}
    pattern = re.compile(rf"^{re.escape(name)}\.(\d+)\.")
    state = {}
    for key, value in model.state_dict().items():
        match = pattern.match(key)
        if match is None:
            state[key] = value
        elif int(match[1]) in new_index:
            state[f"{name}.{new_index[int(match[1])]}.{key[match.end() :]}"] = value
    cast(nn.Module, student).to(model.dtype).load_state_dict(state)
    student.tie_weights()
    generation_config = copy.deepcopy(model.generation_config) if model.can_generate() else None
    student.generation_config = generation_config  # type: ignore[assignment]
    return student.train()


def top_layers(influence: Sequence[float], keep_layers: int) -> list[int]:
    """Return the indices of the blocks with the largest influence, in ascending order.

    Args:
        influence: see `block_influence`.
        keep_layers: number of blocks.

    Raises:
        DistillError: keep_layers is not from 1 to the number of blocks.
    """
    if not 0 < keep_layers <= len(influence):
        raise DistillError(
            f"keep_layers is {keep_layers}; the teacher has {len(influence)} blocks: give a number from 1 to "
            f"{len(influence)}."
        )
    by_influence = sorted(range(len(influence)), key=lambda i: influence[i], reverse=True)
    return sorted(by_influence[:keep_layers])


def prune_config(config: PretrainedConfig, keep: Sequence[int], depth: int) -> PretrainedConfig:
    """Return the config of a model with only some of its blocks.

    Args:
        config: config of the model.
        keep: indices of the blocks to keep.
        depth: number of blocks of the model.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:  # layer_types and other lists with one entry for each block
            setattr(text, key, [value[i] for i in keep])
    text.num_hidden_layers = len(keep)
    return config
