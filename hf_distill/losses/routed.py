"""The fused loss of target tokens that have different teachers, or losses that depend on the author of the tokens."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.logits import DenseLogits, LazyLogits, SparseLogProbs, compute_dtype, take_rows
from ..core.row_values import ORIGIN, ORIGINS
from ..core.targets import Targets, true_indices
from ..core.teacher_logits import MultiTeacherLogits, OneTeacherLogits, RoutedLogits, TeacherLogits
from ..errors import DistillError
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
    """Return the loss on the logits of a batch, see `ChunkedLoss`.

    It is a `RoutedLoss` for `RoutedLogits`, and an `OriginLoss` if a term depends on the author of the tokens.
    """
    loss: type[ChunkedLoss] = RoutedLoss if isinstance(teacher_logits, RoutedLogits) else ChunkedLoss
    if any(term.by_origin for term in terms):
        loss = OriginLoss
    return loss(
        teacher_logits,  # type: ignore[arg-type]
        targets,
        terms,
        statistics_every,
        chunk_tokens,
        num_items,
        output_type=output_type,
    )


@dataclass(frozen=True)
class TokenGroup:
    """Target tokens of a batch that have the same losses.

    logits:      logits of their teachers, for these tokens; None if no term reads them
    tokens:      [T_k] their indices among the T target tokens of the batch
    terms:       their terms; other terms of the batch are 0 for them
    is_measured: whether statistics are computed for them
    """

    logits: OneTeacherLogits | MultiTeacherLogits | None
    tokens: Tensor
    terms: Sequence[Term]
    is_measured: bool = True


class GroupedLoss(ChunkedLoss):
    """The loss on the logits of one batch whose target tokens have different losses.

    Each group of tokens has a `ChunkedLoss` of its own, and all of them add to the same gradients.

    Attributes:
        parts: (indices [T_k] of its target tokens, its loss) of each group with tokens.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        num_items = self.targets.divisor(self.num_items)
        self.parts = [(group.tokens, self._part(group, num_items)) for group in self.groups()]

    @abstractmethod
    def groups(self) -> list[TokenGroup]:
        """Return the groups, in which each target token occurs once."""

    def _part(self, group: TokenGroup, num_items: Tensor) -> ChunkedLoss:
        return ChunkedLoss(
            group.logits,
            self.targets.slice(group.tokens),
            group.terms,
            self.statistics_every if group.is_measured else 0,
            self.chunk_tokens,
            num_items,
            output_type=self.output_type,
        )

    def token_weights(self) -> Tensor | None:
        """Return the factors of the losses, grouped, see `ChunkedLoss.token_weights`."""
        return None if self.targets.weights is None else self.targets.weights[self._order()]

    def parts_of(self, student: DenseLogits | LazyLogits) -> Iterator[tuple[ChunkedLoss, DenseLogits | LazyLogits]]:
        """Yield the loss of each group with the student's logits of its target tokens."""
        for tokens, loss in self.parts:
            yield loss, take_rows(student, tokens)

    def from_hidden(self, student: LazyLogits) -> Tensor:
        """Return the objective, see `ChunkedLoss.from_hidden`."""
        return super().from_hidden(take_rows(student, self._order()))

    def from_logits(self, student: DenseLogits) -> Tensor:
        """Return the objective, see `ChunkedLoss.from_logits`."""
        return super().from_logits(take_rows(student, self._order()))

    def _order(self) -> Tensor:
        """Return the indices of the target tokens, grouped, [T]."""
        return torch.cat([tokens for tokens, _ in self.parts])

    def run_chunks(
        self,
        student_logits: DenseLogits | LazyLogits,
        on_gradient: OnGradient | None = None,
        gradient_dtype: torch.dtype | None = None,
        gradient_unit: float = 1.0,
    ) -> Tensor:
        """Compute all chunks of each group; `student_logits` are grouped, see `ChunkedLoss.run_chunks`."""
        tensor = student_logits.hidden if isinstance(student_logits, LazyLogits) else student_logits.values
        dtype, device = compute_dtype(tensor), self.targets.labels.device
        zeros = torch.zeros(len(self.targets), dtype=dtype, device=device)
        self.per_token = {name: zeros.clone() for name in self._metric_names()}
        total, start = zeros.new_zeros(()), 0
        for tokens, loss in self.parts:
            rows = slice(start, start + len(tokens))
            on_part = None if on_gradient is None else _shifted(on_gradient, start)
            part_logits = take_rows(student_logits, rows)
            total = total + loss.run_chunks(part_logits, on_part, gradient_dtype, gradient_unit)
            for name, values in loss.per_token.items():
                self.per_token[name].index_copy_(0, tokens, values)
            start = rows.stop
        return total


