"""Records what the teacher predicts while it generates, with continuous batching or in padded batches.

`SignalRecorder` has a place for each token that a part may generate, on the model's device. Every step writes the
distributions of its tokens into their places, so that nothing is read from the device before the end of the part, and
the writes can be part of a CUDA graph.

The training adds an end-of-text token to a completion that was cut off, and a chat template may add a token after the
end-of-text token. Their distributions are recorded too: a completion that reaches the largest number of tokens is
followed by the end-of-text token, and every completion by one more step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria
from transformers.generation.continuous_batching import ContinuousBatchingManager, RequestState, RequestStatus
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

from ...errors import DistillError
from ...teachers.remote.api import RowTensors
from ..token_signals import HIDDEN, IDS, LOG_PROBS, Capture, TokenSignals, top_k_values

STEPS_AFTER_END = 2  # of a completion that is cut off: the end-of-text token, and one more step


class SignalRecorder:
    """The distributions of all tokens of a part.

    Args:
        model: the model.
        capture: what is recorded.
        prompts: token ids of the prompts.
        steps: largest number of steps of a prompt, with those after the end.
        end_id: the end-of-text token; None if there is none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capture: Capture,
        prompts: Sequence[list[int]],
        steps: int,
        end_id: int | None = None,
    ):
        self.capture, self.prompts, self.steps, self.end_id = capture, prompts, steps, end_id
        self.unused = len(prompts) * steps  # the place of tokens that are not recorded
        head = cast(nn.Module, model.get_output_embeddings())
        vocab_size, width = cast(Tensor, head.weight).shape
        size, device = self.unused + 1, model.device
        self._head, self._hidden = head, cast(Tensor | None, None)
        self._values: RowTensors
        if capture.values == "hidden":
            self._values = {HIDDEN: torch.empty(size, width, dtype=model.dtype, device=device)}
        else:
            k = min(capture.k, vocab_size)
            self._values = {
                IDS: torch.empty(size, k, dtype=torch.int32, device=device),
                LOG_PROBS: torch.empty(size, k, device=device),
            }

    @contextmanager
    def watch_head(self) -> Iterator[None]:
        """Keep the input of the output head of each forward while the block runs."""
        if self.capture.values != "hidden":
            yield
            return

        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._hidden = arguments[0]

        hook = self._head.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def record(self, logits: Tensor, places: Tensor) -> None:
        """Record the distributions of some tokens.

        Args:
            logits: [N, V], at temperature 1.
            places: [N] place of each token; `place` gives it.
        """
        if self.capture.values == "hidden":
            assert self._hidden is not None
            hidden = self._hidden[:, -1] if len(self._hidden) == len(logits) else self._hidden[0]
            if len(hidden) != len(logits):
                raise DistillError("the model computes logits of all tokens, so that hidden states cannot be recorded")
            values = {HIDDEN: hidden}
        else:
            values = top_k_values(logits, self.capture.k, self.capture.temperature)
        for name, tensor in values.items():
            buffer = self._values[name]
            buffer.index_copy_(0, places.to(buffer.device).long(), tensor.to(buffer.device, buffer.dtype))

    def place(self, index: int, number: int) -> int:
        """Return the place of token `number` after prompt `index`."""
        return index * self.steps + number if 0 <= number < self.steps else self.unused

    def force_end(self, logits: Tensor, places: Tensor) -> Tensor:
        """Return the logits [N, V], which are those of the end-of-text token alone after a completion that is cut off.

        Args:
            logits: [N, V].
            places: [N] place of each token; `place` gives it.
        """
        is_cut = places.to(logits.device) % self.steps == self.steps - STEPS_AFTER_END
        if self.end_id is None or (logits.device.type == "cpu" and not is_cut.any()):
            return logits
        is_other = torch.arange(logits.shape[-1], device=logits.device) != self.end_id
        return logits.masked_fill(is_cut[:, None] & is_other, -torch.inf)

    def signals(self, index: int, tokens: Sequence[int], count: int) -> TokenSignals:
        """Return the distributions after a prompt, on the CPU.

        Args:
            index: index of the prompt.
            tokens: token ids that were generated, until the end-of-text token.
            count: number of steps.
        """
        start = self.place(index, 0)
        end = start + min(count, len(tokens) + 1)
        values = {name: tensor[start:end].cpu().clone() for name, tensor in self._values.items()}
        return TokenSignals(self.prompts[index], tokens, values)


