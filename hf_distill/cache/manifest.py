"""What a cache says of itself: `manifest.json`."""

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..core.references import path_exists
from ..errors import DistillError
from .files import atomic_path, checksum_of

FORMAT, FILE, HEAD, INDEX = 1, "manifest.json", "head.safetensors", "index.bin"
CAPTURE = "capture.json"  # the manifest of a capture that goes on
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
Kind = Literal["hidden", "sampled", "top_k"]


@dataclass(frozen=True)
class Manifest:
    """What is in a cache, of whom, of which data.

    kind:          hidden: last hidden states, with the head once; sampled: draws (2503.16870); top_k: log-probabilities
    options:       hidden: dtype, layers; sampled: draws, proposal, seed; top_k: k
    temperature:   at which probabilities were taken; None: any can be had
    vocab_size:    V of the teacher
    width:         H of the teacher; None where it has no head of its own
    depth:         L of the teacher
    scaling:       what follows the head: scale, softcap
    teacher:       reference, revision, class, and a digest of its weights
    tokenizer:     digest; None: unknown
    chat_template: digest; None: none
    data:          examples, tokens, max_length, and a fingerprint of all examples
    versions:      of the packages that wrote it
    recipe:        that it was written from; None: from a script
    shards:        {file, examples, tokens, bytes, sha256} of each
    index:         {file, bytes, sha256} of all keys, in the order of shards and their rows
    head:          {file, bytes, sha256} of the head; None where there is none
    """

    kind: Kind
    options: dict[str, Any]
    temperature: float | None
    vocab_size: int
    width: int | None
    depth: int
    scaling: dict[str, float | None]
    teacher: dict[str, Any]
    tokenizer: str | None
    chat_template: str | None
    data: dict[str, Any]
    versions: dict[str, str]
    recipe: dict[str, Any] | None = None
    shards: list[dict[str, Any]] = field(default_factory=list)
    index: dict[str, Any] | None = None
    head: dict[str, Any] | None = None
    format: int = FORMAT

    def differs(self, other: "Manifest") -> list[str]:
        """What two captures do not have in common, files, versions and recipe aside."""
        aside = ("shards", "index", "head", "versions", "recipe")
        mine, yours = asdict(self), asdict(other)
        return [
            f"{name} is {mine[name]!r} there and {yours[name]!r} here"
            for name in mine
            if name not in aside and mine[name] != yours[name]
        ]

    @property
    def files(self) -> list[dict[str, Any]]:
        """All files beside the manifest, as it knows them."""
        return [*self.shards, *(entry for entry in (self.index, self.head) if entry)]

    @property
    def payload(self) -> int:
        """Bytes of all shards."""
        return sum(shard["bytes"] for shard in self.shards)

    @property
    def size(self) -> int:
        """Bytes of all files that the manifest names: shards, index and head."""
        return sum(entry["bytes"] for entry in self.files)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of a stored token in the shards; the head does not grow with the tokens."""
        return self.payload / max(self.data["tokens"], 1)

    def facts(self) -> dict[str, Any]:
        """For the evidence of a run."""
        own = {name: getattr(self, name) for name in ("kind", "options", "temperature", "teacher", "data")}
        return own | {"bytes_per_token": round(self.bytes_per_token, 2)}

    def write(self, file: Path) -> None:
        """Write it whole or not at all, with a checksum of itself."""
        with atomic_path(file) as half:
            half.write_text(self.as_text())

    def as_text(self) -> str:
        """The content of its file."""
        values = json.loads(json.dumps(asdict(self)))
        return json.dumps({**values, "checksum": checksum_of(values)}, indent=1) + "\n"


def read_manifest(folder: Path, name: str = FILE) -> Manifest:
    """The manifest of a cache.

    Raises:
        DistillError: the folder is no cache, an unfinished one, of another format, or its manifest is damaged.
    """
    file = folder / name
    if not path_exists(file):
        unfinished = path_exists(folder / CAPTURE)
        raise DistillError(
            f"{folder} is {'an unfinished cache' if unfinished else 'not a cache'}: it has no {FILE}. "
            + ("Run `hf-distill cache write` again with the same recipe and options: it goes on where it stopped."
               if unfinished else "Write one with `hf-distill cache write RECIPE -o DIR`.")
        )  # fmt: skip
    try:
        values = json.loads(file.read_text())
        told = values.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise DistillError(f"{file} is damaged: it is not what was written. Write the cache again.") from None
    if told != checksum_of(values):
        raise DistillError(f"{file} is damaged: it does not have its own checksum. Write the cache again.")
    if values.get("format") != FORMAT:
        raise DistillError(
            f"{folder} has format {values.get('format')!r}; this version reads {FORMAT}: write it again."
        )
    try:
        manifest = Manifest(**{f.name: values[f.name] for f in fields(Manifest)})
        strange = [str(entry["file"]) for entry in manifest.files if not _NAME.fullmatch(entry["file"])]
    except (KeyError, TypeError, AttributeError) as error:
        raise DistillError(f"{file} is no manifest of a cache ({type(error).__name__}: {error}).") from None
    if strange:
        raise DistillError(f"{file} names {strange[0]!r}, which is no file of its own folder: do not use this cache.")
    return manifest
