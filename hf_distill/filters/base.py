"""Base classes of filters and selections: their options are the keys of a recipe. Imports no torch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from pydantic import ConfigDict

from ..core.strict_model import StrictModel
from ..errors import require_package
from .rows import Row

# What a filter returns for a row: False removes it, True keeps it, and a mapping keeps it and adds columns to it.
Verdict: TypeAlias = bool | Mapping[str, object]
# What a selection returns: numbers of the chosen samples, with the columns that are added to them.
Choice: TypeAlias = dict[int, Mapping[str, object]]


class Step(StrictModel):
    """A filter or a selection with its options."""

    model_config = ConfigDict(frozen=True)
    name: str

    @property
    def packages(self) -> tuple[str, ...]:
        """Modules of the optional packages that it needs."""
        return ()

    @property
    def label(self) -> str:
        """The name in counts and messages."""
        return self.name

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads in addition to `prompt`, `completion` and `source`."""
        return ()

    @property
    def added_columns(self) -> tuple[str, ...]:
        """The columns that it may add to the rows."""
        return ()

    def check_packages(self) -> None:
        """Raise a DistillError if an optional package that the step needs is not installed."""
        for package in self.packages:
            require_package(package, "generate", f"The filter {self.name}")


class RowFilter(Step, ABC):
    """A filter: removes rows."""

    @abstractmethod
    def start(self) -> Callable[[Row], Verdict]:
        """Return the function that judges the rows of one data set, which are given to it in order."""


class SingleRowFilter(RowFilter):
    """A filter that judges each row by itself."""

    @abstractmethod
    def keep(self, row: Row) -> bool:
        """Whether the row is kept."""

    def start(self) -> Callable[[Row], bool]:
        """Return the function that judges the rows of one data set."""
        return self.keep


class Selection(Step, ABC):
    """A selection: chooses among the samples of each prompt."""

    @abstractmethod
    def start(self) -> Callable[[Row], object]:
        """Return the function that measures one sample."""

    @abstractmethod
    def choose(self, measures: Sequence[object]) -> Choice:
        """Return the samples of a prompt that are kept.

        Args:
            measures: the measure of each sample of one prompt.
        """
