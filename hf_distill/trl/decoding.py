"""How the student generates with transformers: without dropout, and on a CPU with less work."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from ..generation.backends.row_dropping import generate_and_drop_rows

_MODES = {GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH}


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
    """Let `model.generate` sample with `generate_and_drop_rows`, which costs less on a CPU.

    Nothing changes on other devices, where a step costs nearly the same for fewer rows, and for configs that ask for
    another decoding method, such as beam search.
    """
    modes = {config.get_generation_mode(), model.generation_config.get_generation_mode()}
    if model.device.type != "cpu" or modes - _MODES:
        yield
        return
    options = {"custom_generate": generate_and_drop_rows, "groups_prompts": True}
    model.generate = partial(model.generate, **options)
    try:
        yield
    finally:
        del model.generate
