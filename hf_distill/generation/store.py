"""`CompletionStore`: completions of a data set on disk, in parts that are complete or absent.

    DIR/generation.json            what the completions were generated from
    DIR/.completions/part-N.parquet    the completions of a part, before any filter
    DIR/.completions/part-N.safetensors    the distributions that the teacher predicted for them, if a cache is written
    DIR/data/train-*.parquet       the data set, written when all parts are there
    DIR/README.md                  its card
    DIR/set_aside.parquet          rows for which a filter raised an exception, with the exception

A part is written to a temporary file, flushed and renamed. A process that is killed at any time therefore leaves
complete parts only, and the next one generates the missing parts. Libraries ignore folders whose names begin with a
dot, so an unfinished data set cannot be trained on.
"""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..core.files import atomic_path, flush, write_atomic
from ..core.io import damage_reported, read_json, write_json
from ..core.json_types import JSONObject
from ..core.run_files import GENERATION
from ..errors import DistillError
from .completion import Completion, Part
from .token_signals import SignalFile, write_signals

PARTS, DATA, CARD, SET_ASIDE = ".completions", "data", "README.md", "set_aside.parquet"
_ROWS_PER_FILE = 100_000
_ROWS_PER_GROUP = 1_000  # `datasets` reads a group at once, and Arrow at most 2 GiB of messages
_SCHEMA = pa.schema(
    {
        "index": pa.int64(),
        "sample": pa.int64(),
        "text": pa.string(),
        "finish_reason": pa.string(),
        "tokens": pa.int64(),
        "log_prob": pa.float64(),
    }
)


