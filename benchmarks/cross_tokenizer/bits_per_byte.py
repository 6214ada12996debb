"""Bits per byte of models with different tokenizers, over the same bytes of the same texts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

CONTEXT = 64  # characters at the start of a text that are not predicted, at least: GOLD requires a prompt


def common_starts(texts: Sequence[str], tokenizers: Sequence[Any]) -> list[int]:
    """Return the first character of each text, after CONTEXT, at which a token of every tokenizer starts.

    Args:
        texts: the texts.
        tokenizers: fast tokenizers.
    """
    starts = []
    for text in texts:
        boundaries = [{start for start, _ in _spans(tokenizer, text)} for tokenizer in tokenizers]
        starts.append(min(start for start in set.intersection(*boundaries) if start >= CONTEXT))
    return starts


@torch.no_grad()
def bits_per_byte(model: nn.Module, tokenizer: Any, texts: Sequence[str], starts: Sequence[int]) -> float:
    """Return the negative log-likelihood of texts in bits, divided by their UTF-8 bytes.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        texts: the texts, which are read one by one.
        starts: the first character of each text that is predicted; see `common_starts`.
    """
    model.eval()
    nats, count = 0.0, 0
    for text, start in zip(texts, starts, strict=True):
        encoding = tokenizer(text, return_offsets_mapping=True)
        ids = torch.tensor(encoding["input_ids"])
        predicted = torch.tensor([begin >= start and end > begin for begin, end in encoding["offset_mapping"]])
        losses = cross_entropy(model(input_ids=ids[None]).logits[0, :-1].float(), ids[1:], reduction="none")
        nats += float(losses[predicted[1:]].sum())
        count += len(text[start:].encode())
    return nats / math.log(2) / count


def held_out_bits(model: nn.Module, tokenizer: Any, held_out: Mapping[str, tuple[list[str], list[int]]]) -> dict:
    """Return the bits per byte on each kind of text.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        held_out: kind -> (texts, starts).
    """
    return {kind: bits_per_byte(model, tokenizer, *texts) for kind, texts in held_out.items()}


def _spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    return tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
