"""Plain text: documents of a data set, and rows of tokens cut from them."""

from importlib import import_module
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from ..errors import DistillError

_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PACKAGED = "package:pydoc_data.topics"


def load_documents(path: str, split: str = "train", name: str | None = None, column: str = "text") -> Dataset:
    """Documents as a data set with one column, `text`.

    Args:
        path: id of a data set; a local .txt (its paragraphs are the documents), .jsonl, .csv or .parquet file; or
            `package:pydoc_data.topics`, the chapters of Python's own documentation, which every Python has.
        split: of a data set with splits.
        name: configuration of a data set.
        column: the column that holds the text.

    Raises:
        DistillError: no such file or column, or no documents.
    """
    if path == PACKAGED:
        return _python_topics()
    if path.startswith("package:"):
        raise DistillError(f"{path!r} is no packaged text; there is {PACKAGED}.")
    suffix = Path(path).suffix
    if suffix in _BUILDERS:
        if not Path(path).is_file():
            raise DistillError(f"There is no file {path!r} (looked in {Path.cwd()}).")
        how = {"sample_by": "paragraph"} if suffix == ".txt" else {}
        data = load_dataset(_BUILDERS[suffix], data_files=path, split="train", **how)
    else:
        data = load_dataset(path, name, split=split)
    if column not in data.column_names:
        raise DistillError(f"{path} has no column {column!r}; it has {data.column_names}. Set `column`.")
    data = data.select_columns([column]).rename_columns({column: "text"} if column != "text" else {})
    if len(data) == 0:
        raise DistillError(f"{path} (split {split!r}) has no documents.")
    return data


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
    return Dataset.from_dict({"text": [d for d in documents if d]})


def hold_out(documents: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
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


def causal_rows(documents: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Rows of exactly `max_length` tokens: documents joined with end-of-text tokens, then cut; the rest is dropped.

    Returns:
        a data set with `input_ids` and `labels`, each row a list of `max_length` ids.

    Raises:
        DistillError: the tokenizer has no end-of-text token, or there is too little text for one row.
    """
    if tokenizer.eos_token_id is None:
        raise DistillError("The tokenizer has no eos_token to put between documents: set one.")

    def cut(batch: dict) -> dict:
        tokens: list[int] = []
        for ids in tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]:
            tokens += [*ids, tokenizer.eos_token_id]
        rows = [tokens[i : i + max_length] for i in range(0, len(tokens) - max_length + 1, max_length)]
        return {"input_ids": rows, "labels": rows}

    rows = documents.map(cut, batched=True, remove_columns=documents.column_names)
    if len(rows) == 0:
        raise DistillError(f"{len(documents)} documents hold fewer than max_length={max_length} tokens in all.")
    return rows
