"""Applies filters and a selection to rows, and counts what each of them removed. Imports no torch."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..core.json_types import JSONObject
from ..errors import DistillError, collect_errors, did_you_mean, raise_if_any
from .base import RowFilter, Selection, Verdict
from .rows import Row, prompt_key

EXAMPLES = 3  # removed rows of each filter whose positions are kept for the report


# Columns of rows that were set aside: the filter or selection, and the exception that it raised.
SET_ASIDE_COLUMNS = ("set_aside_by", "set_aside_error")


@dataclass(frozen=True)
class SetAside:
    """A row that a filter could not judge, because it raised an exception."""

    position: int
    filter: str
    error: str


@dataclass
class StepCount:
    """Counts of the rows that a filter or a selection was given, removed, and set aside because it raised an exception.

    Attributes:
        label: name of the filter.
        options: its options, as far as the recipe sets them.
        given: number of rows that it was given.
        removed: number of rows that it removed.
        set_aside: number of rows for which it raised an exception.
        examples: positions of the first rows that it removed.
    """

    label: str
    options: JSONObject
    given: int = 0
    removed: int = 0
    set_aside: int = 0
    examples: list[int] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Number of rows that it kept."""
        return self.given - self.removed - self.set_aside

    def remove(self, position: int) -> None:
        """Count a removed row."""
        self.removed += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(position)

    def as_json(self) -> JSONObject:
        """Return label, options and counts, without the examples."""
        counts = {"given": self.given, "removed": self.removed, "set_aside": self.set_aside, "kept": self.kept}
        return {"filter": self.label, "options": self.options, **counts}


@dataclass(frozen=True)
class Filtered:
    """The rows that filters keep.

    Attributes:
        positions: positions of the kept rows among the given ones, in ascending order.
        added: columns that filters added, by name: one value for each kept row, None where it has none.
        counts: counts of each filter in order, the selection last.
        set_aside: rows for which a filter raised an exception, in ascending order.
    """

    positions: list[int]
    added: dict[str, list[object]]
    counts: list[StepCount]
    set_aside: list[SetAside]

    def kept_rows(self, rows: Iterable[Row]) -> Iterator[dict[str, object]]:
        """Yield the kept rows with the added columns.

        Args:
            rows: the rows that were given to `apply_filters`, in the same order.
        """
        numbers = {position: i for i, position in enumerate(self.positions)}
        for position, row in enumerate(rows):
            if (i := numbers.get(position)) is not None:
                yield {**row, **{name: values[i] for name, values in self.added.items()}}

    def set_aside_rows(self, rows: Iterable[Row]) -> Iterator[dict[str, object]]:
        """Yield the rows that were set aside, with the columns of `SET_ASIDE_COLUMNS`; see `kept_rows`."""
        items = {item.position: item for item in self.set_aside}
        for position, row in enumerate(rows):
            if item := items.get(position):
                yield {**row, **dict(zip(SET_ASIDE_COLUMNS, (item.filter, item.error), strict=True))}


def check_filters(filters: Sequence[RowFilter], select: Selection | None, columns: Iterable[str]) -> None:
    """Check that filters can run, before rows are generated: packages, functions, evaluation texts and columns.

    Args:
        filters: the filters.
        select: the selection.
        columns: the columns that the rows will have.

    Raises:
        DistillError: a package, a function, a file or a column is missing. The message lists all problems.
    """
    columns, problems = [*columns], list[str]()
    for step in _steps(filters, select):
        with collect_errors(problems):
            step.check_packages()
            step.start()
        problems += [
            f"{step.label} reads the column {name!r}, which the rows do not have{did_you_mean(name, columns)}"
            for name in step.columns
            if name not in columns
        ]
    raise_if_any(problems)