class CompletionStore:
    """The folder of a generated data set.

    Args:
        folder: the folder.
        identity: what determines the completions: model, settings and prompts.
        parts: all parts of the data set.
        has_signals: whether the distributions of the completions are stored too.
    """

    def __init__(self, folder: Path, identity: JSONObject, parts: Sequence[Part], has_signals: bool = False):
        self.folder, self.identity, self.parts, self.has_signals = folder, identity, parts, has_signals

    def open(self) -> list[Part]:
        """Create or continue the folder, and return the parts that are missing.

        Raises:
            DistillError: the folder holds other files, or completions of another recipe.
        """
        check_folder(self.folder, resume=True)
        file = self.folder / GENERATION
        stored = read_json(file)
        if not stored:
            (self.folder / PARTS).mkdir(parents=True, exist_ok=True)
            write_json(file, {"identity": self.identity})
            flush(self.folder)
        elif stored.get("identity") != self.identity:
            raise DistillError(
                f"{self.folder} holds completions of another recipe or data: {_difference(stored, self.identity)}. "
                "Restore these values, or give another folder."
            )
        (self.folder / PARTS).mkdir(exist_ok=True)
        return self.missing()

    def missing(self) -> list[Part]:
        """Return the parts that are not on the disk."""
        return [part for part in self.parts if not all(file.is_file() for file in self._files(part))]

    def write(self, part: Part, completions: Iterable[Completion]) -> None:
        """Write the completions of a part, in the order of its requests.

        Raises:
            ValueError: they are not exactly those that the part requests.
        """
        expected = [(request.prompt.index, request.sample) for request in part.requests]
        by_key = {(each.index, each.sample): each for each in completions}
        if sorted(by_key) != sorted(expected):
            raise ValueError(f"part {part.number} has {len(by_key)} of {len(expected)} completions")
        ordered = [by_key[key] for key in expected]
        if self.has_signals:  # before the completions, so that the part is complete when these are there
            self._file(part).unlink(missing_ok=True)
            write_signals(self._signal_file(part), [each.signals for each in ordered if each.signals is not None])
        rows = [{name: getattr(each, name) for name in _SCHEMA.names} for each in ordered]
        with atomic_path(self._file(part)) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), temporary)

    def read(self) -> list[Completion]:
        """Return all completions, in the order of prompts and samples.

        Raises:
            DistillError: a file is damaged.
        """
        completions = list[Completion]()
        for part in self.parts:
            with damage_reported(self._file(part)):
                completions += [Completion(**row) for row in pq.read_table(self._file(part)).to_pylist()]
        return completions

    def signal_files(self) -> list[SignalFile]:
        """Return the distributions of all parts.

        Raises:
            DistillError: a file is damaged.
        """
        return [SignalFile(self._signal_file(part)) for part in self.parts]

    def write_card(self, card: str) -> None:
        """Write the card in place of the one that is there."""
        write_atomic(self.folder / CARD, card)

    def publish(
        self, table: pa.Table, card: str, set_aside: pa.Table | None = None, facts: JSONObject | None = None
    ) -> None:
        """Write the data set, its card and the rows that a filter could not judge in place of those that are there.

        A process that is killed in between leaves the completions, from which the next one writes them again.

        Args:
            table: the rows.
            card: the card.
            set_aside: the rows that a filter could not judge.
            facts: what is recorded about the data set, see `read_facts`.
        """
        # without the facts of the data set that is replaced
        write_json(self.folder / GENERATION, {"identity": self.identity})
        data, new, old = self.folder / DATA, self.folder / f".{DATA}.new", self.folder / f".{DATA}.old"
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir()
        starts = range(0, max(table.num_rows, 1), _ROWS_PER_FILE)
        for number, start in enumerate(starts):
            file = new / f"train-{number:05d}-of-{len(starts):05d}.parquet"
            pq.write_table(table.slice(start, _ROWS_PER_FILE), file, row_group_size=_ROWS_PER_GROUP)
            flush(file)
        if data.is_dir():
            data.replace(old)
        new.replace(data)
        self.write_card(card)
        if set_aside is None:
            (self.folder / SET_ASIDE).unlink(missing_ok=True)
        else:
            with atomic_path(self.folder / SET_ASIDE) as temporary:
                pq.write_table(set_aside, temporary)
        flush(self.folder)
        self.record(facts or {})
        shutil.rmtree(old, ignore_errors=True)

    def record(self, facts: JSONObject) -> None:
        """Record facts about the complete data set, see `read_facts`."""
        write_json(self.folder / GENERATION, {"identity": self.identity, "data_set": facts})

    def _file(self, part: Part) -> Path:
        return self.folder / PARTS / f"part-{part.number:06d}.parquet"

    def _signal_file(self, part: Part) -> Path:
        return self._file(part).with_suffix(".safetensors")

    def _files(self, part: Part) -> list[Path]:
        return [self._file(part), self._signal_file(part)] if self.has_signals else [self._file(part)]


def check_folder(folder: Path, resume: bool) -> None:
    """Check that a data set can be generated into a folder, which needs no model.

    Raises:
        DistillError: the folder holds other files, or holds a data set and `resume` is false.
    """
    if read_json(folder / GENERATION):
        if resume:
            return
        if read_facts(folder):
            state, effect = "a complete data set", "to keep it, or to write it again if filters were changed"
        else:
            parts = len([*(folder / PARTS).glob("*.parquet")])
            state, effect = f"an unfinished data set with {parts} complete parts", "to continue it"
        raise DistillError(f"{folder} holds {state}: pass --resume {effect}, or give another folder.")
    leftover = f"{GENERATION}.half"  # of a process that was killed while it wrote the file
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if any(name != leftover and not name.startswith(".") for name in names):
        raise DistillError(f"{folder} contains other files than a generated data set: give an empty or new folder.")


def read_facts(folder: Path) -> JSONObject:
    """Return what is recorded about a complete data set; empty for a folder without one."""
    facts = read_json(folder / GENERATION).get("data_set")
    return facts if isinstance(facts, dict) and (folder / DATA).is_dir() else {}


def _difference(stored: JSONObject, identity: JSONObject) -> str:
    old = stored.get("identity")
    old = old if isinstance(old, dict) else {}
    keys = [key for key in {**old, **identity} if old.get(key) != identity.get(key)]
    return "; ".join(f"{key} is {identity.get(key)!r} here and {old.get(key)!r} there" for key in keys)
