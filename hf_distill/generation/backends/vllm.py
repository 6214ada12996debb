"""`VLLMBackend`: generates with vLLM in this process."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ...core.json_types import JSONObject
from ...errors import require_package
from ..completion import Completion, FinishReason, Part, Request, SamplingSettings


class VLLMBackend:
    """Generates with vLLM in this process, one part after the other.

    Args:
        path: path or id of the model.
        engine_options: arguments of `vllm.LLM`, such as revision, dtype and max_num_seqs.
        encode: returns the token ids of a prompt.
        settings: sampling settings.
        model_identity: what names the model.

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
    ):
        require_package("vllm", "vllm", "generate.backend vllm")
        import vllm

        self.encode, self.settings, self.model_identity = encode, settings, model_identity
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
            completions = [self._completion(*pair) for pair in zip(part.requests, outputs, strict=True)]
            on_tokens(sum(each.tokens for each in completions))
            yield part, completions

    def close(self) -> None:
        """Release the engine, and with it the memory of the GPU."""
        del self._engine

    def _sampling(self, request: Request) -> Any:
        settings = self.settings
        return self._parameters(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_new_tokens,
            stop=list(settings.stop) or None,
            seed=request.seed,
            logprobs=0 if settings.log_probs else None,
        )

    def _completion(self, request: Request, output: Any) -> Completion:
        (choice,) = output.outputs
        tokens = len(choice.token_ids)
        total = choice.cumulative_logprob if self.settings.log_probs else None
        mean = None if total is None or not tokens else float(total) / tokens
        reason: FinishReason = "stop" if choice.finish_reason == "stop" else "length"
        return Completion(request.prompt.index, request.sample, choice.text, reason, tokens, mean)
