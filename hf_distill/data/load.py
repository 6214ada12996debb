"""Sources: where examples come from, and the share of them that is held out."""

import builtins
import inspect
import sys
import sysconfig
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from ..core.references import DATASET_BUILDERS, PACKAGED_TEXTS, reference_kind
from ..errors import DistillError, did_you_mean
from ..hub import fetch, line_of, parse_uri, reading
from .formats import MESSAGES, TEXT, format_of
from .local_files import read_file, readable

Examples: TypeAlias = Dataset | IterableDataset


def load_examples(
    path: str, split: str = "train", name: str | None = None, column: str | None = None, streaming: bool = False
) -> Examples:
    """Examples of a source, in one of the formats of `format_of`; text is one column, `text`.

    Args:
        path: id of a data set; a .txt (its paragraphs are the documents), .jsonl, .json, .csv, .parquet or .arrow
            file; a folder of `save_to_disk`; hf://datasets/org/name[@revision], a data set at a revision, or with a
            file behind it, that file; or a packaged text: `package:pydoc_data.topics`, the chapters of Python's own
            documentation, `package:stdlib`, the modules of its library, or `package:builtins`, questions about its
            builtins with what help() answers; every Python has them.
        split: of a data set with splits.
        name: configuration of a data set.
        column: the column that holds the text; None: the format is told by the columns.
        streaming: read it while training.

    Raises:
        DistillError: no such data set, file, column or format, or no examples.
    """
    if reference_kind(path) == "package":
        if path not in _PACKAGED:
            raise DistillError(f"{path!r} is no packaged text{did_you_mean(path, _PACKAGED)}")
        data: Any = _PACKAGED[path]()
    else:
        data = _load(path, split, name, streaming)
    empty = data is None or (isinstance(data, Dataset) and len(data) == 0)
    if streaming and isinstance(data, Dataset) and not empty:
        data = data.to_iterable_dataset()
    first = None if empty else next(iter(data), None)
    if first is None:
        raise DistillError(f"{path} (split {split!r}) has no documents.")
    if format_of(list(first), column, path) == TEXT:
        column = column or TEXT
        data = data.select_columns([column])
        if column != TEXT:
            data = data.rename_columns({column: TEXT})
    return data


def _load(path: str, split: str, name: str | None, streaming: bool) -> Any:
    revision = None
    if reference_kind(path) == "address":
        at = parse_uri(path)
        if at.path_in_repo:
            path = str(fetch(at).path)
        else:
            path, revision = at.id, at.revision
    place = Path(path)
    if place.suffix in DATASET_BUILDERS:
        return read_file(path, streaming)
    if place.is_file():
        raise DistillError(
            f"{path} is a file, and files are read whose names end with {', '.join(DATASET_BUILDERS)}. Rename it."
        )
    if (place / "state.json").is_file():
        with readable(path):
            return load_from_disk(path)
    if (place / "dataset_dict.json").is_file():
        with readable(path):
            splits: Any = load_from_disk(path)
        if split not in splits:
            raise DistillError(f"{path} has no split {split!r}{did_you_mean(split, splits)}")
        return splits[split]
    with reading(f"The data set {path}"):
        try:
            return load_dataset(path, name, split=split, streaming=streaming, revision=revision)
        except DatasetNotFoundError as error:
            raise DistillError(f"There is no data set {path!r} here or on the Hub: {line_of(error)}") from error


def _python_topics() -> Dataset:
    """Chapters quote each other: a paragraph counts where it stands first, so that held-out text is unseen text."""
    seen: set[str] = set()
    documents = []
    for _, text in sorted(import_module("pydoc_data.topics").topics.items()):
        new = []
        for paragraph in text.split("\n\n"):
            if paragraph.strip() and paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                new.append(paragraph)
        documents.append("\n\n".join(new))
    return Dataset.from_dict({TEXT: [d for d in documents if d]})


def _python_modules() -> Dataset:
    folder = Path(sysconfig.get_path("stdlib"))
    files = (folder / f"{name}.py" for name in sorted(sys.stdlib_module_names))
    return Dataset.from_dict({TEXT: [f.read_text(encoding="utf-8") for f in files if f.is_file()]})


def _python_builtins() -> Dataset:
    """What help() says of each builtin and of the methods of builtin types, as an answer to a question."""
    named = {name: thing for name, thing in vars(builtins).items() if not name.startswith("_")}
    types = {name: thing for name, thing in named.items() if isinstance(thing, type)}
    for owner, kind in types.items():
        own = {name: thing for name, thing in vars(kind).items() if not name.startswith("_")}
        named |= {f"{owner}.{name}": thing for name, thing in own.items()}
    seen: set[str] = set()
    rows = []
    for name, thing in sorted(named.items()):
        text = inspect.getdoc(thing)
        if text and text not in seen:
            seen.add(text)
            question = f"What does `{name}` do in Python?" if callable(thing) else f"What is `{name}` in Python?"
            rows.append([{"role": "user", "content": question}, {"role": "assistant", "content": text}])
    return Dataset.from_dict({MESSAGES: rows})


_PACKAGED = dict(zip(PACKAGED_TEXTS, (_python_topics, _python_modules, _python_builtins), strict=True))


def split_held_out(documents: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split whole documents into (training, held-out), the same way for the same seed.

    Raises:
        DistillError: too few documents for the share.
    """
    if not 1 <= round(share * len(documents)) < len(documents):
        raise DistillError(
            f"A held-out share of {share} of {len(documents)} documents leaves one side empty. Give `eval` a path of "
            "its own, or a source with more documents (in a .txt file each paragraph is one)."
        )
    parts = documents.train_test_split(test_size=share, seed=seed)
    return parts["train"], parts["test"]
