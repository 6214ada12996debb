"""What of a step was not finite: which terms, of which examples, at which tokens; and losses that leap."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..cache.example_keys import batch_examples
from ..core.targets import Targets
from ..models.finite_weights import first_nonfinite
from ..teachers.state import local_shard

_SHOWN = 20  # places and parameters that are told; the rest is counted


@dataclass(frozen=True)
class MicroBatchRecord:
    """A micro-batch of a step that is not taken yet.

    inputs:    the collator's batch
    targets:   its T asked tokens
    per_token: terms -> [T]
    """

    inputs: Mapping[str, Any]
    targets: Targets
    per_token: Mapping[str, Tensor]


@dataclass(frozen=True)
class NonFiniteToken:
    """An asked token whose loss is not finite.

    rank, micro_batch, row: where it was in the step, counted from 0
    example:  its key, see `cache.examples`: the same in every epoch, order and run
    position: in its row
    token:    the id that was to be predicted
    text:     of the token, where there is a tokenizer
    values:   term -> its loss there
    """

    rank: int
    micro_batch: int
    row: int
    example: str
    position: int
    token: int
    text: str
    values: dict[str, str]


@dataclass(frozen=True)
class NonFiniteReport:
    """What was not finite in a step.

    step:       that would have been taken, counted from 1
    loss:       whether the loss is finite on all ranks
    count:      asked tokens whose loss is not finite
    of:         asked tokens
    terms:      terms that are not finite there, and `finite` those that are
    places:     the first of the tokens
    parameters: the first of the parameters whose gradient is not finite; none where clipping hid which
    """

    step: int
    loss: bool
    count: int
    of: int
    terms: list[str]
    finite: list[str]
    places: list[NonFiniteToken]
    parameters: list[str]

    def __str__(self) -> str:
        if not self.count:
            named = f" ({', '.join(self.parameters[:3])})" if self.parameters else ""
            if self.loss:
                return f"every loss is finite, the gradient is not{named}"
            return f"the loss is not finite, though no token's terms tell why (a loss of the model's own?){named}"
        first = self.places[0]
        told = f"{', '.join(self.terms)}: not finite for {self.count} of {self.of} tokens"
        text = f" {first.text!r}" if first.text else ""
        told += f"; first for token {first.token}{text} at position {first.position} of example {first.example}"
        told += f" (rank {first.rank}, micro-batch {first.micro_batch}, row {first.row})"
        if self.finite:
            told += f"; {', '.join(self.finite)} {'is' if len(self.finite) == 1 else 'are'} finite there"
        return told

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def locate_nonfinite_tokens(
    seen: Iterable[MicroBatchRecord], rank: int, text: Callable[[int], str]
) -> tuple[list[NonFiniteToken], int, int]:
    """The asked tokens of a step's micro-batches that are not finite: the first of them, their number, all asked.

    Args:
        seen: the micro-batches.
        rank: of this process.
        text: of a token.
    """
    places: list[NonFiniteToken] = []
    count = asked = 0
    for number, part in enumerate(seen):
        asked += len(part.targets)
        values = {name: value for name, value in part.per_token.items() if value.shape == part.targets.labels.shape}
        bad = torch.zeros(len(part.targets), dtype=torch.bool, device=part.targets.labels.device)
        for value in values.values():
            bad |= ~value.isfinite()
        where = bad.nonzero().squeeze(1).tolist()
        count += len(where)
        examples = batch_examples(dict(part.inputs), part.targets) if where else []
        width = part.targets.shape[1] if len(part.targets.shape) > 1 else 1
        for t in where[: _SHOWN - len(places)]:
            key = next((e.key.hex() for e in examples if e.asked.start <= t < e.asked.stop), "")
            token, position = int(part.targets.labels[t]), int(part.targets.positions[t]) % width
            row = int(part.targets.rows[t])
            told = {name: str(float(value[t])) for name, value in values.items()}
            places.append(NonFiniteToken(rank, number, row, key, position, token, text(token), told))
    return places, count, asked


def merge_reports(
    step: int, loss: bool, ranks: Iterable[tuple[list[NonFiniteToken], int, int]], parameters: list[str]
) -> NonFiniteReport:
    """What was found on all ranks, as one.

    Args:
        step: that would have been taken.
        loss: whether it is finite on all of them.
        ranks: of each rank, what `places_of` says.
        parameters: names of those whose gradient is not finite.
    """
    ranks = list(ranks)
    places = [place for of_rank, _, _ in ranks for place in of_rank][:_SHOWN]
    values = [place.values for place in places]
    names = list(values[0]) if values else []
    terms = [name for name in names if any(not math.isfinite(float(v[name])) for v in values)]
    finite = [name for name in names if name not in terms]
    count, asked = sum(count for _, count, _ in ranks), sum(asked for *_, asked in ranks)
    return NonFiniteReport(step, loss, count, asked, terms, finite, places, parameters[:_SHOWN])


class LossSpikeDetector:
    """Losses far above those before them: by eight times the spread that the last hundred had, and by a tenth.

    The spread is 1.4826 times the median distance from the median, which leaps themselves do not widen.
    """

    def __init__(self) -> None:
        self._before: deque[float] = deque(maxlen=100)

    def update(self, loss: float) -> float | None:
        """Take the next step's loss; the median that it leapt from. None: it did not, or is among the first 20."""
        before, middle = self._before, None
        if not math.isfinite(loss):
            return None
        if len(before) >= 20:
            middle = median(before)
            spread = 1.4826 * median(abs(value - middle) for value in before)
            if loss - middle <= max(8 * spread, 0.1 * abs(middle)):
                middle = None
        before.append(loss)
        return middle


def nonfinite_weight(model: nn.Module) -> str | None:
    """The first parameter with a NaN or an infinity, or saved buffer with a NaN; None: there is none on this rank.

    Args:
        model: whole or sharded (ZeRO-3, FSDP2); quantised weights are passed over.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):  # FSDP2 leaves some weights gathered after a forward without a backward
            module.reshard()
    parameters = {name: local_shard(p) for name, p in model.named_parameters()}
    return first_nonfinite(parameters, dict(_saved_buffers(model)))


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", local_shard(buffer)
