"""The manifest of a cache, `manifest.json`: its options, teacher, data and files."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from ..core.files import FileEntry, ShardEntry, atomic_path, checksum_of
from ..core.json_types import JSON, JSONObject
from ..core.references import path_exists
from ..core.results import ServerFacts
from ..errors import DistillError

FORMAT, FILE, HEAD, INDEX = 1, "manifest.json", "head.safetensors", "index.bin"
CAPTURE = "capture.json"  # the manifest of an unfinished cache
_FILE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
Kind = Literal["hidden", "sampled", "top_k"]


class ImportRecord(TypedDict):
    """The source of imported log-probabilities.

    formats:              vllm, distillkit
    files:                the imported files
    served_models:        names of models in the files
    records:              number of records in the files
    unused:               number of records of texts that the recipe does not have
    normalized_positions: positions whose approximate probabilities summed to more than 1 and were divided by their sum
    details:              facts of the format of each file, such as the compression
    """

    formats: list[str]
    files: list[FileEntry]
    served_models: list[str]
    records: int
    unused: int
    normalized_positions: int
    details: NotRequired[list[dict[str, JSON]]]


# "class" is a keyword, so that this type is made by a call.
TeacherRecord = TypedDict(
    "TeacherRecord",
    {
        "model": str | None,
        "revision": NotRequired[str | None],
        "quantization": NotRequired[str | None],
        "class": str,
        "weights": str,
        "imported": NotRequired[ImportRecord],
        "served": NotRequired[ServerFacts],
    },
)


class KindOptions(TypedDict, total=False):
    """Options of a kind of cache; see `CacheOptions`."""

    dtype: str
    layers: list[int]
    samples_per_token: int
    proposal_temperature: float
    seed: int
    k: int
    labels: bool


class DataCounts(TypedDict):
    """Numbers of examples and target tokens of the data, and a fingerprint of all examples."""

    examples: int
    tokens: int
    fingerprint: str


class DataRecord(DataCounts):
    """The data of a cache, and how it is divided; `inputs` are the names of the model inputs other than token ids.

    `context_length`: of a teacher with another tokenizer than the student, the number of tokens at which its rows were
    cut.
    """

    batch_size: int
    shard_rows: int
    max_length: int | None
    inputs: NotRequired[list[str]]
    context_length: NotRequired[int]


@contextmanager
def atomic_cache_file(file: Path) -> Iterator[Path]:
    """Yield a temporary path for a file of a cache; see `atomic_path`.

    Raises:
        DistillError: the disk is full or not writable.
    """
    try:
        with atomic_path(file) as temporary:
            yield temporary
    except OSError as error:
        raise DistillError(
            f"{file} cannot be written ({error.strerror or error}). The files written before it are complete: free "
            "disk space and run the same command again, which resumes there."
        ) from error


class ScalingRecord(TypedDict):
    """The fields of `LogitScaling`."""

    scale: float
    softcap: float | None


@dataclass(frozen=True)
class Manifest:
    """Content of a cache, and the teacher and data that it was written from.

    kind:          hidden: last hidden states, and the output head once; sampled: samples (2503.16870);
                   top_k: log-probabilities
    options:       hidden: dtype, layers; sampled: samples_per_token, proposal_temperature, seed; top_k: k
    temperature:   T of the stored probabilities; None: the cache supports every T
    vocab_size:    V of the teacher
    width:         H of the teacher; None if its logits are not the product of an output head
    depth:         number of layers of the teacher
    scaling:       logit scaling after the output head: scale, softcap
    teacher:       reference, revision and class of the teacher, and a checksum of its weights; class and weights are
                   "unknown" if the cache was imported, or written from a server that does not tell
    tokenizer:     checksum of the tokenizer; None: not known
    chat_template: checksum of the chat template; None: there is none
    data:          number of examples and tokens, max_length, and a fingerprint of all examples
    versions:      versions of the packages that wrote the cache
    recipe:        the recipe that the cache was written from, without URLs of servers; None: a script wrote it
    shards:        {file, examples, tokens, bytes, sha256} of each shard
    index:         {file, bytes, sha256} of the file with all keys, in the order of shards and their rows
    head:          {file, bytes, sha256} of the output head; None if the cache has none
    """

    kind: Kind
    options: KindOptions
    temperature: float | None
    vocab_size: int
    width: int | None
    depth: int
    scaling: ScalingRecord
    teacher: TeacherRecord
    tokenizer: str | None
    chat_template: str | None
    data: DataRecord
    versions: dict[str, str]
    recipe: JSONObject | None = None
    shards: list[ShardEntry] = field(default_factory=list)
    index: FileEntry | None = None
    head: FileEntry | None = None
    format: int = FORMAT

    def differs(self, other: "Manifest") -> list[str]:
        """List the differences between this existing cache and a new one, except files, versions and recipe."""
        ignored = ("shards", "index", "head", "versions", "recipe")
        existing, new = asdict(self), asdict(other)
        return [
            f"{name} is {existing[name]!r} in the existing cache and {new[name]!r} in the new one"
            for name in existing
            if name not in ignored and existing[name] != new[name]
        ]

    @property
    def files(self) -> list[FileEntry]:
        """Entries of all files of the cache except the manifest."""
        return [*self.shards, *(entry for entry in (self.index, self.head) if entry)]

    @property
    def payload(self) -> int:
        """Bytes of all shards, without index and head."""
        return sum(shard["bytes"] for shard in self.shards)

    @property
    def size(self) -> int:
        """Bytes of all files that the manifest lists: shards, index and head."""
        return sum(entry["bytes"] for entry in self.files)

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token in the shards; the head is excluded because it does not grow with the tokens."""
        return self.payload / max(self.data["tokens"], 1)

    def summary(self) -> JSONObject:
        """Return the fields that the results of a run record."""
        values = {name: getattr(self, name) for name in ("kind", "options", "temperature", "teacher", "data")}
        return values | {"bytes_per_token": round(self.bytes_per_token, 2)}

    def write(self, file: Path) -> None:
        """Write the manifest atomically, with a checksum of its content."""
        with atomic_cache_file(file) as temporary:
            temporary.write_text(self.as_text())

    def as_text(self) -> str:
        """Return the content of the manifest file."""
        values = json.loads(json.dumps(asdict(self)))
        return json.dumps({**values, "checksum": checksum_of(values)}, indent=1) + "\n"


