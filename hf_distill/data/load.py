"""Loads examples from files, data sets of the Hub and packaged texts, and splits off held-out examples."""

import builtins
import inspect
import sys
import sysconfig
from importlib import import_module
from pathlib import Path
from typing import TypeAlias, cast

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from ..core.defaults import SPLIT
from ..core.references import DATASET_BUILDERS, PACKAGED_TEXTS, reference_kind
from ..core.run_files import GENERATION
from ..errors import DistillError, did_you_mean
from ..hub import fetch, line_of, parse_uri, reading
from ..hub.errors import credentials, login_hint
from .formats import MESSAGES, TEXT, format_of
from .local_files import read_file, read_generated, readable
from .smoke_data import SMOKE_BUILDERS

Examples: TypeAlias = Dataset | IterableDataset


def load_examples(
    path: str, split: str = SPLIT, name: str | None = None, column: str | None = None, streaming: bool = False
) -> Examples:
    """Load the examples of a source, in one of the formats of `format_of`; text is in one column, `text`.

    Args:
        path: one of
            - the id of a data set on the Hub;
            - a .txt (each paragraph is a document), .jsonl, .json, .csv, .parquet or .arrow file;
            - a folder of `save_to_disk`;
            - hf://datasets/org/name[@revision], a data set at a revision, or a file in it with /file appended;
            - a packaged text, which every Python installation has: `package:pydoc_data.topics` (chapters of the Python
              documentation), `package:stdlib` (modules of the standard library) or `package:builtins` (questions about
              the builtins, with the text of help() as the answer).
        split: split of a data set that has splits.
        name: configuration of a data set.
        column: the column that holds the text; None: the format is detected from the columns.
        streaming: whether to read the data during training.

    Returns:
        the examples, with the columns of their format.

    Raises:
        DistillError: there is no such data set, file, column or format, or the source has no examples.
    """
    data = _load(path, split, name, streaming)
    if data is None or (isinstance(data, Dataset) and len(data) == 0):
        first = None
    else:
        data = data.to_iterable_dataset() if streaming and isinstance(data, Dataset) else data
        first = next(iter(data), None)
    if data is None or first is None:
        raise DistillError(f"{path} (split {split!r}) has no documents.")
    if format_of(list(first), column, path) == TEXT:
        column = column or TEXT
        data = data.select_columns([column])
        if column != TEXT:
            data = data.rename_columns({column: TEXT})
    return data


def load_columns(path: str, split: str = SPLIT, name: str | None = None) -> Dataset:
    """Load the examples of a source with all of their columns, as they are stored.

    Args:
        path: as for `load_examples`; or a folder of images or audio files, as `datasets` reads it; or generated data,
            `smoke:texts`, `smoke:images` or `smoke:tones`.
        split: split of a data set that has splits.
        name: configuration of a data set.

    Raises:
        DistillError: there is no such data set or file, or the source has no examples.
    """
    data = _load(path, split, name, streaming=False)
    if data is None or len(cast(Dataset, data)) == 0:
        raise DistillError(f"{path} (split {split!r}) has no examples.")
    return cast(Dataset, data)


def _load(path: str, split: str, name: str | None, streaming: bool) -> Examples | None:
    if reference_kind(path) in ("package", "smoke"):
        if path not in _GENERATED:
            raise DistillError(f"{path!r} is not a packaged text{did_you_mean(path, _PACKAGED)}")
        return _GENERATED[path]()
    revision = None
    if reference_kind(path) == "address":
        uri = parse_uri(path)
        if uri.path_in_repo:
            path = str(fetch(uri).path)
        else:
            path, revision = uri.id, uri.revision
    local_path = Path(path)
    if local_path.suffix in DATASET_BUILDERS:
        return read_file(path, streaming)
    if local_path.is_file():
        raise DistillError(
            f"The file {path} has no supported suffix; supported are {', '.join(DATASET_BUILDERS)}. Convert or rename "
            "it."
        )
    if (local_path / "state.json").is_file():
        with readable(path):
            return cast(Dataset, load_from_disk(path))
    if (local_path / "dataset_dict.json").is_file():
        with readable(path):
            splits = cast(DatasetDict, load_from_disk(path))
        if split not in splits:
            raise DistillError(f"{path} has no split {split!r}{did_you_mean(split, splits)}")
        return splits[split]
    if (local_path / GENERATION).is_file():
        return read_generated(local_path, streaming)
    with reading(f"The data set {path}"):
        try:
            return cast(Examples, load_dataset(path, name, split=split, streaming=streaming, revision=revision))
        except DatasetNotFoundError as error:
            raise DistillError(
                f"There is no data set {path!r} on this machine, and {credentials()} cannot read one on the Hub: "
                f"{line_of(error)}{login_hint()}"
            ) from error


def _python_topics() -> Dataset:
    """Load the chapters without repeated paragraphs, so that held-out text does not occur in the training text."""
    paragraphs: set[str] = set()
    documents = []
    for _, text in sorted(import_module("pydoc_data.topics").topics.items()):
        new = []
        for paragraph in text.split("\n\n"):
            if paragraph.strip() and paragraph.strip() not in paragraphs:
                paragraphs.add(paragraph.strip())
                new.append(paragraph)
        documents.append("\n\n".join(new))
    return Dataset.from_dict({TEXT: [document for document in documents if document]})


def _python_modules() -> Dataset:
    folder = Path(sysconfig.get_path("stdlib"))
    files = (folder / f"{name}.py" for name in sorted(sys.stdlib_module_names))
    return Dataset.from_dict({TEXT: [file.read_text(encoding="utf-8") for file in files if file.is_file()]})


def _python_builtins() -> Dataset:
    """Load questions about each builtin and the methods of builtin types, with the text of help() as the answer."""
    objects = {name: value for name, value in vars(builtins).items() if not name.startswith("_")}
    types = {name: value for name, value in objects.items() if isinstance(value, type)}
    for type_name, builtin_type in types.items():
        methods = {name: value for name, value in vars(builtin_type).items() if not name.startswith("_")}
        objects |= {f"{type_name}.{name}": value for name, value in methods.items()}
    answers: set[str] = set()
    rows = []
    for name, value in sorted(objects.items()):
        text = inspect.getdoc(value)
        if text and text not in answers:
            answers.add(text)
            question = f"What does `{name}` do in Python?" if callable(value) else f"What is `{name}` in Python?"
            rows.append([{"role": "user", "content": question}, {"role": "assistant", "content": text}])
    return Dataset.from_dict({MESSAGES: rows})


_PACKAGED = dict(zip(PACKAGED_TEXTS, (_python_topics, _python_modules, _python_builtins), strict=True))
_GENERATED = _PACKAGED | SMOKE_BUILDERS


def split_held_out(documents: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split documents into (training, held-out) without dividing a document; the same seed gives the same split.

    Args:
        documents: N documents.
        share: fraction of the documents that is held out, between 0 and 1.
        seed: seed of the random split.

    Returns:
        (training documents, held-out documents).

    Raises:
        DistillError: there are too few documents for the share.
    """
    if not 1 <= round(share * len(documents)) < len(documents):
        raise DistillError(
            f"A held-out share of {share} of {len(documents)} documents leaves one side empty. Use another share "
            "(1 / number of documents, or more), a separate source for the evaluation (data.eval.path of a recipe), or "
            "a source with more documents (in a .txt file each paragraph is a document)."
        )
    parts = documents.train_test_split(test_size=share, seed=seed)
    return parts["train"], parts["test"]
