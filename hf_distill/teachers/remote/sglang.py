"""The protocol of SGLang: input log-probabilities of `/generate`."""

from collections.abc import Sequence
from typing import Any

from .api import RowTensors, TokenRow
from .pool import MalformedAnswer, RequestRefused
from .top_k import PROBE_IDS, TopKProtocol, top_k_row
from .vllm import prompt_of, request_tokens


class SGLangProtocol(TopKProtocol):
    """Requests the log-probabilities of the k most probable ids of each target token from SGLang servers.

    A request starts at the first target token (`logprob_start_len`), so the log-probabilities of a prompt are neither
    computed nor sent. Of the answer, entry 0 is null, and entry i is the distribution of token logprob_start_len + i
    after the tokens before it. The temperature does not affect input log-probabilities.

    Args:
        pool: the servers.
        model: id of the served model; None: the only one that is served.
        top_k: k.
        vocab_size: V of the model, or None if unknown.
    """

    name = "sglang"
    row_tokens = 6  # SGLang accepts inputs of up to its context length minus 6
    context_option = "--context-length"

    def _refusal_hint(self, error: RequestRefused) -> str:
        return "Is it an SGLang server? For vLLM set api to vllm."

    def _request(self, row: TokenRow, url: str | None = None, retry_seconds: float | None = None) -> RowTensors:
        ids, start = prompt_of(row), row.positions[0]
        entry_indices = [position + 1 - start for position in row.positions]

        def parse(answer: Any) -> RowTensors:
            entries, labels = _entries(answer, ids[start:], entry_indices)
            return top_k_row(entries, labels, self.top_k, self.vocab_size)

        body = _body(ids, start, self.top_k)
        return self.pool.request("/generate", body, parse, url=url, retry_seconds=retry_seconds)

    def tokenize(self, url: str, text: str) -> list[int] | None:
        """Return the ids of a text by `/tokenize`, which newer servers have."""
        return request_tokens(self.pool, url, {"prompt": text, "add_special_tokens": False})

    def token_texts(self, url: str, ids: Sequence[int]) -> list[str | None]:
        """Return the texts of ids, which SGLang adds to input log-probabilities on request."""
        prompt = [*PROBE_IDS[:1], *ids]

        def parse(answer: Any) -> list[str | None]:
            entries = zip(prompt, _token_logprobs(answer, prompt), strict=True)
            texts = [entry[2] if len(entry) > 2 and entry[1] == token_id else None for token_id, entry in entries]
            return [text if isinstance(text, str) else None for text in texts[1:]]

        body = _body(prompt, 0, 1) | {"return_text_in_logprobs": True}
        return self.pool.request("/generate", body, parse, url=url)


def _body(ids: Sequence[int], start: int, top_k: int) -> dict[str, Any]:
    """Return a request for the log-probabilities of the tokens after `start`; it generates nothing."""
    return {
        "input_ids": list(ids),
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": start,
        "top_logprobs_num": top_k,
        "stream": False,
    }


def _token_logprobs(answer: Any, ids: Sequence[int]) -> list[Any]:
    """Return `input_token_logprobs` of an answer, (logprob, id, text) for each id, after its ids were checked.

    SGLang reports the last id of the vocabulary as 0.
    """
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    values = meta.get("input_token_logprobs") if isinstance(meta, dict) else None
    if not isinstance(values, list) or not all(isinstance(each, list) and len(each) > 1 for each in values):
        raise MalformedAnswer("it has no meta_info.input_token_logprobs")
    if len(values) != len(ids):
        raise MalformedAnswer(f"it has input_token_logprobs of {len(values)} tokens, and {len(ids)} were expected")
    if any(returned[1] not in (token_id, 0) for returned, token_id in zip(values, ids, strict=True)):
        raise MalformedAnswer("the ids of its input_token_logprobs are not those that were sent")
    return values


def _entries(answer: Any, ids: Sequence[int], indices: Sequence[int]) -> tuple[list[dict[int, float]], list[float]]:
    """Return id -> log-probability and the log-probability of the token at some indices; others are not read."""
    of_tokens = _token_logprobs(answer, ids)
    values, entries = answer["meta_info"].get("input_top_logprobs"), []
    if not isinstance(values, list) or len(values) != len(ids):
        raise MalformedAnswer(f"it has no meta_info.input_top_logprobs of {len(ids)} tokens")
    for index in indices:
        try:
            entries.append({int(entry[1]): float(entry[0]) for entry in values[index]})
        except (TypeError, ValueError, LookupError) as error:
            raise MalformedAnswer(f"input_top_logprobs[{index}] is not a list of (logprob, id) ({error!r})") from None
    try:
        labels = [float(of_tokens[index][0]) for index in indices]
    except (TypeError, ValueError) as error:
        raise MalformedAnswer(f"input_token_logprobs has an entry without a log-probability ({error!r})") from None
    return entries, labels
