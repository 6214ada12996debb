"""`TransformersBackend`: generates with a transformers model in this process."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager

from ...core.json_types import JSONObject
from ...errors import DistillError, RunError
from ..completion import Completion, FinishReason, Part, Request, SamplingSettings, cut_at_stop
from ..token_signals import Capture, TokenSignals
from .recorder import (
    STEPS_AFTER_END,
    OneStepAfterEnd,
    PaddedRecorder,
    RequestWithOneMoreStep,
    SignalRecorder,
    record_requests,
)
from .row_dropping import generate_and_drop_rows

_CPU_PAGE_TOKENS = 32
_RESULT_SECONDS = 1.0  # for which a result is waited for before the generation thread is checked


@dataclass(frozen=True)
class _Generated:
    """Token ids of a completion, their log-probabilities, whether a stop text ended it, and recorded distributions."""

    ids: list[int]
    log_probs: list[float]
    is_stopped: bool = False
    signals: TokenSignals | None = None


class TransformersBackend:
    """Generates with a transformers model, with continuous batching, or in padded batches of prompts of similar length.

    Continuous batching admits all requests of a part before the first step, so that a part is generated in the same
    order of steps each time, and the seed of the part determines its completions.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        encode: returns the token ids of a prompt.
        settings: sampling settings.
        batching: "continuous" or "padded".
        batch_size: largest number of requests that are generated at the same time.
        model_identity: what names the model.
        capture: what is recorded of the distributions; None: nothing. A completion is then generated with one more
            step, and the end-of-text token follows one that is cut off, so that the distributions of the tokens are
            known that the training adds.
    """

    name = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        encode: Callable[[Request], list[int]],
        settings: SamplingSettings,
        batching: str,
        batch_size: int,
        model_identity: JSONObject,
        capture: Capture | None = None,
    ):
        self.capture = capture
        self.model, self.tokenizer, self.encode, self.settings = model.eval(), tokenizer, encode, settings
        self.batching, self.batch_size, self.model_identity = batching, batch_size, model_identity
        self.eos_ids = _end_ids(model, tokenizer)
        model.generation_config = GenerationConfig()  # generate would use its values for those that are not set here
        is_plain = settings.temperature in (0, 1) and (settings.top_p == 1 or not settings.temperature)
        self.log_prob_distribution = "model" if is_plain or self.batching == "padded" else "sampling"

    def identity(self) -> JSONObject:
        """Return the model, and how requests are batched."""
        return {"backend": self.name, "batching": self.batching, "batch_size": self.batch_size, **self.model_identity}

    def complete(
        self, parts: Iterable[Part], on_tokens: Callable[[int], None]
    ) -> Iterator[tuple[Part, list[Completion]]]:
        """Complete one part after the other."""
        generate = self._continuous if self.batching == "continuous" else self._padded
        for part in parts:
            prompts = [self.encode(request) for request in part.requests]
            recorder = None
            if self.capture is not None:
                recorder = SignalRecorder(
                    self.model, self.capture, prompts, self._max_steps, self.tokenizer.eos_token_id
                )
            with nullcontext() if recorder is None else recorder.watch_head():
                completions = [
                    self._completion(part.requests[index], generated)
                    for index, generated in generate(prompts, part.seed, on_tokens, recorder)
                ]
            yield part, completions

    def close(self) -> None:
        """Do nothing: the model belongs to the caller."""

    @property
    def _max_steps(self) -> int:
        return self.settings.max_new_tokens + (0 if self.capture is None else STEPS_AFTER_END)

    def _generation_config(self) -> GenerationConfig:
        """Return the settings of `generate`; of the model's own generation config only the end-of-text ids apply."""
        sampling = {}
        if self.settings.temperature:
            sampling = {"do_sample": True, "temperature": self.settings.temperature, "top_p": self.settings.top_p}
            sampling |= {"top_k": 0}
        pad = self.tokenizer.pad_token_id
        return GenerationConfig(
            max_new_tokens=self._max_steps,
            eos_token_id=None if self.capture is not None else sorted(self.eos_ids) or None,
            pad_token_id=pad if pad is not None else next(iter(self.eos_ids), 0),
            **sampling,
        )

    def _continuous(
        self,
        prompts: Sequence[list[int]],
        seed: int,
        on_tokens: Callable[[int], None],
        recorder: SignalRecorder | None,
    ) -> Iterator[tuple[int, _Generated]]:
        """Yield (index of the prompt, completion) as they are finished."""
        config = self._generation_config()
        if config.eos_token_id is None:
            config.eos_token_id = -1  # none, in the way that continuous batching expects
        with torch.inference_mode():
            try:
                manager = self.model.init_continuous_batching(config, self._batching_config(prompts, seed))
            except (AttributeError, NotImplementedError, ValueError) as error:
                raise self._no_continuous_batching(error) from error
            is_streaming = bool(self.settings.stop)
            names = self._add_requests(manager, prompts, recorder)
            counted = dict.fromkeys(names.values(), 0)
            if self.model.device.type == "cuda":
                manager.warmup()
            manager.start()
            try:
                while names:
                    result = manager.get_result(timeout=_RESULT_SECONDS)
                    if result is None:
                        if not manager.is_running():
                            raise self._no_continuous_batching(manager.background_thread_status.fatal_error)
                        continue
                    if result.request_id not in names:
                        continue  # it continued for some steps after its stop text
                    if result.error is not None:
                        raise self._no_continuous_batching(result.error)
                    index = names[result.request_id]
                    ids = self._until_end(result.generated_tokens)
                    on_tokens(len(ids) - counted[index])
                    counted[index] = len(ids)
                    is_stopped = is_streaming and self._has_stop(ids)
                    if is_stopped or result.is_finished():
                        del names[result.request_id]
                        if not result.is_finished():
                            manager.cancel_request(result.request_id)
                        signals = None
                        if recorder is not None:
                            tokens = result.generated_tokens
                            signals = recorder.signals(index, self._until_end(tokens, self._max_steps), len(tokens))
                        yield index, _Generated(ids, list(result.logprobs[: len(ids)]), is_stopped, signals)
            finally:
                manager.stop(block=True, hard_stop=bool(names))
                manager.destroy()

    def _add_requests(
        self,
        manager: ContinuousBatchingManager,
        prompts: Sequence[list[int]],
        recorder: SignalRecorder | None,
    ) -> dict[str, int]:
        """Add all requests, and return the index of the prompt of each name."""
        is_streaming = bool(self.settings.stop)
        if recorder is None:
            add = partial(manager.add_request, max_new_tokens=self._max_steps, streaming=is_streaming)
            return {str(add(ids)): index for index, ids in enumerate(prompts)}
        names = {f"prompt {index}": index for index in range(len(prompts))}
        record_requests(manager, recorder, names)
        end_ids = frozenset(self.eos_ids)
        for name, index in names.items():
            request = RequestWithOneMoreStep(
                request_id=name,
                initial_tokens=[*prompts[index]],
                streaming=is_streaming,
                max_new_tokens=self._max_steps,
                end_ids=end_ids,
            )
            manager.input_queue.put(request)
        return names

    def _batching_config(self, prompts: Sequence[list[int]], seed: int) -> ContinuousBatchingConfig:
        """Return the settings of continuous batching; on a GPU the cache has the size of the free memory."""
        config = ContinuousBatchingConfig(
            return_logprobs=self.settings.log_probs, seed=seed, max_requests_per_batch=self.batch_size
        )
        if self.model.device.type != "cpu":
            return config
        longest = max(map(len, prompts))
        pages = -(-(longest + self._max_steps) // _CPU_PAGE_TOKENS) + 1
        config.page_size, config.num_blocks = _CPU_PAGE_TOKENS, min(self.batch_size, len(prompts)) * pages
        config.max_batch_tokens = max(longest, self.batch_size, 2 * _CPU_PAGE_TOKENS)
        return config

    def _no_continuous_batching(self, error: object) -> DistillError:
        return DistillError(
            f"Continuous batching failed for {type(self.model).__name__}: {error}. If transformers does not support it "
            "for this model, set generate.batching to padded; if memory is short, lower generate.batch_size."
        )

    def _padded(
        self,
        prompts: Sequence[list[int]],
        seed: int,
        on_tokens: Callable[[int], None],
        recorder: SignalRecorder | None,
    ) -> Iterator[tuple[int, _Generated]]:
        """Yield (index of the prompt, completion), in batches of prompts of similar length."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        torch.manual_seed(seed)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            generated_batch = self._padded_batch([prompts[i] for i in batch], batch, recorder)
            for index, generated in zip(batch, generated_batch, strict=True):
                on_tokens(len(generated.ids))
                yield index, generated

    @torch.inference_mode()
    def _padded_batch(
        self, prompts: Sequence[list[int]], indices: Sequence[int], recorder: SignalRecorder | None
    ) -> list[_Generated]:
        config = self._generation_config()
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), int(config.pad_token_id), device=self.model.device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt, device=ids.device)
            mask[row, width - len(prompt) :] = 1
        of_tokens, criteria = _LogProbRecorder(width), StoppingCriteriaList()
        processors = LogitsProcessorList([of_tokens] if self.settings.log_probs else [])
        if self.settings.stop:
            criteria.append(StopStringCriteria(self.tokenizer, list(self.settings.stop)))
        of_steps = None if recorder is None else PaddedRecorder(recorder, indices, width)
        if of_steps is not None:
            criteria.append(OneStepAfterEnd([*self.eos_ids], width))
            processors.append(of_steps)
        out = self.model.generate(
            ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=criteria,
            custom_generate=generate_and_drop_rows,
        )
        new, log_probs = out[:, width:].tolist(), of_tokens.of(out)
        rows = [self._until_stop(*row) for row in zip(new, log_probs or [[]] * len(new), strict=True)]
        if recorder is None or of_steps is None:
            return rows
        completions = list[_Generated]()
        for index, ids, count, each in zip(indices, new, of_steps.counts.tolist(), rows, strict=True):
            signals = recorder.signals(index, self._until_end(ids[:count], self._max_steps), count)
            completions.append(replace(each, signals=signals))
        return completions

    def _until_end(self, ids: Sequence[int], limit: int | None = None) -> list[int]:
        """Return ids without what follows the end-of-text token or `limit` tokens; None: `max_new_tokens`."""
        end = next((i + 1 for i, token in enumerate(ids) if token in self.eos_ids), len(ids))
        return list(ids[: min(end, limit or self.settings.max_new_tokens)])

    def _until_stop(self, ids: list[int], log_probs: list[float]) -> _Generated:
        """Return a row of a padded batch without what follows its end-of-text token or its stop text."""
        ids = self._until_end(ids)
        if self.settings.stop and self._has_stop(ids):
            low = 1  # the fewest tokens with a stop text
            while not self._has_stop(ids[:low]):
                low += 1
            return _Generated(ids[:low], log_probs[:low], True)
        return _Generated(ids, log_probs[: len(ids)])

    def _has_stop(self, ids: list[int]) -> bool:
        return cut_at_stop(self._decode(ids), self.settings.stop) is not None

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _completion(self, request: Request, generated: _Generated) -> Completion:
        text = self._decode(generated.ids)
        cut = cut_at_stop(text, self.settings.stop) if self.settings.stop else None
        is_ended = generated.is_stopped or cut is not None or bool({*generated.ids[-1:]} & self.eos_ids)
        reason: FinishReason = "stop" if is_ended else "length"
        values = generated.log_probs
        if values and len(values) != len(generated.ids):
            raise RunError(f"transformers returned {len(values)} log-probabilities for {len(generated.ids)} tokens")
        mean = sum(values) / len(values) if values else None
        return Completion(
            request.prompt.index,
            request.sample,
            text if cut is None else cut,
            reason,
            len(generated.ids),
            mean,
            generated.signals,
        )


class _LogProbRecorder(LogitsProcessor):
    """Records the log-probability of each generated token, before temperature and top_p change the logits.

    Args:
        width: number of tokens of a padded prompt.
    """

    def __init__(self, width: int):
        self.width, self._last = width, cast(torch.Tensor | None, None)  # [N, V] log-probabilities of the next tokens
        self._rows = cast(torch.Tensor | None, None)  # [N] of the batch that are left
        self._values: list[torch.Tensor] = []  # [B] for each generated token but the last

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._rows is None:
            self._rows = self._all = torch.arange(len(scores), device=scores.device)
        self._take(input_ids)
        self._last = torch.log_softmax(scores.float(), -1)
        return scores

    def keep_rows(self, rows: torch.Tensor, input_ids: torch.Tensor) -> None:
        """Go on with some of the rows; see `FollowsRows`."""
        self._take(input_ids)
        assert self._rows is not None
        self._rows = self._rows[rows]

    def _take(self, input_ids: torch.Tensor) -> None:
        """Record the values of the newest token of each row that is left."""
        if self._last is not None and input_ids.shape[1] > self.width:
            values = self._last.new_zeros(len(self._all))
            values[self._rows] = self._last.gather(1, input_ids[:, -1:]).squeeze(1)
            self._values.append(values)
            self._last = None

    def of(self, output: torch.Tensor) -> list[list[float]]:
        """Return the log-probabilities of the new tokens of each row; [] if none were recorded.

        Args:
            output: ids [B, S] of prompts and completions.
        """
        if self._rows is None:
            return []
        self._take(output[self._rows])
        return torch.stack(self._values, 1).tolist()


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end a completion: those of the model's generation config and that of the tokenizer."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    model_ids = {ids} if isinstance(ids, int) else {*(ids or ())}
    return {int(each) for each in {*model_ids, tokenizer.eos_token_id} if each is not None}
