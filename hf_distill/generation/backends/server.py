"""`ServerBackend`: requests completions from servers with an OpenAI-compatible API, such as vLLM and SGLang."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from transformers.utils import logging

from ...core.json_types import JSONObject
from ...errors import DistillError
from ...teachers.remote.identity import START_RETRY_SECONDS
from ...teachers.remote.pool import MalformedAnswer, RequestRefused, ServerFailure, ServerPool
from ..completion import Completion, FinishReason, Part, Request, SamplingSettings
from ..reasoning import join_reasoning
from .server_capture import TEXT_PATH, ServerCapture

logger = logging.get_logger(__name__)
CHAT_PATH = "/v1/chat/completions"
_REASONING_FIELDS = ("reasoning_content", "reasoning")  # of servers that separate the reasoning from the answer
_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class ServerBackend:
    """Requests completions with bounded concurrency: messages from the chat endpoint, texts from the text endpoint.

    Requests of the next part are sent while the last ones of a part are still running. Each request has its own seed,
    which a server may or may not use.

    Args:
        pool: the servers.
        model: id of the served model; None: the only one that is served.
        settings: sampling settings.
        tags: tags between which reasoning is written that the server returns apart from the answer.
        template_variables: variables of the chat template, such as enable_thinking. vLLM and SGLang read them.
    """

    name = "server"
    log_prob_distribution = "model"

    def __init__(
        self,
        pool: ServerPool,
        model: str | None,
        settings: SamplingSettings,
        tags: tuple[str, str],
        template_variables: Mapping[str, object] | None = None,
    ):
        self.pool, self.settings, self.tags = pool, settings, tags
        self.template_variables = template_variables or {}
        self.model = model or self._only_model()
        self.capture: ServerCapture | None = None  # if set, the distributions of completions are recorded

    def identity(self) -> JSONObject:
        """Return the id of the served model."""
        return {"backend": self.name, "model": self.model}

    def close(self) -> None:
        """Cancel all requests and close the connections."""
        self.pool.close()

    def complete(
        self, parts: Iterable[Part], on_tokens: Callable[[int], None]
    ) -> Iterator[tuple[Part, list[Completion]]]:
        """Complete parts; the first ones are yielded while requests of later ones are running."""
        running = deque[tuple[Part, list[Future[Completion]]]]()
        executor = ThreadPoolExecutor(self.pool.concurrency, thread_name_prefix="generate")
        try:
            for part in parts:
                running.append((part, [executor.submit(self._complete, each, on_tokens) for each in part.requests]))
                while sum(not future.done() for _, futures in running for future in futures) >= self.pool.concurrency:
                    yield self._result(*running.popleft())
                    if not running:
                        break
            while running:
                yield self._result(*running.popleft())
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            self.pool.close()
            raise
        finally:
            executor.shutdown(cancel_futures=True)

    def _result(self, part: Part, futures: Sequence[Future[Completion]]) -> tuple[Part, list[Completion]]:
        return part, [future.result() for future in futures]

    def _only_model(self) -> str:
        """Return the id of the model that all servers serve.

        Raises:
            DistillError: a server does not answer, or serves several models or another one.
        """

        def parse(answer: Any) -> list[str]:
            try:
                return [str(each["id"]) for each in answer["data"]]
            except (TypeError, LookupError):
                raise MalformedAnswer("/v1/models returned no list of models") from None

        served = dict[str, list[str]]()
        for url in self.pool.urls:
            try:
                served[url] = self.pool.request("/v1/models", None, parse, url=url, retry_seconds=START_RETRY_SECONDS)
            except (ServerFailure, RequestRefused) as error:
                raise DistillError(
                    f"{error}. Check generate.url and that the server is running, such as `vllm serve MODEL`."
                ) from None
        if len({name for names in served.values() for name in names}) != 1:
            raise DistillError(f"The servers of generate.url serve the models {served}: set generate.model to one.")
        return next(iter(served.values()))[0]

    def _complete(self, request: Request, on_tokens: Callable[[int], None]) -> Completion:
        prompt, settings, capture = request.prompt, self.settings, self.capture
        is_chat = not isinstance(prompt.content, str) and capture is None  # otherwise token ids are sent
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": request.seed,
        }
        body |= {"messages": prompt.content} if is_chat else {"prompt": prompt.content}
        if prompt.tools and capture is None:
            body["tools"] = prompt.tools
        if is_chat and self.template_variables:
            body["chat_template_kwargs"] = dict(self.template_variables)
        if settings.stop:
            body["stop"] = list(settings.stop)
        if settings.log_probs:
            body["logprobs"] = True if is_chat else 0
        if capture is not None:
            body |= capture.body(capture.encode(request))
        try:
            completion = self.pool.request(
                CHAT_PATH if is_chat else TEXT_PATH, body, lambda answer: self._parse(answer, request, is_chat)
            )
        except RequestRefused as error:
            raise DistillError(self._explain(error, request)) from None
        if completion is None:
            raise DistillError(
                f"The answer to the prompt of data.{prompt.source}, row {prompt.row} (counted from 0), is a call of a "
                "tool, and a generated data set holds texts: use generate.backend transformers or vllm, which write "
                "the call as the text that the model generates, or remove the column tools."
            )
        on_tokens(completion.tokens)
        return completion

    def _explain(self, error: RequestRefused, request: Request) -> str:
        """Return what to do about a request that a server refused."""
        if error.is_about_key:
            return f"{error}."
        where = f"The request for data.{request.prompt.source}, row {request.prompt.row}, was refused"
        if "context" in error.message.lower():
            return (
                f"{where}: {error}. Lower generate.max_new_tokens, or start the server with a longer --max-model-len."
            )
        if "logprob" in error.message.lower() and self.capture is not None:
            return f"{where}: {self.capture.explain(error)}"
        if "logprob" in error.message.lower():
            return f"{where}: {error}. Set generate.log_probs to false, if the server returns no log-probabilities."
        return f"{where}: {error}."

    def _parse(self, answer: Any, request: Request, is_chat: bool) -> Completion | None:
        """Return the completion in an answer; None if it is the call of a tool, which has no text."""
        try:
            (choice,) = answer["choices"]
            text = self._text(choice["message"]) if is_chat else choice["text"]
            reason = choice["finish_reason"]
            tokens = answer["usage"]["completion_tokens"]
        except (TypeError, LookupError, ValueError) as error:
            raise MalformedAnswer(f"it is no completion ({type(error).__name__}: {error})") from None
        if reason == "tool_calls":
            return None
        if not isinstance(text, str) or type(tokens) is not int:
            raise MalformedAnswer("it has no text, or no usage.completion_tokens")
        if reason not in _FINISH_REASONS:
            raise MalformedAnswer(f"finish_reason is {reason!r}, and not one of {', '.join(_FINISH_REASONS)}")
        log_prob = self._mean_log_prob(choice, is_chat) if self.settings.log_probs else None
        signals = None if self.capture is None else self.capture.signals(choice, request, tokens)
        return Completion(
            request.prompt.index, request.sample, text, _FINISH_REASONS[reason], tokens, log_prob, signals
        )

    def _text(self, message: dict[str, Any]) -> Any:
        """Return the text of an answer, with the reasoning between tags if the server returns it apart."""
        answer = message.get("content")
        answer = "" if answer is None else answer
        reasoning = next((message[name] for name in _REASONING_FIELDS if isinstance(message.get(name), str)), None)
        return join_reasoning(reasoning, answer, self.tags) if isinstance(answer, str) else answer

    def _mean_log_prob(self, choice: dict[str, Any], is_chat: bool) -> float | None:
        """Return the mean log-probability of the tokens; None, with a warning, if the server returned none."""
        entries = choice.get("logprobs") or {}
        try:
            values = [each["logprob"] for each in entries["content"]] if is_chat else entries["token_logprobs"]
            values = [float(value) for value in values]
        except (TypeError, LookupError, ValueError):
            values = []
        if not values:
            logger.warning_once(
                f"{self.pool.urls[0]} returns no log-probabilities: the column logprob is empty. Set "
                "generate.log_probs to false to request none. This warning is logged once."
            )
            return None
        mean = sum(values) / len(values)
        if not math.isfinite(mean):
            raise MalformedAnswer("a log-probability is not finite")
        return mean