def read_manifest(folder: Path, name: str = FILE) -> Manifest:
    """Read the manifest of a cache.

    Args:
        folder: folder of the cache.
        name: name of the file.

    Returns:
        the manifest.

    Raises:
        DistillError: the folder is not a cache, or an unfinished cache, the format is another one, or the manifest is
            damaged.
    """
    file = folder / name
    if not path_exists(file):
        is_unfinished = path_exists(folder / CAPTURE)
        raise DistillError(
            f"{folder} is {'an unfinished cache' if is_unfinished else 'not a cache'}: it has no {FILE}. "
            + ("Run the same command again to resume it."
               if is_unfinished else "Write a cache with `hf-distill cache write RECIPE -o DIR`.")
        )  # fmt: skip
    try:
        values = json.loads(file.read_text())
        checksum = values.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise DistillError(f"{file} is damaged: it is not a JSON manifest. Write the cache again.") from None
    if checksum != checksum_of(values):
        raise DistillError(f"{file} is damaged: its checksum differs. Write the cache again.")
    if values.get("format") != FORMAT:
        raise DistillError(
            f"{folder} has the cache format {values.get('format')!r}, but this version of hf-distill reads format "
            f"{FORMAT}: write the cache again."
        )
    try:
        manifest = Manifest(**{field.name: values[field.name] for field in fields(Manifest)})
        invalid = [str(entry["file"]) for entry in manifest.files if not _FILE_NAME.fullmatch(entry["file"])]
    except (KeyError, TypeError, AttributeError) as error:
        raise DistillError(f"{file} is not the manifest of a cache ({type(error).__name__}: {error}).") from None
    if invalid:
        raise DistillError(f"{file} names {invalid[0]!r}, which is not a file in its folder: do not use this cache.")
    return manifest
