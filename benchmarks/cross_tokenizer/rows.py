"""The text of the cross-tokenizer experiments: Python code and Python documentation; whole files are held out.

Code is the standard library of the running Python, without its tests; documentation is Debian's python3.11-doc. Each
file gives one row: as many whole lines as fit into 255 tokens of the student, to which GOLD adds its end-of-text token.
"""

import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[1] / "evidence"))
from texts import python_documentation

KINDS = ("code", "text")
TOKENS = 255
HELD_OUT_ROWS = 24  # of each kind
_EVERY = 6  # of the files one is held out
_LETTERS = 20_000  # of a file that are read
_EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "encodings"}


def prepare_rows(folder: Path, tokenizer: PreTrainedTokenizerBase, rows_of_each: int) -> None:
    """Write train_KIND.jsonl and held_out_KIND.jsonl into a folder, unless they are there.

    Args:
        folder: the folder.
        tokenizer: the student's.
        rows_of_each: training rows of each kind.
    """
    if all((folder / f"held_out_{kind}.jsonl").is_file() for kind in KINDS):
        return
    folder.mkdir(parents=True, exist_ok=True)
    sources = {"code": _standard_library(), "text": python_documentation(folder)}
    for kind, files in sources.items():
        for name, held_out, count in (("train", False, rows_of_each), ("held_out", True, HELD_OUT_ROWS)):
            chosen = [text for number, text in enumerate(files) if (number % _EVERY == 0) == held_out]
            rows = list(islice(_one_row_of_each(chosen, tokenizer), count))
            if len(rows) < count:
                raise SystemExit(f"There are {len(rows)} rows of {kind} ({name}); {count} are needed.")
            (folder / f"{name}_{kind}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def read_rows(folder: Path, name: str) -> list[str]:
    """Return the texts of a file that `prepare_rows` wrote.

    Args:
        folder: the folder.
        name: such as "train_code".
    """
    return [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def training_rows(folder: Path) -> list[str]:
    """Return the training rows of both kinds, in turn."""
    return [row for pair in zip(*(read_rows(folder, f"train_{kind}") for kind in KINDS), strict=True) for row in pair]


def _standard_library() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if not _EXCLUDED & set(path.relative_to(root).parts)]
    return [path.read_text(encoding="utf-8") for path in paths]


def _one_row_of_each(files: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield a random row of each file that has any, in random order."""
    chooser = random.Random(0)
    for text in chooser.sample(files, len(files)):
        if rows := list(_pieces(text[:_LETTERS], tokenizer)):
            yield chooser.choice(rows)


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield whole lines of at most TOKENS tokens together; pieces of fewer than 90 % of them are left out."""
    piece = ""
    for line in text.splitlines(keepends=True):
        longer = piece + line
        if len(longer) > 2 * TOKENS and len(tokenizer(longer)["input_ids"]) > TOKENS:
            if 0.9 * TOKENS <= len(tokenizer(piece)["input_ids"]) <= TOKENS:
                yield piece
            longer = line
        piece = longer