class PaddedRecorder(LogitsProcessor):
    """Records the steps of a padded batch.

    Args:
        recorder: receives the distributions.
        indices: indices of the prompts of the batch.
        width: number of tokens of a padded prompt.
    """

    def __init__(self, recorder: SignalRecorder, indices: Sequence[int], width: int):
        self._recorder, self._width = recorder, width
        self._rows = torch.arange(len(indices))  # of the batch that are left
        self._first = torch.tensor([recorder.place(index, 0) for index in indices])
        self.counts = torch.zeros(len(indices), dtype=torch.long)  # [B] recorded distributions of each row

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Record the distributions of a step, and return the logits [N, V]; see `SignalRecorder.force_end`."""
        number = input_ids.shape[1] - self._width
        places = self._first[self._rows] + number
        self._recorder.record(scores.float(), places)
        self.counts[self._rows] = number + 1
        return self._recorder.force_end(scores, places)

    def keep_rows(self, rows: Tensor, input_ids: Tensor) -> None:
        """Go on with some of the rows; see `FollowsRows`."""
        self._rows = self._rows[rows.cpu()]


class OneStepAfterEnd(StoppingCriteria):
    """Ends a row of a padded batch one step after its end-of-text token, whose next distribution is then known.

    Args:
        end_ids: the end-of-text ids.
        width: number of tokens of a padded prompt.
    """

    def __init__(self, end_ids: Sequence[int], width: int):
        self._end_ids, self._width = torch.tensor(sorted(end_ids)), width

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """Return which rows have ended, [B]."""
        if input_ids.shape[1] < self._width + 2:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return torch.isin(input_ids[:, -2], self._end_ids.to(input_ids.device))


@dataclass
class RequestWithOneMoreStep(RequestState):
    """A request of continuous batching that ends one step after its end-of-text token; see `OneStepAfterEnd`."""

    end_ids: frozenset[int] = frozenset()

    def update_and_check_completion(self, token_id: int, logprob: float | None) -> bool:
        """Add a token, and return whether the request has ended."""
        is_one_more = bool(self.generated_tokens) and self.generated_tokens[-1] in self.end_ids
        if not super().update_and_check_completion(token_id, logprob) and is_one_more:
            self.status = RequestStatus.FINISHED
        return bool(self.status == RequestStatus.FINISHED)


class ContinuousRecorder(ContinuousBatchingLogitsProcessor):
    """Records the steps of continuous batching: the argument of a token is its place.

    Args:
        recorder: receives the distributions.
        indices: name of a request -> index of its prompt.
        max_tokens: largest number of tokens of a step whose distributions are computed.
    """

    def __init__(self, recorder: SignalRecorder, indices: dict[str, int], max_tokens: int):
        self.supported_kwargs: dict[str, type] = {}
        self.ignored_kwargs: tuple[str, ...] = ()
        self._recorder, self._indices, self._max_tokens = recorder, indices, max_tokens

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Set the places of tokens without a request."""
        int32_tensor.fill_(self._recorder.unused)

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """Return the places of the tokens that the requests generate in the next step, then those of padding."""
        places = torch.full((self._max_tokens,), self._recorder.unused, dtype=torch.int32)
        for row, request in enumerate(requests_with_new_token):
            index = self._indices.get(request.state.request_id)
            if index is not None:  # a request that warms up has no prompt
                number = request.state.position_offset - len(self._recorder.prompts[index])
                places[row] = self._recorder.place(index, number)
        return places

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Record the distributions, and return the logits; see `SignalRecorder.force_end`."""
        places = tensor_arg[: len(scores)]
        self._recorder.record(scores, places)
        return self._recorder.force_end(scores, places)


def record_requests(manager: ContinuousBatchingManager, recorder: SignalRecorder, indices: dict[str, int]) -> None:
    """Make continuous batching record its steps, before temperature and top-p change the logits."""
    processors = manager.logit_processor
    max_tokens = cast(int, manager.continuous_batching_config.max_requests_per_batch)
    first = ContinuousRecorder(recorder, indices, max_tokens)
    recording = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([first, *processors.logits_processor]))
    recording.tensors_required = processors.tensors_required + 1
    manager.logit_processor = recording
