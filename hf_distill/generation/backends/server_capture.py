"""`ServerCapture`: the log-probabilities of the most probable ids that vLLM servers return with completions."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...core.results import ServerFacts
from ...core.server_urls import public_host
from ...errors import DistillError
from ...teachers.remote.api import RowTensors, TokenRow
from ...teachers.remote.identity import START_RETRY_SECONDS, check_tokenizer
from ...teachers.remote.pool import MalformedAnswer, RequestRefused, ServerFailure, ServerPool
from ...teachers.remote.top_k import PROBE_IDS, top_k_row
from ...teachers.remote.vllm import VLLMProtocol
from ..completion import Request
from ..token_signals import IDS, LOG_PROBS, Capture, TokenSignals

TEXT_PATH = "/v1/completions"
MAX_SINGLE_REQUESTS = 2  # for positions at the end of a row; more are requested as prompt log-probabilities
_TOKEN_PREFIX = "token_id:"  # noqa: S105  with return_tokens_as_token_ids


def values_of(entries: Sequence[Mapping[int, float]], capture: Capture, vocab_size: int) -> RowTensors:
    """Return the k most probable ids of some positions and their log-probabilities.

    Args:
        entries: id -> log-probability of each position, with at least k ids.
        capture: k.
        vocab_size: V.

    Raises:
        MalformedAnswer: there are fewer than k ids, or the values are no log-probabilities.
    """
    row = top_k_row(entries, [0.0] * len(entries), min(capture.k, vocab_size), vocab_size)
    return {IDS: row["ids"], LOG_PROBS: row["log_probs"]}


class ServerCapture:
    """Requests log-probabilities with completions, and those of tokens that were not generated.

    Prompts are sent as token ids, and vLLM names tokens by their ids, so that it is known to which tokens the
    log-probabilities belong.

    Args:
        pool: the servers.
        model: id of the served model.
        capture: the k.
        vocab_size: V of the model.
        encode: returns the token ids of a prompt.
    """

    def __init__(
        self,
        pool: ServerPool,
        model: str,
        capture: Capture,
        vocab_size: int,
        encode: Callable[[Request], list[int]],
    ):
        self.pool, self.model, self.capture, self.vocab_size, self.encode = pool, model, capture, vocab_size, encode
        self._k = min(capture.k, vocab_size)
        self._protocol = VLLMProtocol(pool, model, self._k, vocab_size)

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Request a token from each server, and compare the tokenizers.

        Raises:
            DistillError: a server does not return the log-probabilities, or has another tokenizer.
        """
        for url in self.pool.urls:
            try:
                self._next(PROBE_IDS, url=url, retry_seconds=START_RETRY_SECONDS)
            except RequestRefused as error:
                raise DistillError(self.explain(error)) from None
            except ServerFailure as error:
                raise DistillError(
                    f"generate.cache: {error}. Log-probabilities of completions, by the ids of tokens, are returned by "
                    "vLLM (`vllm serve`). For another server generate without a cache, and write it with `hf-distill "
                    "cache write` and a local or remote teacher."
                ) from None
        for info in self._protocol.check():
            check_tokenizer(self._protocol, info, tokenizer)

    def explain(self, error: RequestRefused) -> str:
        """Return what to do about a request that a server refused."""
        if not error.is_about_key and re.search(r"logprobs.*greater than max|max_logprobs", error.message, re.I):
            return (
                f"The server {error.url} does not return generate.k = {self._k} log-probabilities (its answer: "
                f"{error.message}). Start it with --max-logprobs {self._k}, or lower generate.k."
            )
        return f"generate.cache needs log-probabilities of completions from a vLLM server: {error}."

    def facts(self) -> ServerFacts:
        """Return what the manifest of a cache records."""
        hosts = sorted(public_host(url) for url in self.pool.urls)
        return {"model": self.model, "hosts": hosts, **self._protocol.summary()}

    def body(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Return the part of a request that the log-probabilities need, with the prompt."""
        return {
            "model": self.model,
            "prompt": [*prompt],
            "logprobs": self._k,
            "return_tokens_as_token_ids": True,
            "add_special_tokens": False,
        }

    def signals(self, choice: Any, request: Request, tokens: int) -> TokenSignals:
        """Return the distributions of a completion.

        Args:
            choice: the completion in the answer.
            request: what was requested.
            tokens: number of its tokens.

        Raises:
            MalformedAnswer: it has no log-probabilities of k ids for each token.
        """
        ids, values = self._parse(choice)
        if len(ids) != tokens:
            raise MalformedAnswer(f"it has log-probabilities of {len(ids)} tokens, and {tokens} were generated")
        return TokenSignals(self.encode(request), ids, values)

    def score(self, rows: Sequence[TokenRow]) -> list[RowTensors]:
        """Return the distributions at the positions of rows.

        Those of one or two positions are the distributions of a generated token, for which the server reuses what it
        has cached of the prompt. More positions need the prompt log-probabilities of the row.
        """
        few = [row for row in rows if len(row.positions) <= MAX_SINGLE_REQUESTS]
        many = [row for row in rows if len(row.positions) > MAX_SINGLE_REQUESTS]
        prompts = [row.ids[: position + 1] for row in few for position in row.positions]
        singles = iter(self.pool.map(self._next, prompts))
        of_few = iter([_concatenate([next(singles) for _ in row.positions]) for row in few])
        of_many = iter(self._protocol.request_rows(many) if many else [])
        return [_without_labels(next(of_few if len(row.positions) <= MAX_SINGLE_REQUESTS else of_many)) for row in rows]

    def _next(self, prompt: Sequence[int], url: str | None = None, retry_seconds: float | None = None) -> RowTensors:
        """Return the distribution of the token after a prompt, [1, k]."""
        body = self.body(prompt) | {"max_tokens": 1, "temperature": 0.0, "seed": 0}

        def parse(answer: Any) -> RowTensors:
            try:
                (choice,) = answer["choices"]
            except (TypeError, LookupError, ValueError) as error:
                raise MalformedAnswer(f"it is no completion ({type(error).__name__}: {error})") from None
            ids, values = self._parse(choice)
            if len(ids) != 1:
                raise MalformedAnswer(f"it has log-probabilities of {len(ids)} tokens, and 1 was requested")
            return values

        return self.pool.request(TEXT_PATH, body, parse, url=url, retry_seconds=retry_seconds)

    def _parse(self, choice: Any) -> tuple[list[int], RowTensors]:
        """Return the generated ids and their distributions."""
        entries: Any = choice.get("logprobs") if isinstance(choice, dict) else None
        try:
            tokens, top = entries["tokens"], entries["top_logprobs"]
            ids = [_token_id(token) for token in tokens]
            of_tokens = [{_token_id(token): float(value) for token, value in each.items()} for each in top]
        except (TypeError, LookupError, ValueError, AttributeError):
            raise MalformedAnswer("it has no log-probabilities with the ids of tokens") from None
        if len(ids) != len(of_tokens):
            raise MalformedAnswer(f"it has {len(ids)} tokens and {len(of_tokens)} top_logprobs")
        return ids, values_of(of_tokens, self.capture, self.vocab_size)


def _token_id(token: str) -> int:
    prefix, _, number = token.partition(_TOKEN_PREFIX)
    if prefix or not number.isdecimal():
        raise ValueError(token)
    return int(number)


def _concatenate(parts: Sequence[RowTensors]) -> RowTensors:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _without_labels(values: RowTensors) -> RowTensors:
    return {name: values[name] for name in (IDS, LOG_PROBS)}
