"""What goes into a backend and what comes out of it: prompts, sampling settings and completions. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Literal, TypeAlias

from ..core.defaults import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from .token_signals import TokenSignals

FinishReason: TypeAlias = Literal["stop", "length"]
_SEED_BITS = 31  # servers and torch accept seeds of this size


@dataclass(frozen=True)
class Prompt:
    """A prompt of a data source.

    index:    number of the prompt in this data set
    source:   name of the data source
    row:      number of the row in its source
    content:  text that is continued, or a list of messages that the assistant answers
    tools:    JSON schemas of functions, for a list of messages
    """

    index: int
    source: str
    row: int
    content: str | list[dict]
    tools: list[dict] | None = None


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled.

    temperature:    0 selects the most probable token
    top_p:          nucleus sampling: sum of the probabilities of the tokens that are sampled from
    max_new_tokens: largest number of tokens of a completion
    stop:           texts at which a completion ends; they are not part of it
    log_probs:      whether the log-probabilities of the tokens are needed
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()
    log_probs: bool = True


@dataclass(frozen=True)
class Request:
    """One completion to generate: sample number `sample` of a prompt, with its own seed."""

    prompt: Prompt
    sample: int
    seed: int


@dataclass(frozen=True)
class Completion:
    """A generated completion.

    text:          without the stop text and end-of-text tokens
    finish_reason: "stop", or "length" if it was cut off at `max_new_tokens`
    tokens:        number of generated tokens, with the end-of-text token
    log_prob:      mean log-probability of the tokens in nats; None if the backend returned none
    signals:       the recorded distributions; None if none were recorded
    """

    index: int
    sample: int
    text: str
    finish_reason: FinishReason
    tokens: int
    log_prob: float | None = None
    signals: "TokenSignals | None" = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Part:
    """Requests whose completions are written together, in one file.

    number: number of the part
    seed:   seed for backends that sample all requests of a part with one random generator
    """

    number: int
    seed: int
    requests: tuple[Request, ...]


def make_parts(prompts: Sequence[Prompt], samples: int, seed: int, prompts_per_part: int) -> list[Part]:
    """Return all requests, grouped into parts of whole prompts. The same arguments give the same parts and seeds.

    Args:
        prompts: the prompts.
        samples: number of completions of each prompt.
        seed: seed of the data set.
        prompts_per_part: number of prompts in a part.
    """
    parts = []
    for number, start in enumerate(range(0, len(prompts), prompts_per_part)):
        group = prompts[start : start + prompts_per_part]
        requests = [
            Request(p, sample, _seed(seed, "request", p.index, sample)) for p in group for sample in range(samples)
        ]
        parts.append(Part(number, _seed(seed, "part", number), tuple(requests)))
    return parts


def cut_at_stop(text: str, stop: Sequence[str]) -> str | None:
    """Return the text before the first stop text; None if it contains none."""
    positions = [position for each in stop if (position := text.find(each)) >= 0]
    return text[: min(positions)] if positions else None


def _seed(*values: object) -> int:
    digest = sha256(repr(values).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**_SEED_BITS
