"""Loads the sources of recipes whose data has columns, such as image and label, and makes rows of them."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, cast

from datasets import Dataset, concatenate_datasets

from ...data import Examples, OtherTokenizer, add_source_column, split_held_out
from ...data.load import load_columns
from ...recipe.tasks import TASKS, check_columns
from ..datasets import PreparedData, limit_rows, mix_sources
from .previews import Preview
from .task import Task

EVAL = "eval"


class ColumnTask(Task):
    """A task whose data has columns: each row is an example."""

    def prepare_data(
        self, processor: Any, seed: int, count: int, other_tokenizers: Sequence[OtherTokenizer] = ()
    ) -> PreparedData:
        """Load, process, split and mix the sources.

        Raises:
            DistillError: A source does not exist, lacks a column, or has values that the task cannot read.
        """
        data = self.recipe.data
        rows = self.make_rows(self.load_sources(), processor)
        train, held_out = dict[str, Examples](), list[Dataset]()
        for index, name in enumerate(data.sources):
            train[name] = rows[name]
            if data.eval.holdout:
                train[name], part = split_held_out(rows[name], data.eval.holdout, seed)
                part = limit_rows(part, data.eval.max_rows)
                held_out.append(cast(Dataset, add_source_column(part, index)) if len(data.sources) > 1 else part)
        if data.eval.path:
            held_out = [limit_rows(rows[EVAL], data.eval.max_rows)]
        mixed = mix_sources(data, train, seed, count)
        return PreparedData(mixed, concatenate_datasets(held_out), self.collator(processor), self.label_names())

    def load_sources(self) -> dict[str, Dataset]:
        """Load the sources, and the evaluation data as `eval`, with the columns of the task under their names."""
        data = self.recipe.data
        sources: dict[str, Any] = {**data.sources, **({EVAL: data.eval} if data.eval.path else {})}
        return {name: self._load(name, source) for name, source in sources.items()}

    def _load(self, name: str, source: Any) -> Dataset:
        documents = load_columns(source.path, source.split, source.name)
        declared = self.recipe.data.columns
        names = TASKS[self.name].column_names(declared, documents.column_names)
        check_columns(names, documents.column_names, self.where(name))
        documents = documents.select_columns(list(dict.fromkeys(names.values())))
        return documents.rename_columns({old: role for role, old in names.items() if old != role})

    def path(self, name: str) -> str:
        """Return the path, id or address of a source."""
        data = self.recipe.data
        return str(data.eval.path if name == EVAL else data.sources[name].path)

    def where(self, name: str) -> str:
        """Return how messages name a source."""
        return f"data.{name} ({self.path(name)})"

    def label_names(self) -> Sequence[str]:
        """Return the names of the classes; empty for a task without classes."""
        return ()

    def preview(self, seed: int, count: int) -> list[Preview]:
        """Return the content of the first rows, with their labels or transcripts."""
        processor = self.load_processor()
        rows, names = self.prepare_data(processor, seed, count).train, list(self.recipe.data.sources)
        return [
            self.preview_row(number, row, names[row.get("source", 0)], processor)
            for number, row in enumerate(islice(rows, count))
        ]

    @abstractmethod
    def preview_row(self, number: int, row: dict, source: str, processor: Any) -> Preview:
        """Return the content of a row."""

    @abstractmethod
    def make_rows(self, sources: Mapping[str, Dataset], processor: Any) -> dict[str, Dataset]:
        """Return the rows of each source, in the form that the collator reads."""

    @abstractmethod
    def collator(self, processor: Any) -> Callable[[list], dict]:
        """Return the collator, which has the attribute `sources`."""
