"""`VLLMBackend`: generates with vLLM in this process."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ...core.json_types import JSONObject
from ...core.results import ServerFacts
from ...errors import require_package
from ...teachers.remote.api import RowTensors, TokenRow
from ...teachers.remote.vllm import prompt_of
from ..completion import Completion, FinishReason, Part, Request, SamplingSettings
from ..token_signals import Capture, TokenSignals
from .server_capture import MAX_SINGLE_REQUESTS, values_of


class VLLMBackend:
    """Generates with vLLM in this process, one part after the other.

    Args:
        path: path or id of the model.
        engine_options: arguments of `vllm.LLM`, such as revision, dtype and max_num_seqs.
        encode: returns the token ids of a prompt.
        settings: sampling settings.
        model_identity: what names the model.
        capture: what is recorded of the distributions, the k most probable ids; None: nothing.
        vocab_size: V of the model; needed with `capture`.

    Raises:
        DistillError: vLLM is not installed.
    """

    name = "vllm"
    log_prob_distribution = "model"

    def __init__(
        self,
        path: str,
        engine_options: dict[str, Any],
        encode: Callable[[Request], list[int]],
        settings: SamplingSettings,
        model_identity: JSONObject,
        capture: Capture | None = None,
        vocab_size: int = 0,
    ):
        require_package("vllm", "vllm", "generate.backend vllm")
        import vllm

        self.encode, self.settings, self.model_identity = encode, settings, model_identity
        self.capture, self.vocab_size = capture, vocab_size
        if capture is not None:
            engine_options = {**engine_options, "max_logprobs": min(capture.k, vocab_size)}
        self._parameters = vllm.SamplingParams
        self._engine = vllm.LLM(model=path, **engine_options)

    def identity(self) -> JSONObject:
        """Return the model."""
        return {"backend": self.name, **self.model_identity}

    def complete(
        self, parts: Iterable[Part], on_tokens: Callable[[int], None]
    ) -> Iterator[tuple[Part, list[Completion]]]:
        """Complete one part after the other; vLLM batches its requests."""
        for part in parts:
            prompts = [{"prompt_token_ids": self.encode(request)} for request in part.requests]
            outputs = self._engine.generate(prompts, [self._sampling(each) for each in part.requests], use_tqdm=False)
            completions = [
                self._completion(request, prompt["prompt_token_ids"], output)
                for request, prompt, output in zip(part.requests, prompts, outputs, strict=True)
            ]
            on_tokens(sum(each.tokens for each in completions))
            yield part, completions

    def close(self) -> None:
        """Release the engine, and with it the memory of the GPU."""
        del self._engine

    def facts(self) -> ServerFacts:
        """Return what the manifest of a cache records."""
        assert self.capture is not None
        return {"model": str(self.model_identity["model"]), "api": self.name, "top_k": self._k}

    def score(self, rows: Sequence[TokenRow]) -> list[RowTensors]:
        """Return the distributions at the positions of rows; see `ServerCapture.score`."""
        assert self.capture is not None
        prompts, parameters, places = list[dict[str, list[int]]](), list[Any](), list[list[tuple[int, int | None]]]()
        for row in rows:
            if len(row.positions) <= MAX_SINGLE_REQUESTS:
                places.append([(len(prompts) + number, None) for number in range(len(row.positions))])
                prompts += [{"prompt_token_ids": [*row.ids[: position + 1]]} for position in row.positions]
                parameters += [self._parameters(max_tokens=1, temperature=0.0, logprobs=self._k)] * len(row.positions)
            else:
                places.append([(len(prompts), position + 1) for position in row.positions])
                prompts.append({"prompt_token_ids": prompt_of(row)})
                parameters.append(self._parameters(max_tokens=1, temperature=0.0, prompt_logprobs=self._k))
        outputs = self._engine.generate(prompts, parameters, use_tqdm=False)
        values = []
        for of_row in places:
            entries = [
                outputs[number].outputs[0].logprobs[0] if index is None else outputs[number].prompt_logprobs[index]
                for number, index in of_row
            ]
            values.append(self._values(entries))
        return values

    @property
    def _k(self) -> int:
        assert self.capture is not None
        return min(self.capture.k, self.vocab_size)

    def _values(self, entries: Sequence[Mapping[int, Any]]) -> RowTensors:
        assert self.capture is not None
        plain = [{token_id: float(each.logprob) for token_id, each in of_token.items()} for of_token in entries]
        return values_of(plain, self.capture, self.vocab_size)

    def _sampling(self, request: Request) -> Any:
        settings = self.settings
        return self._parameters(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_new_tokens,
            stop=list(settings.stop) or None,
            seed=request.seed,
            logprobs=self._k if self.capture is not None else 0 if settings.log_probs else None,
        )

    def _completion(self, request: Request, prompt: Sequence[int], output: Any) -> Completion:
        (choice,) = output.outputs
        tokens = len(choice.token_ids)
        total = choice.cumulative_logprob if self.settings.log_probs else None
        mean = None if total is None or not tokens else float(total) / tokens
        reason: FinishReason = "stop" if choice.finish_reason == "stop" else "length"
        signals = None
        if self.capture is not None:
            signals = TokenSignals(prompt, [*choice.token_ids], self._values(choice.logprobs))
        return Completion(request.prompt.index, request.sample, choice.text, reason, tokens, mean, signals)