class RoutedLoss(GroupedLoss):
    """The loss on the logits of one batch whose target tokens have different teachers, or none.

    Tokens without a teacher have the terms that do not compare with a teacher; the others are 0 for them. A teacher
    without logits of all ids has no statistics, and its tokens do not count as measured.
    """

    teacher_logits: RoutedLogits  # type: ignore[assignment]

    def groups(self) -> list[TokenGroup]:
        """Return the target tokens of each teacher, and those without a teacher."""
        routed = self.teacher_logits
        groups = [
            TokenGroup(routed.by_teacher[name], tokens, self.terms, self._is_measured(routed.by_teacher[name]))
            for name, tokens in routed.tokens_by_teacher.items()
        ]
        terms = [term for term in self.terms if not term.loss.compares]
        return [*groups, TokenGroup(None, routed.other_tokens, terms, self._is_measured(None))]

    def _is_measured(self, logits: OneTeacherLogits | None) -> bool:
        return isinstance(logits, DenseLogits | LazyLogits) or not self.teacher_logits.any_full_logits

    def _metric_names(self) -> list[str]:
        """Return the keys of `per_token`, which must not depend on the batch: all ranks have to agree on them."""
        names = [term.name for term in self.terms]
        if self.statistics_every:
            names += self.output_type.student_metrics
            names += self.output_type.pair_metrics if self.teacher_logits.any_full_logits else ()
        return names


class OriginLoss(GroupedLoss):
    """The loss on the logits of one batch whose terms depend on the author of each target token, see `Term.by_origin`.

    `targets.numbers` has the number of target tokens of each origin.
    """

    def groups(self) -> list[TokenGroup]:
        """Return the target tokens of each origin.

        Raises:
            DistillError: the batch has no origins.
        """
        if self.targets.origins is None:
            raise DistillError(
                f"by_origin is set, and the batch has no `{ORIGIN}`: give the rows a column `{ORIGIN}` "
                f"({', '.join(ORIGINS)}; in a recipe: the key `origin` of each source), or name the sources of a "
                "mixture teacher, student or data; and set remove_unused_columns=False if another collator is used."
            )
        counts = self.targets.numbers[ORIGIN]
        groups = []
        for index, origin in enumerate(ORIGINS):
            tokens = true_indices(self.targets.origins == index, counts[index])
            terms = [term.of_origin(origin) for term in self.terms]
            groups.append(TokenGroup(_take(self.teacher_logits, tokens), tokens, terms))
        return groups


def _take(
    logits: OneTeacherLogits | MultiTeacherLogits | None, tokens: Tensor
) -> OneTeacherLogits | MultiTeacherLogits | None:
    """Return the logits of teachers for some of the target tokens."""
    if isinstance(logits, MultiTeacherLogits):
        return MultiTeacherLogits({name: _take_one(each, tokens) for name, each in logits.by_teacher.items()})
    return None if logits is None else _take_one(logits, tokens)


def _take_one(logits: OneTeacherLogits, tokens: Tensor) -> OneTeacherLogits:
    assert isinstance(logits, DenseLogits | LazyLogits | SparseLogProbs)  # by_origin needs one tokenizer
    return take_rows(logits, tokens)


def _shifted(on_gradient: OnGradient, start: int) -> Callable[[slice, Tensor], None]:
    """Return `on_gradient` for rows that count from `start`."""
    return lambda rows, gradient: on_gradient(slice(rows.start + start, rows.stop + start), gradient)
