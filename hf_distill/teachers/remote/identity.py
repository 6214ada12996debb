"""Checks before training that a server serves the model and the tokenizer that were named."""

from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from ...cache.fingerprints import tokenizer_fingerprint
from ...errors import DistillError, did_you_mean
from .api import RemoteProtocol, ServerInfo
from .pool import MalformedAnswer, RequestRefused, ServerFailure, ServerPool

logger = logging.get_logger(__name__)
START_RETRY_SECONDS = 5.0  # for which requests are repeated before training; a wrong URL is reported soon
_PROBE_TEXT = "The quick brown fox, 1234: naïve façade?\n\tdef f(x): return x"
_MAX_PROBE_IDS = 65
_WORD_MARKS = " ▁Ġ"  # how tokenizers write the space before a word
_START_COMMANDS = {
    "vllm": "vllm serve MODEL --max-logprobs K",
    "sglang": "python -m sglang.launch_server --model-path MODEL",
    "hidden": "hf-distill serve MODEL",
}


def start_error(error: ServerFailure | RequestRefused, api: str) -> DistillError:
    """Return the error of a server that does not answer, or does not accept the API key, before training."""
    if isinstance(error, RequestRefused) and error.is_about_key:
        return DistillError(f"{error}.")
    return DistillError(
        f"{error}. Check that the URL is right and that the server is running; it is started with "
        f"`{_START_COMMANDS[api]}`. If it is not such a server, set api to another value."
    )


def find_models(pool: ServerPool, model: str | None, api: str) -> list[ServerInfo]:
    """Return the served model of each URL, from `/v1/models`, which vLLM and SGLang have.

    Args:
        pool: the servers.
        model: id, or path of the weights, of the model; None: the only one that is served.
        api: name of the protocol.

    Raises:
        DistillError: a server does not answer, or does not serve the model; servers serve different models.
    """
    infos = []
    for url in pool.urls:
        try:
            served = pool.request("/v1/models", None, _parse_models, url=url, retry_seconds=START_RETRY_SECONDS)
        except (ServerFailure, RequestRefused) as error:
            raise start_error(error, api) from None
        infos.append(_choose(url, served, model))
    if len({info.model for info in infos}) > 1:
        raise DistillError(
            "The URLs of a remote teacher must serve one model under one name, and they serve "
            f"{', '.join(f'{info.model} ({info.url})' for info in infos)}: set model, or start them with the same "
            "--served-model-name."
        )
    return infos


def _parse_models(answer: Any) -> list[dict[str, Any]]:
    served = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(served, list) or not all(isinstance(m, dict) and isinstance(m.get("id"), str) for m in served):
        raise MalformedAnswer("/v1/models returned no list of models")
    return served


def _choose(url: str, served: Sequence[dict[str, Any]], model: str | None) -> ServerInfo:
    names = [each["id"] for each in served]
    if model is None and len(served) != 1:
        raise DistillError(f"{url} serves {len(names)} models ({', '.join(names)}): set model to the teacher's.")
    chosen = [each for each in served if model in (None, each["id"])]
    chosen = chosen or [each for each in served if each.get("root") == model]
    if not chosen:
        raise DistillError(
            "Set model to the id under which the server serves the teacher, or start the server with that model: "
            f"{url} serves {', '.join(names) or 'no model'}, and not {model!r}{did_you_mean(str(model), names)}"
        )
    length = chosen[0].get("max_model_len")
    return ServerInfo(url, chosen[0]["id"], context_length=length if type(length) is int and length > 0 else None)


def check_tokenizer(protocol: RemoteProtocol, info: ServerInfo, tokenizer: Any) -> None:
    """Check that a server's ids mean the same tokens as the student's: ids of a text, and texts of some ids.

    They are not requested if the server returned the fingerprint of the student's tokenizer.

    Args:
        protocol: the protocol of the server.
        info: the server.
        tokenizer: the student's tokenizer, or None.

    Raises:
        DistillError: they differ.
    """
    if not hasattr(tokenizer, "get_vocab"):
        logger.warning_once(
            "The tokenizer of the student is not known, so it is not compared with that of the teacher's server: pass "
            "processing_class to the trainer."
        )
        return
    if info.tokenizer is not None and info.tokenizer == tokenizer_fingerprint(tokenizer):
        return
    expected = tokenizer(_PROBE_TEXT, add_special_tokens=False)["input_ids"]
    returned = protocol.tokenize(info.url, _PROBE_TEXT)
    if returned is not None and returned != list(expected):
        raise DistillError(
            f"{_differ(info)}: a probe text has the ids {_first(returned)} for the server and {_first(expected)} for "
            "the student. Use a teacher and a student with the same tokenizer."
        )
    count = _MAX_PROBE_IDS
    if info.context_length is not None:  # the request has one id before them
        count = max(1, min(count, info.context_length - protocol.row_tokens - 1))
    ids = _probe_ids(tokenizer, count)
    try:
        texts = protocol.token_texts(info.url, ids)
    except (RequestRefused, ServerFailure) as error:
        raise DistillError(
            f"The ids 0 to {max(ids)} of the student's tokenizer were sent to the teacher's server, and it does not "
            f"accept them: {error}. Use a teacher and a student with the same tokenizer."
        ) from None
    for token_id, text in zip(ids, texts, strict=True):
        if text is not None and _word(text) != _word(tokenizer.decode([token_id])):
            raise DistillError(
                f"{_differ(info)}: the id {token_id} is {text!r} for the server and {tokenizer.decode([token_id])!r} "
                "for the student. Use a teacher and a student with the same tokenizer."
            )
    if returned is None and all(text is None for text in texts):
        logger.warning_once(
            f"{info.url} neither tokenizes nor returns the texts of ids, so its tokenizer was not compared with the "
            "student's."
        )


def _differ(info: ServerInfo) -> str:
    return f"The tokenizer of {info.model} on {info.url} is not the student's"


def _first(ids: Sequence[int]) -> str:
    return f"[{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}]"


def _probe_ids(tokenizer: Any, count: int) -> list[int]:
    """Return up to `count` ids of words, spread over the vocabulary, whose texts are the same in every way of decoding.

    The last one is the largest.
    """
    special = {*getattr(tokenizer, "all_special_ids", ())}
    words = [
        token_id
        for token, token_id in tokenizer.get_vocab().items()
        if token_id not in special and token.strip(_WORD_MARKS).isascii() and token.strip(_WORD_MARKS).isalnum()
    ]
    words.sort()
    step = -(-len(words) // max(1, count - 1))
    return [*words[:: max(1, step)][: count - 1], *words[-1:]]


def _word(text: str) -> str:
    return text.strip(_WORD_MARKS)
