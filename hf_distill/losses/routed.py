"""The fused loss of several teachers, each of which teaches some of the target tokens."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..core.logits import DenseLogits, LazyLogits, compute_dtype, take_rows
from ..core.targets import Targets
from ..core.teacher_logits import OneTeacherLogits, RoutedLogits, TeacherLogits
from .fused import ChunkedLoss, OnGradient
from .objective import Term
from .output_types import DISTRIBUTION_OUTPUTS, OutputType


def loss_on_logits(
    teacher_logits: TeacherLogits | None,
    targets: Targets,
    terms: Sequence[Term],
    statistics_every: int = 0,
    chunk_tokens: int | None = None,
    num_items: Tensor | int | None = None,
    output_type: OutputType = DISTRIBUTION_OUTPUTS,
) -> ChunkedLoss:
    """Return the loss on the logits of a batch, see `ChunkedLoss`; a `RoutedLoss` for `RoutedLogits`."""
    loss: type[ChunkedLoss] = RoutedLoss if isinstance(teacher_logits, RoutedLogits) else ChunkedLoss
    return loss(
        teacher_logits,  # type: ignore[arg-type]
        targets,
        terms,
        statistics_every,
        chunk_tokens,
        num_items,
        output_type=output_type,
    )


class RoutedLoss(ChunkedLoss):
    """The loss on the logits of one batch whose target tokens have different teachers, or none.

    The target tokens are grouped by teacher. Each group has a `ChunkedLoss` of its own, and all of them add to the same
    gradients. Tokens without a teacher have the terms that do not compare with a teacher; the others are 0 for them. A
    teacher without logits of all ids has no statistics, and its tokens do not count as measured.

    Attributes:
        parts: (teacher's name or None, indices [T_k] of its target tokens, its loss) of each group with tokens.
    """

    teacher_logits: RoutedLogits  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        routed, num_items = self.teacher_logits, self.targets.divisor(self.num_items)
        self.parts: list[tuple[str | None, Tensor, ChunkedLoss]] = []
        for name, tokens in routed.tokens_by_teacher.items():
            loss = self._part(routed.by_teacher[name], tokens, self.terms, num_items)
            self.parts.append((name, tokens, loss))
        terms = [term for term in self.terms if not term.loss.compares]
        self.parts.append((None, routed.other_tokens, self._part(None, routed.other_tokens, terms, num_items)))

    def _part(
        self,
        logits: OneTeacherLogits | None,
        tokens: Tensor,
        terms: Sequence[Term],
        num_items: Tensor,
    ) -> ChunkedLoss:
        is_measured = isinstance(logits, DenseLogits | LazyLogits) or not self.teacher_logits.any_full_logits
        statistics_every = self.statistics_every if is_measured else 0
        targets = self.targets.slice(tokens)
        return ChunkedLoss(
            logits, targets, terms, statistics_every, self.chunk_tokens, num_items, output_type=self.output_type
        )

    def parts_of(self, student: DenseLogits | LazyLogits) -> Iterator[tuple[ChunkedLoss, DenseLogits | LazyLogits]]:
        """Yield the loss of each group with the student's logits of its target tokens."""
        for _, tokens, loss in self.parts:
            yield loss, take_rows(student, tokens)

    def from_hidden(self, student: LazyLogits) -> Tensor:
        """Return the objective, see `ChunkedLoss.from_hidden`."""
        return super().from_hidden(take_rows(student, self._order()))

    def from_logits(self, student: DenseLogits) -> Tensor:
        """Return the objective, see `ChunkedLoss.from_logits`."""
        return super().from_logits(take_rows(student, self._order()))

    def _order(self) -> Tensor:
        """Return the indices of the target tokens, grouped by teacher, [T]."""
        return torch.cat([tokens for _, tokens, _ in self.parts])

    def run_chunks(
        self,
        student_logits: DenseLogits | LazyLogits,
        on_gradient: OnGradient | None = None,
        gradient_dtype: torch.dtype | None = None,
        gradient_unit: float = 1.0,
    ) -> Tensor:
        """Compute all chunks of each group; `student_logits` are grouped by teacher, see `ChunkedLoss.run_chunks`."""
        tensor = student_logits.hidden if isinstance(student_logits, LazyLogits) else student_logits.values
        dtype, device = compute_dtype(tensor), self.targets.labels.device
        zeros = torch.zeros(len(self.targets), dtype=dtype, device=device)
        self.per_token = {name: zeros.clone() for name in self._metric_names()}
        total, start = zeros.new_zeros(()), 0
        for _, tokens, loss in self.parts:
            rows = slice(start, start + len(tokens))
            on_part = None if on_gradient is None else _shifted(on_gradient, start)
            part_logits = take_rows(student_logits, rows)
            total = total + loss.run_chunks(part_logits, on_part, gradient_dtype, gradient_unit)
            for name, values in loss.per_token.items():
                self.per_token[name].index_copy_(0, tokens, values)
            start = rows.stop
        return total

    def _metric_names(self) -> list[str]:
        """Return the keys of `per_token`, which must not depend on the batch: all ranks have to agree on them."""
        names = [term.name for term in self.terms]
        if self.statistics_every:
            names += self.output_type.student_metrics
            names += self.output_type.pair_metrics if self.teacher_logits.any_full_logits else ()
        return names


def _shifted(on_gradient: OnGradient, start: int) -> Callable[[slice, Tensor], None]:
    """Return `on_gradient` for rows that count from `start`."""
    return lambda rows, gradient: on_gradient(slice(rows.start + start, rows.stop + start), gradient)
