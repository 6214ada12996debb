"""The protocol of vLLM: prompt log-probabilities of `/v1/completions`."""

import re
from collections.abc import Sequence
from typing import Any

from .api import RowTensors, TokenRow
from .identity import START_RETRY_SECONDS
from .pool import MalformedAnswer, RequestRefused, ServerFailure, ServerPool
from .top_k import PROBE_IDS, TopKProtocol, top_k_row


class VLLMProtocol(TopKProtocol):
    """Requests the log-probabilities of the k most probable ids of each target token from vLLM servers.

    A request holds the ids up to the last target token and asks for one generated token, the smallest number that vLLM
    accepts. Sampling parameters do not affect prompt log-probabilities. Of the answer, entry i is the distribution of
    token i after the tokens before it.

    Args:
        pool: the servers.
        model: id of the served model; None: the only one that is served.
        top_k: k.
        vocab_size: V of the model, or None if unknown.
    """

    name = "vllm"
    row_tokens = 1  # the generated token

    def __init__(self, pool: ServerPool, model: str | None, top_k: int, vocab_size: int | None = None):
        super().__init__(pool, model, top_k, vocab_size)
        self._models: dict[str, str] = {}  # URL -> id of the served model

    def _refusal_hint(self, error: RequestRefused) -> str:
        if re.search(r"prompt.?logprobs.*greater than max|max_logprobs", error.message, re.IGNORECASE):
            return f"Its limit is below top_k: start it with --max-logprobs {self.top_k}, or lower top_k."
        return "Is it a vLLM server? For SGLang set api to sglang."

    def _request(self, row: TokenRow, url: str | None = None, retry_seconds: float | None = None) -> RowTensors:
        ids = prompt_of(row)
        body = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": self.top_k,
            "add_special_tokens": False,
        }
        entry_indices = [position + 1 for position in row.positions]

        def parse(answer: Any) -> RowTensors:
            entries = _entries(answer, ids, entry_indices)
            labels = [of_token[ids[index]] for of_token, index in zip(entries, entry_indices, strict=True)]
            return top_k_row(entries, labels, self.top_k, self.vocab_size)

        return self.pool.request("/v1/completions", body, parse, url=url, retry_seconds=retry_seconds)

    def tokenize(self, url: str, text: str) -> list[int] | None:
        """Return the ids of a text by `/tokenize`."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        return request_tokens(self.pool, url, body)

    def token_texts(self, url: str, ids: Sequence[int]) -> list[str | None]:
        """Return the texts of ids, which vLLM adds to prompt log-probabilities."""
        prompt = [*PROBE_IDS[:1], *ids]
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": 1,
            "prompt_logprobs": 1,
            "add_special_tokens": False,
        }

        def parse(answer: Any) -> list[str | None]:
            texts = list[str | None]()
            for token_id, entries in zip(prompt, _prompt_logprobs(answer, prompt), strict=True):
                entry = entries.get(str(token_id)) if isinstance(entries, dict) else None
                text = entry.get("decoded_token") if isinstance(entry, dict) else None
                texts.append(text if isinstance(text, str) else None)
            return texts[1:]

        return self.pool.request("/v1/completions", body, parse, url=url)


def prompt_of(row: TokenRow) -> list[int]:
    """Return the ids up to the token after the last target position; a token is added where the row ends before.

    The distribution of a token does not depend on the token itself, so the added one has no effect.
    """
    ids = list(row.ids[: row.positions[-1] + 2])
    return ids if len(ids) > row.positions[-1] + 1 else [*ids, ids[0]]


def request_tokens(pool: ServerPool, url: str, body: dict[str, Any]) -> list[int] | None:
    """Return the answer of `/tokenize`; None if the server has no such endpoint."""

    def parse(answer: Any) -> list[int]:
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list) or not all(type(each) is int for each in tokens):
            raise MalformedAnswer("/tokenize returned no list of token ids")
        return tokens

    try:
        return pool.request("/tokenize", body, parse, url=url, retry_seconds=START_RETRY_SECONDS)
    except (RequestRefused, ServerFailure):
        return None


def _prompt_logprobs(answer: Any, ids: Sequence[int]) -> list[Any]:
    """Return `prompt_logprobs` of an answer, after its length and the ids that it belongs to were checked."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    if not isinstance(choice, dict) or not isinstance(values := choice.get("prompt_logprobs"), list):
        raise MalformedAnswer("it has no choices[0].prompt_logprobs")
    if len(values) != len(ids):
        raise MalformedAnswer(f"it has prompt_logprobs of {len(values)} tokens, and {len(ids)} were sent")
    if choice.get("prompt_token_ids") not in (None, list(ids)):
        raise MalformedAnswer("its prompt_token_ids are not the ids that were sent")
    return values


def _entries(answer: Any, ids: Sequence[int], indices: Sequence[int]) -> list[dict[int, float]]:
    """Return id -> log-probability at some indices; the other entries are not read."""
    values, entries = _prompt_logprobs(answer, ids), []
    for index in indices:
        of_token = values[index]
        if not isinstance(of_token, dict):
            raise MalformedAnswer(f"prompt_logprobs[{index}] is {type(of_token).__name__}, not an object")
        if str(ids[index]) not in of_token:
            raise MalformedAnswer(f"prompt_logprobs[{index}] lacks the token {ids[index]} that was sent")
        try:
            entries.append({int(token_id): float(entry["logprob"]) for token_id, entry in of_token.items()})
        except (TypeError, ValueError, KeyError) as error:
            raise MalformedAnswer(f"prompt_logprobs[{index}] has an entry without a logprob ({error!r})") from None
    return entries
