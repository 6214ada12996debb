"""Reports of a step whose loss or gradient is not finite, and detection of loss spikes.

A report names the terms, examples and tokens whose loss is not finite, and the parameters whose gradient is not.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import Tensor, nn

from ..cache.example_keys import batch_examples
from ..core.targets import Targets
from ..models.finite_weights import first_nonfinite
from ..models.sharding import local_shard, reshard

_MAX_REPORTED = 20  # tokens and parameters that a report lists; further tokens are only counted


@dataclass(frozen=True)
class MicroBatchRecord:
    """A micro-batch of the current step, kept until the optimizer step is applied or skipped.

    inputs:    the batch of the collator
    targets:   its T target tokens
    per_token: name of a term -> its losses [T]
    """

    inputs: Mapping[str, Tensor]
    targets: Targets
    per_token: Mapping[str, Tensor]


@dataclass(frozen=True)
class NonFiniteToken:
    """A target token whose loss is not finite.

    rank, micro_batch, row: where it was in the step, counted from 0
    example:  key of its example (see `cache.example_keys`), the same in every epoch, order and run
    position: its position in the row
    token:    the label, a token id; None if the label is no id
    text:     the decoded token; empty without a tokenizer
    values:   name of a term -> its loss for this token
    """

    rank: int
    micro_batch: int
    row: int
    example: str
    position: int
    token: int | None
    text: str
    values: dict[str, str]


@dataclass(frozen=True)
class NonFiniteReport:
    """The losses and gradients of a step that are not finite.

    step:                 number of the optimizer step, counted from 1
    is_loss_finite:       whether the loss is finite on all ranks
    num_nonfinite_tokens: number of target tokens whose loss is not finite
    num_tokens:           number of target tokens
    nonfinite_terms:      terms that are not finite for these tokens
    finite_terms:         terms that are finite for them
    tokens:               the first of these tokens
    parameters:           the first parameters whose gradient is not finite; empty if clipping made all gradients NaN
    """

    step: int
    is_loss_finite: bool
    num_nonfinite_tokens: int
    num_tokens: int
    nonfinite_terms: list[str]
    finite_terms: list[str]
    tokens: list[NonFiniteToken]
    parameters: list[str]

    def __str__(self) -> str:
        if not self.num_nonfinite_tokens:
            names = f" ({', '.join(self.parameters[:3])})" if self.parameters else ""
            if self.is_loss_finite:
                return f"every loss is finite, but the gradient is not{names}"
            return f"the loss is not finite, but all terms are (does the model's forward add a loss?){names}"
        first = self.tokens[0]
        message = (
            f"{', '.join(self.nonfinite_terms)}: not finite for {self.num_nonfinite_tokens} of {self.num_tokens} tokens"
        )
        text = f" {first.text!r}" if first.text else ""
        token = "" if first.token is None else f"token {first.token}{text} at position {first.position} of "
        message += f"; first for {token}example {first.example}"
        message += f" (rank {first.rank}, micro-batch {first.micro_batch}, row {first.row})"
        if self.finite_terms:
            message += f"; {', '.join(self.finite_terms)} {'is' if len(self.finite_terms) == 1 else 'are'} finite there"
        return message

    def as_dict(self) -> dict[str, object]:
        """Return the report as JSON values."""
        return asdict(self)


def locate_nonfinite_tokens(
    micro_batches: Iterable[MicroBatchRecord], rank: int, decode: Callable[[int], str]
) -> tuple[list[NonFiniteToken], int, int]:
    """Find the target tokens of a step whose loss is not finite.

    Args:
        micro_batches: the micro-batches of the step on this rank.
        rank: the rank of this process.
        decode: returns the text of a token id.

    Returns:
        the first of these tokens, the number of all of them, and the number of target tokens.
    """
    tokens: list[NonFiniteToken] = []
    num_nonfinite = num_tokens = 0
    for number, micro_batch in enumerate(micro_batches):
        targets = micro_batch.targets
        num_tokens += len(targets)
        values = {name: value for name, value in micro_batch.per_token.items() if value.shape == (len(targets),)}
        is_nonfinite = torch.zeros(len(targets), dtype=torch.bool, device=targets.labels.device)
        for value in values.values():
            is_nonfinite |= ~value.isfinite()
        indices = is_nonfinite.nonzero().squeeze(1).tolist()
        num_nonfinite += len(indices)
        examples = batch_examples(dict(micro_batch.inputs), targets) if indices else []
        width = targets.shape[1] if len(targets.shape) > 1 else 1
        for t in indices[: _MAX_REPORTED - len(tokens)]:
            key = next((e.key.hex() for e in examples if e.target_slice.start <= t < e.target_slice.stop), "")
            token = int(targets.labels[t]) if targets.has_ids else None
            position = int(targets.positions[t]) % width
            row = int(targets.batch_rows[t])
            losses = {name: str(float(value[t])) for name, value in values.items()}
            tokens.append(
                NonFiniteToken(rank, number, row, key, position, token, "" if token is None else decode(token), losses)
            )
    return tokens, num_nonfinite, num_tokens


def merge_reports(
    step: int, is_loss_finite: bool, ranks: Iterable[tuple[list[NonFiniteToken], int, int]], parameters: list[str]
) -> NonFiniteReport:
    """Merge the results of all ranks into one report.

    Args:
        step: number of the optimizer step, counted from 1.
        is_loss_finite: whether the loss is finite on all ranks.
        ranks: the result of `locate_nonfinite_tokens` on each rank.
        parameters: names of the parameters whose gradient is not finite.
    """
    ranks = list(ranks)
    reported_tokens = [token for tokens, _, _ in ranks for token in tokens][:_MAX_REPORTED]
    values = [token.values for token in reported_tokens]
    names = list(values[0]) if values else []
    nonfinite_terms = [name for name in names if any(not math.isfinite(float(losses[name])) for losses in values)]
    finite_terms = [name for name in names if name not in nonfinite_terms]
    return NonFiniteReport(
        step,
        is_loss_finite,
        sum(num_nonfinite for _, num_nonfinite, _ in ranks),
        sum(num_tokens for *_, num_tokens in ranks),
        nonfinite_terms,
        finite_terms,
        reported_tokens,
        parameters[:_MAX_REPORTED],
    )


class LossSpikeDetector:
    """Detects loss spikes: losses that are far above the median of the last 100.

    loss - median > max(8 * 1.4826 * MAD, 0.1 * |median|), with MAD = median(|loss_i - median|), which spikes themselves
    do not change much.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=100)

    def update(self, loss: float) -> float | None:
        """Add the loss of the next step.

        Returns:
            the median of the losses before it if the loss is a spike; None if it is not, or is one of the first 20.
        """
        if not math.isfinite(loss):
            return None
        median_before = None
        if len(self._losses) >= 20:
            median_before = median(self._losses)
            spread = 1.4826 * median(abs(value - median_before) for value in self._losses)
            if loss - median_before <= max(8 * spread, 0.1 * abs(median_before)):
                median_before = None
        self._losses.append(loss)
        return median_before


def nonfinite_weight(model: nn.Module) -> str | None:
    """Return the name of the first parameter with a NaN or an infinity, or of the first saved buffer with a NaN.

    Args:
        model: the model, unsharded or sharded (ZeRO-3, FSDP2); quantized weights are not checked.

    Returns:
        the name; None if there is none on this rank.
    """
    reshard(model)
    parameters = {name: local_shard(parameter) for name, parameter in model.named_parameters()}
    return first_nonfinite(parameters, dict(_saved_buffers(model)))


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", local_shard(buffer)