def apply_filters(rows: Iterable[Row], filters: Sequence[RowFilter], select: Selection | None = None) -> Filtered:
    """Apply filters in order, and then a selection among the samples of each prompt.

    A row is given to a filter only if those before kept it. A row for which a filter raises an exception is set aside
    and counted. The rows are read once and are not held in memory.

    Args:
        rows: N rows; see `rows`.
        filters: the filters, in order.
        select: the selection.

    Returns:
        The positions of the kept rows, the columns that filters added, and the counts.

    Raises:
        DistillError: there are no rows; no row is left (the message says how many each filter removed); or a filter
            cannot run because a package, function, file or column is missing.
    """
    for step in _steps(filters, select):
        step.check_packages()
    counts = [StepCount(step.label, _options(step)) for step in filters]
    judges = [step.start() for step in filters]
    chooser = _Chooser(select) if select else None
    kept_columns: dict[int, Mapping[str, object]] = {}
    set_aside: list[SetAside] = []
    number = 0
    for position, row in enumerate(rows):
        number += 1
        columns = _judge(position, row, judges, counts, set_aside)
        if columns is not None:
            kept_columns[position] = columns
            if chooser:
                chooser.measure(position, {**row, **columns}, set_aside)
    if chooser:
        chosen = chooser.choose(set_aside)
        kept_columns = {position: {**kept_columns[position], **chosen[position]} for position in sorted(chosen)}
        counts.append(chooser.count)
    if not kept_columns:
        raise DistillError(_why_nothing_is_left(number, counts, set_aside))
    names = dict.fromkeys(name for columns in kept_columns.values() for name in columns)
    added = {name: [columns.get(name) for columns in kept_columns.values()] for name in names}
    return Filtered([*kept_columns], added, counts, sorted(set_aside, key=lambda item: item.position))


def _steps(filters: Sequence[RowFilter], select: Selection | None) -> list[RowFilter | Selection]:
    return [*filters, *([select] if select else [])]


def _options(step: RowFilter | Selection) -> JSONObject:
    return step.model_dump(mode="json", exclude={"name"}, exclude_unset=True)


def _judge(
    position: int,
    row: Row,
    judges: Sequence[Callable[[Row], Verdict]],
    counts: Sequence[StepCount],
    set_aside: list[SetAside],
) -> Mapping[str, object] | None:
    """Return the columns that filters add to a row; None if one of them removes it or sets it aside."""
    columns: dict[str, object] = {}
    for judge, count in zip(judges, counts, strict=True):
        count.given += 1
        try:
            verdict = judge({**row, **columns})
        except DistillError:  # the filter cannot run on any row
            raise
        except Exception as error:
            count.set_aside += 1
            set_aside.append(SetAside(position, count.label, _describe(error)))
            return None
        if verdict is False:
            count.remove(position)
            return None
        if verdict is not True:
            columns |= verdict
    return columns


class _Chooser:
    """Collects the measures of all samples, and chooses among those of each prompt."""

    def __init__(self, selection: Selection):
        self.selection, self.measure_row = selection, selection.start()
        self.count = StepCount(selection.label, _options(selection))
        self.prompts: dict[Hashable, list[tuple[int, object]]] = {}

    def measure(self, position: int, row: Row, set_aside: list[SetAside]) -> None:
        self.count.given += 1
        try:
            measure = self.measure_row(row)
        except DistillError:
            raise
        except Exception as error:
            self._set_aside(position, error, set_aside)
            return
        # The hash takes the place of the prompt, whose text would otherwise be held in memory.
        self.prompts.setdefault(hash(prompt_key(row)), []).append((position, measure))

    def choose(self, set_aside: list[SetAside]) -> dict[int, Mapping[str, object]]:
        """Return the positions of the chosen rows, with the columns that are added to them."""
        chosen: dict[int, Mapping[str, object]] = {}
        for samples in self.prompts.values():
            try:
                choice = self.selection.choose([measure for _, measure in samples])
            except DistillError:
                raise
            except Exception as error:
                for position, _ in samples:
                    self._set_aside(position, error, set_aside)
                continue
            for i, (position, _) in enumerate(samples):
                if i in choice:
                    chosen[position] = choice[i]
                else:
                    self.count.remove(position)
        return chosen

    def _set_aside(self, position: int, error: Exception, set_aside: list[SetAside]) -> None:
        self.count.set_aside += 1
        set_aside.append(SetAside(position, self.count.label, _describe(error)))


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _why_nothing_is_left(number: int, counts: Sequence[StepCount], set_aside: Sequence[SetAside]) -> str:
    if not number:
        return "There are no rows to filter."
    parts = [
        f"{count.label} removed {count.removed:,} of {count.given:,}"
        + (f" and raised an exception for {count.set_aside:,}" if count.set_aside else "")
        for count in counts
        if count.removed or count.set_aside
    ]
    first = f" The first exception is {set_aside[0].error.rstrip('.')}." if set_aside else ""
    return (
        f"The filters leave none of {number:,} rows: {'; '.join(parts)}.{first} Change the options of the filter that "
        "removed most, or remove it."
    )
