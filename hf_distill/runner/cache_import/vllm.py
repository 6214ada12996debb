"""Reads the `prompt_logprobs` of vLLM from JSON Lines.

A line is a response of `/v1/completions` or `/v1/chat/completions`, a line of the output of `vllm run-batch`, whose
response is in `response.body`, or an object with `prompt_token_ids` and `prompt_logprobs`, such as a script writes from
the outputs of `LLM.generate`. Entry i of `prompt_logprobs` is the distribution of token i after the tokens before it;
entry 0 is null. An entry maps ids to `{"logprob", "rank", "decoded_token"}`. It has the k most probable ids, and the
actual token where that is not one of them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...core.files import file_entry
from ...errors import DistillError
from .records import Location, Provenance, TokenRecord

_WORD_MARKS = " ▁Ġ"  # how tokenizers write the space before a word
_MAX_DIGITS = 9  # of an id
_MAX_NATS = 1e9  # absolute value of a log-probability; vLLM writes -9999 for -inf
_REPLACEMENT = "\ufffd"  # text of an incomplete character, which vLLM completes from the context


class VLLMFile:
    """A JSON Lines file with the prompt log-probabilities of vLLM.

    Args:
        path: the file.
        tokenizer: the tokenizer of the recipe, with which texts of ids are compared.

    A location is (offset of the line in bytes, number of the line, index of the record in the line).
    """

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase):
        self.path, self._tokenizer = path, tokenizer
        self._texts: set[tuple[int, str]] = set()  # pairs of an id and a text that agree

    def provenance(self) -> Provenance:
        """Return the entry of the file."""
        return Provenance("vllm", [file_entry(self.path)])

    def records(self) -> Iterator[tuple[Location, TokenRecord]]:
        """Yield all records; empty lines are skipped."""
        offset = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    for index, record in enumerate(self._parse(line, number)):
                        yield (offset, number, index), record
                offset += len(line)

    def read(self, location: Location) -> TokenRecord:
        """Return the record at a location."""
        offset, number, index = location
        with self.path.open("rb") as file:
            file.seek(offset)
            return self._parse(file.readline(), number)[index]

    def _parse(self, line: bytes, number: int) -> list[TokenRecord]:
        where = f"{self.path}, line {number},"
        try:
            content = json.loads(line)
            if b"\\ud" in line.lower():
                json.dumps(content, ensure_ascii=False).encode()  # raises for half of a surrogate pair
        except (ValueError, RecursionError) as error:
            raise DistillError(
                f"{where} is not JSON ({error}). Each line must be one object; a line that was cut off must be "
                "removed or requested again."
            ) from None
        return [self._record(where, *parts) for parts in _find_logprobs(where, content)]

    def _record(self, where: str, entries: list[Any], request: dict[str, Any]) -> TokenRecord:
        tokens = self._tokens(where, request, len(entries))
        if len(entries) != len(tokens):
            raise DistillError(
                f"{where} has prompt_logprobs of {len(entries)} tokens, and its prompt has {len(tokens)} tokens."
            )
        if entries and entries[0]:
            raise DistillError(
                f"{where} has log-probabilities of the first token, which no token precedes: entry 0 must be null."
            )
        positions = [
            self._position(f"{where} prompt_logprobs[{i}]", entry, token)
            for i, (entry, token) in enumerate(zip(entries[1:], tokens[1:], strict=True), 1)
        ]
        width = max((len(ids) for ids, *_ in positions), default=0)
        table = np.full((len(positions), width), -1, dtype=np.int64)
        log_probs = np.full(table.shape, -np.inf)
        for row, (ids, values, *_) in enumerate(positions):
            table[row, : len(ids)], log_probs[row, : len(ids)] = ids, values
        min_k = max((low for *_, low, _ in positions), default=0)
        max_k = min((high for *_, high in positions), default=0)
        model = request.get("model")
        return TokenRecord(
            where.rstrip(","),
            np.array(tokens, dtype=np.int64),
            table,
            log_probs,
            min_k,
            max_k,
            model=model if isinstance(model, str) else None,
        )

    def _position(self, where: str, entry: Any, token: int) -> tuple[list[int], list[float], int, int]:
        """Return the ids of a position, their log-probabilities, and the bounds of k.

        The actual token was added to the k most probable ids if its rank is larger than their number. Without a rank it
        may have been added if it is the least probable one. It is therefore the one that is left out of k.
        """
        if not isinstance(entry, dict) or not entry:
            raise DistillError(
                f"{where} is {'empty' if entry == {} else type(entry).__name__}, and must be an object with the "
                "log-probabilities of ids. vLLM returns none for tokens that it reads from its prefix cache: start it "
                "with --no-enable-prefix-caching."
            )
        ids, values, ranks = list[int](), list[float](), list[Any]()
        for key, value in entry.items():
            log_prob: Any = value.get("logprob") if isinstance(value, dict) else None
            is_id = key.isdecimal() and len(key) <= _MAX_DIGITS
            if not is_id or type(log_prob) not in (int, float) or not -_MAX_NATS <= log_prob <= _MAX_NATS:
                raise DistillError(
                    f"{where} has the entry {key[:20]!r}: {str(value)[:80]}. The key must be an id, and the value an "
                    "object with a finite `logprob`."
                )
            ids.append(int(key))
            values.append(log_prob)
            ranks.append(value.get("rank"))
            self._check_text(where, ids[-1], value.get("decoded_token"))
        if token not in ids:
            raise DistillError(
                f"{where} lacks the id {token} of the prompt, which vLLM always returns: these are log-probabilities "
                "of another text, or of another tokenizer."
            )
        actual, count = ids.index(token), len(ids)
        rank = ranks[actual]
        if type(rank) is int:
            return ids, values, count - (rank >= count), count - (rank > count)
        return ids, values, count - (values[actual] == min(values)), count

    def _check_text(self, where: str, token_id: int, text: Any) -> None:
        """Compare the text of an id in the file with that of the tokenizer."""
        if not isinstance(text, str) or (token_id, text) in self._texts or _REPLACEMENT in text:
            return
        expected = [str(self._tokenizer.decode([token_id])), str(self._tokenizer.convert_ids_to_tokens(token_id))]
        if _REPLACEMENT not in expected[0] and text.strip(_WORD_MARKS) not in [t.strip(_WORD_MARKS) for t in expected]:
            raise DistillError(
                f"{where} has the text {text!r} for the id {token_id}, which is {expected[0]!r} in the tokenizer of "
                "the recipe: the log-probabilities come from a model with another tokenizer."
            )
        self._texts.add((token_id, text))

    def _tokens(self, where: str, request: dict[str, Any], count: int) -> list[int]:
        """Return the token ids of the prompt."""
        ids, prompt = request.get("prompt_token_ids"), request.get("prompt")
        ids = prompt if ids is None and isinstance(prompt, list) else ids
        if ids is not None:
            if not isinstance(ids, list) or not all(type(each) is int and 0 <= each < 10**_MAX_DIGITS for each in ids):
                raise DistillError(f"{where} has prompt_token_ids that are no list of ids.")
            if isinstance(prompt, str) and not self._is_text_of(prompt, ids):
                raise DistillError(
                    f"{where} has a prompt whose text is not that of its prompt_token_ids in the tokenizer of the "
                    f"recipe ({str(self._tokenizer.decode(ids))[:40]!r}): it was made with another tokenizer."
                )
            return ids
        if not isinstance(prompt, str):
            raise DistillError(
                f"{where} has no token ids of its prompt. Request them with `return_token_ids: true`, or add "
                "`prompt_token_ids` or `prompt` to the object."
            )
        encodings = [self._encode(prompt, special) for special in (True, False)]
        return next((encoding for encoding in encodings if len(encoding) == count), encodings[0])

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _is_text_of(self, text: str, ids: list[int]) -> bool:
        vocabulary = len(self._tokenizer)
        if not all(0 <= each < vocabulary for each in ids):
            return False
        return ids in (self._encode(text, True), self._encode(text, False)) or text in (
            self._tokenizer.decode(ids),
            self._tokenizer.decode(ids, skip_special_tokens=True),
        )


def _find_logprobs(where: str, content: Any) -> list[tuple[list[Any], dict[str, Any]]]:
    """Return the `prompt_logprobs` of a line, each with the ids or the text of its prompt and the model."""
    if not isinstance(content, dict):
        raise DistillError(f"{where} holds {type(content).__name__}, and each line must be an object, {{...}}.")
    body: Any = content
    if "response" in content:  # a line of the output of a batch
        response = content["response"]
        body = response.get("body") if isinstance(response, dict) else None
        failed = not isinstance(response, dict) or response.get("status_code", 200) != 200
        if content.get("error") or failed or not isinstance(body, dict):
            reason = content.get("error") or body or response
            raise DistillError(
                f"{where} is the answer to a request that failed ({str(reason)[:200]}): request it again, or remove "
                "the line."
            )
    choices = body.get("choices")
    holders = [each for each in choices if isinstance(each, dict)] if isinstance(choices, list) else []
    entries_and_requests = []
    for holder in [body, *holders]:
        entries = holder.get("prompt_logprobs")
        if entries is None:
            continue
        if not isinstance(entries, list):
            raise DistillError(f"{where} has prompt_logprobs of type {type(entries).__name__}, and must have a list.")
        names = ("prompt_token_ids", "prompt", "model")
        entries_and_requests.append((entries, {name: _first_given(name, holder, body, content) for name in names}))
    if not entries_and_requests:
        raise DistillError(
            f"{where} has no prompt_logprobs: it has {', '.join(sorted(content)) or 'no keys'}. Request them with "
            "`prompt_logprobs: K`."
        )
    return entries_and_requests


def _first_given(name: str, *objects: dict[str, Any]) -> Any:
    return next((value for each in objects if (value := each.get(name)) is not None), None)
