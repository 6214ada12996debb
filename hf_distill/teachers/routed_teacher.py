"""`RoutedTeacher`: several teachers, each of which teaches the rows of its own data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.signals import FeatureKey, Signals
from ..core.targets import TEACHER_INDEX, FeatureTokens, Targets, target_labels, true_indices
from ..core.teacher_logits import RoutedLogits
from ..data.teacher_column import COLUMN, NO_TEACHER
from ..errors import DistillError, did_you_mean, raise_if_any
from ..losses.objective import Term
from ..models.sharding import is_sharded
from .base import Teacher
from .frozen import FrozenTeacher
from .group import TeacherGroup
from .multi_view.teacher import MultiViewTeacher
from .trainable import TrainableTeacher

_TARGET_COUNTS, _ROW_COUNTS = "routed_target_tokens", "routed_rows"


class RoutedTeacher(TeacherGroup):
    """Several teachers, one for each row of the data, such as one for mathematics and one for conversations.

    L = alpha * T^2 * divergence(teacher of the row || student) + (1 - alpha) * cross entropy

    Each teacher runs on its own rows only, so a step costs as much as the rows of each teacher together. A row without
    a teacher has the term (1 - alpha) * cross entropy; the number of its target tokens is logged as
    `tokens_without_teacher`. Losses of each teacher are logged as `soft_loss_teacher_NAME`.

    Without `sources`, the column `teacher` of the data holds the name of each row's teacher; "" or None is no teacher.
    With `sources`, rows are routed by the source of a data mixture that they are from.

    Args:
        teachers: name -> a `Teacher`, a model, or the path or id of a model; two or more, or one with `sources`.
        sources: name of a teacher -> names of its sources; None routes by the column `teacher`.

    Raises:
        DistillError: a source has two teachers, or a teacher cannot be routed; the message lists all problems.
    """

    kind = "routed"
    any_output_type = False
    reads_text_only = True

    def __init__(self, teachers: Mapping[str, Any], sources: Mapping[str, Sequence[str]] | None = None):
        super().__init__(
            {
                name: teacher if isinstance(teacher, Teacher) else FrozenTeacher(teacher)
                for name, teacher in teachers.items()
            }
        )
        raise_if_any(_validate(self.teachers, sources))
        self.sources = None if sources is None else {name: tuple(sources[name]) for name in self.teachers}
        self._tokens_without_teacher = 0
        self._teacher_of_source: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the teachers, in the order of their indices."""
        return tuple(self.teachers)

    def input_names(self) -> frozenset[str]:
        """Names of the inputs of any teacher, and of the columns that route the rows."""
        return super().input_names() | {"source" if self.sources else COLUMN, TEACHER_INDEX}

    def _context_length(self) -> None:
        """Return no limit: a long row may be that of a teacher that can read it."""

    def teacher_index(self, source: Tensor | None, source_names: Sequence[str]) -> Tensor:
        """Return the index of the teacher of each token, -1 for none, for rows that are routed by source.

        Args:
            source: [B, S] indices of the sources.
            source_names: names of the sources, by index.

        Raises:
            DistillError: the batch has no sources, or a source of a teacher is not one of the data.
        """
        assert self.sources is not None
        if source is None or not source_names:
            raise DistillError(
                "The teachers have sources, but the batches have no column `source`, or the collator has no `sources` "
                "(their names): use a data mixture with several sources, or a column `teacher` with the names of the "
                "teachers."
            )
        if self._teacher_of_source is None or len(self._teacher_of_source) != len(source_names):
            self._check_sources(source_names)
            teachers = {name: i for i, names in enumerate(self.sources.values()) for name in names}
            self._teacher_of_source = torch.tensor([teachers.get(name, NO_TEACHER) for name in source_names])
        self._teacher_of_source = self._teacher_of_source.to(source.device)
        return self._teacher_of_source[source]

    def _check_sources(self, source_names: Sequence[str]) -> None:
        """Check that every source of a teacher is one of the data."""
        raise_if_any(
            [
                f"the teacher {name} has the source {source!r}, which the data does not have"
                f"{did_you_mean(source, source_names)}"
                for name, sources in (self.sources or {}).items()
                for source in sources
                if source not in source_names
            ]
        )

    def numbers_to_read(self, inputs: dict, shift: bool) -> dict[str, Tensor]:
        """Return the counts of target tokens and rows (packed: tokens) of each teacher, and what the teachers read."""
        index = _index_of(inputs)
        is_target = target_labels(inputs, shift) != -100
        teacher_of_target = index.reshape(index.shape + (1,) * (is_target.dim() - index.dim())).expand_as(is_target)
        teacher_of_row = index[0] if _is_packed(inputs) else index.flatten(1)[:, 0] if index.dim() > 1 else index
        teachers = range(len(self.teachers))
        targets = [(is_target & (teacher_of_target == i)).sum() for i in (*teachers, NO_TEACHER)]
        numbers = [teacher.numbers_of_any_rows(inputs, shift) for teacher in self.teachers.values()]
        return {name: number for each in numbers for name, number in each.items()} | {
            _TARGET_COUNTS: torch.stack(targets),
            _ROW_COUNTS: torch.stack([(teacher_of_row == i).sum() for i in teachers]),
        }

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Run each teacher on its rows."""
        logits: dict[str, Any] = {}
        tokens_by_teacher: dict[str, Tensor] = {}
        for name, tokens, part_inputs, part_targets in self._parts(inputs, targets):
            signals = self.teachers[name](part_inputs, part_targets, {})
            if len(part_targets):
                logits[name], tokens_by_teacher[name] = signals.logits, tokens
        num_others = targets.numbers[_TARGET_COUNTS][-1]
        self._tokens_without_teacher += num_others
        others = true_indices(_index_of_targets(inputs, targets) == NO_TEACHER, num_others)
        return Signals(RoutedLogits(logits, tokens_by_teacher, others, self.has_full_logits))

    def start_batch(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> None:
        """Announce its rows to every teacher that starts early."""
        for name, _, part_inputs, part_targets in self._parts(inputs, targets):
            if self.teachers[name].prefetch:
                self.teachers[name].start_batch(part_inputs, part_targets, {})

    def _parts(self, inputs: dict, targets: Targets) -> Iterator[tuple[str, Tensor, dict, Targets]]:
        """Yield name, indices of the target tokens [T_k], inputs and target tokens of each teacher that has to run."""
        index, counts = _index_of(inputs), targets.numbers[_TARGET_COUNTS]
        teacher_of_token = _index_of_targets(inputs, targets)
        inputs = {name: value for name, value in inputs.items() if name != TEACHER_INDEX}
        for i, (name, teacher) in enumerate(self.teachers.items()):
            if not counts[i] and not (isinstance(teacher.model, nn.Module) and is_sharded(teacher.model)):
                continue
            tokens = true_indices(teacher_of_token == i, counts[i])
            part = _packed_part if _is_packed(inputs) else _rows_part
            yield name, tokens, *part(inputs, targets, tokens, index, i, targets.numbers[_ROW_COUNTS][i])

    def incompatible_terms(self, terms: Sequence[Term], name: str | None) -> list[str]:
        """Return why terms do not work with one of the teachers, or need features, which routed teachers lack."""
        problems = [
            f"{term.name} compares features, which teachers of single rows do not return: remove it from `losses`"
            for term in terms
            if term.loss.compares and term.loss.feature
        ]
        soft = [term for term in terms if not term.loss.feature]
        return problems + [
            f"{teacher_name}: {why}"
            for teacher_name, teacher in self.teachers.items()
            for why in teacher.incompatible_terms(soft, None)
        ]

    def metrics(self) -> dict[str, float]:
        """Return the metrics of every teacher, and `tokens_without_teacher` of this process since the last log."""
        count, self._tokens_without_teacher = self._tokens_without_teacher, 0
        return super().metrics() | {"tokens_without_teacher": float(count)}


def _index_of(inputs: Mapping[str, Any]) -> Tensor:
    """Return the index of the teacher of each row [B] or token [B, S] of a batch.

    Raises:
        DistillError: the batch has none.
    """
    index = inputs.get(TEACHER_INDEX)
    if index is None:
        raise DistillError(
            "The batch does not say which teacher its rows have: add a column `teacher` with the name of a teacher to "
            "the data, and set remove_unused_columns=False if another collator is used; or give the teachers `sources`."
        )
    return index


def _index_of_targets(inputs: Mapping[str, Any], targets: Targets) -> Tensor:
    """Return the index of the teacher of each target token, [T]."""
    return targets.gather_by_row(_index_of(inputs))


def _is_packed(inputs: Mapping[str, Any]) -> bool:
    """Whether the batch is one row of packed documents."""
    ids = inputs.get("input_ids")
    return ids is not None and len(ids) == 1 and "position_ids" in inputs and "attention_mask" not in inputs


def _rows_part(
    inputs: dict, targets: Targets, tokens: Tensor, index: Tensor, teacher: int, num_rows: int
) -> tuple[dict, Targets]:
    """Return the rows of one teacher, and their target tokens.

    Args:
        inputs: the batch.
        targets: its target tokens.
        tokens: [T_k] indices of those of the teacher.
        index: [B] or [B, S] teacher of each row.
        teacher: index of the teacher.
        num_rows: number of its rows; with none, the first row is used, so that all ranks run a sharded teacher.
    """
    batch_size = targets.shape[0]
    is_routed = (index.flatten(1)[:, 0] if index.dim() > 1 else index) == teacher
    if num_rows == 0:
        is_routed = torch.arange(batch_size, device=is_routed.device) == 0
    rows = true_indices(is_routed, max(num_rows, 1))
    part = {
        name: value[rows] if isinstance(value, Tensor) and value.shape[:1] == (batch_size,) else value
        for name, value in inputs.items()
    }
    new_row = is_routed.long().cumsum(0) - 1
    batch_rows = new_row[targets.batch_rows[tokens]]
    width = targets.shape[1] if len(targets.shape) > 1 else 1
    positions = batch_rows * width + targets.positions[tokens] % width
    shape = torch.Size((len(rows), *targets.shape[1:]))
    return part, _part_of(targets, tokens, positions, batch_rows, shape)


def _packed_part(
    inputs: dict, targets: Targets, tokens: Tensor, index: Tensor, teacher: int, num_tokens: int
) -> tuple[dict, Targets]:
    """Return the packed documents of one teacher, and their target tokens; see `_rows_part`."""
    width = targets.shape[1]
    is_routed = index[0] == teacher
    if num_tokens == 0:
        is_routed = torch.arange(width, device=is_routed.device) == 0
    columns = true_indices(is_routed, max(num_tokens, 1))
    lengths = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # of the documents of all teachers
    part = {
        name: value[:, columns] if isinstance(value, Tensor) and value.shape[:2] == (1, width) else value
        for name, value in inputs.items()
        if name not in lengths
    }
    positions = (is_routed.long().cumsum(0) - 1)[targets.positions[tokens]]
    shape = torch.Size((1, len(columns)))
    return part, _part_of(targets, tokens, positions, torch.zeros_like(positions), shape)


def _part_of(targets: Targets, tokens: Tensor, positions: Tensor, batch_rows: Tensor, shape: torch.Size) -> Targets:
    label_mask = None if targets.label_mask is None else targets.label_mask[tokens]
    return Targets(targets.labels[tokens], positions, batch_rows, shape, label_mask, numbers=targets.numbers)


def _validate(teachers: Mapping[str, Teacher], sources: Mapping[str, Iterable[str]] | None) -> list[str]:
    """Return the problems of the teachers and their sources."""
    problems = [
        f"a teacher has the name {name!r}, which is a part of names in logs: use letters, digits and _ only"
        for name in teachers
        if not str(name).isidentifier()
    ]
    if len(teachers) < (1 if sources else 2):
        problems.append(f"`teachers` has {len(teachers)} entries: give two or more, or one with `sources`")
    for name, teacher in teachers.items():
        if isinstance(teacher, TrainableTeacher | MultiViewTeacher | TeacherGroup) or not teacher.provides_soft_labels:
            problems.append(
                f"{name} is a {type(teacher).__name__}, which teaches whole batches: give a frozen, cached, remote, "
                "EMA, snapshot or adapter-base teacher"
            )
    if sources is None:
        return problems
    problems += [
        f"sources has {name!r}, which is no teacher{did_you_mean(name, teachers)}"
        for name in sources
        if name not in teachers
    ]
    problems += [
        f"{name} has no sources: name at least one source of the data" for name in teachers if not sources.get(name)
    ]
    owner: dict[str, str] = {}
    for name, teacher_sources in sources.items():
        for source in teacher_sources:
            if owner.setdefault(source, name) != name:
                problems.append(f"the source {source!r} has two teachers, {owner[source]} and {name}: give it to one")
    return problems
