"""Imports published log-probabilities as the `top_k` teacher cache of a recipe.

The rows, their target tokens and the keys of the cache are those of the recipe, so that its training finds them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ...cache import Manifest
from ...cache.api import PACKAGES, CacheOptions
from ...cache.example_keys import other_inputs
from ...cache.fingerprints import template_fingerprint, tokenizer_fingerprint
from ...cache.manifest import ImportRecord, TeacherRecord
from ...cache.writer import CacheProgress, plan_shards, write_shards
from ...core.defaults import SHARD_ROWS
from ...core.files import atomic_path
from ...core.json_types import JSONObject
from ...core.logits import SparseLogProbs
from ...core.processes import run_on_main
from ...core.server_urls import without_servers
from ...core.signals import FeatureKey, Signals
from ...core.targets import FeatureTokens, Targets
from ...errors import DistillError
from ...recipe.schema import Recipe
from ...recipe.tasks import require_text_generation
from ...teachers.remote.rows import token_rows
from ..cache_writer import cached_parts, local_folder
from ..datasets import PreparedData, num_training_rows, prepare_data
from ..distributed import main_process_first
from ..model_loading import load_pretrained, vocabulary_size
from ..training_arguments import arguments
from .distillkit import DistillKitFile
from .matching import Matches, RowIndex, match_records, row_key
from .records import RecordFile, check_record, top_k
from .vllm import VLLMFile

FORMATS = ("vllm", "distillkit")
_VLLM_SUFFIXES = (".jsonl", ".json", ".ndjson")
_KINDS = ("cached", "frozen", "remote")  # of teachers whose recipe can be trained from the cache
_SHIFT = True  # prompt log-probabilities are those of causal language models


@dataclass(frozen=True)
class ImportOptions:
    """Options of an import.

    format:       vllm or distillkit; None: vllm for JSON Lines, distillkit for other files
    compression:  YAML file with the compression of DistillKit; None: `compression_config.yaml` next to the data
    k:            number of ids of each target token; None: that of the files
    teacher:      name of the teacher for the manifest; None: the recipe's teacher, or the name in the files
    vocab_size:   number of ids that the teacher predicts; None: that of the model of the recipe's tokenizer
    allow_unused: whether records of other texts are skipped; otherwise they are refused
    shard_rows:   rows of a shard

    Raises:
        DistillError: a value is out of range.
    """

    format: str | None = None
    compression: str | None = None
    k: int | None = None
    teacher: str | None = None
    vocab_size: int | None = None
    allow_unused: bool = False
    shard_rows: int = SHARD_ROWS

    def __post_init__(self) -> None:
        if self.format not in (None, *FORMATS):
            raise DistillError(f"The format is {self.format!r}; it must be one of {', '.join(FORMATS)}.")
        if self.vocab_size is not None and self.vocab_size < 2:
            raise DistillError(f"The vocabulary size is {self.vocab_size}; it must be 2 or more.")
        if self.shard_rows < 1:
            raise DistillError(f"shard_rows is {self.shard_rows}; it must be 1 or more.")
        if self.k is not None:
            CacheOptions(kind="top_k", k=self.k)


@dataclass(frozen=True)
class ImportSummary:
    """The result of an import.

    folder:   the cache; None if rows have no record, and their token ids were written instead
    manifest: the manifest of the cache, or None
    matches:  numbers of records
    rows:     number of different texts of the recipe
    missing:  number of those without a record
    """

    folder: Path | None
    manifest: Manifest | None
    matches: Matches
    rows: int
    missing: int


def import_cache(
    recipe: Recipe,
    files: Sequence[str],
    folder: str | None = None,
    *,
    missing_file: str | None = None,
    on_stage: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[CacheProgress], None] = lambda progress: None,
    **options: Any,
) -> ImportSummary:
    """Write the log-probabilities of some files as the `top_k` cache of a recipe; an interrupted write is continued.

    Every record is checked before anything is written.

    Args:
        recipe: Recipe that will be trained from the cache, at temperature 1.
        files: Files of vLLM's prompt log-probabilities, or files and folders of DistillKit.
        folder: Folder of the cache. None: the `path` of the cached teacher.
        missing_file: If rows have no record, their token ids are written to this JSON Lines file, and no cache is
            written. None: such rows are refused.
        on_stage: Called with a short description of each stage when it begins.
        on_progress: See `write_cache`.
        options: See `ImportOptions`.

    Raises:
        DistillError: A file, a record or an option is invalid, rows have no record, or the folder holds another cache.
    """
    chosen = ImportOptions(**options)
    to = _check_recipe(recipe, folder)
    _check_files(files, is_optional=missing_file is not None)
    args = arguments(recipe)
    on_stage(f"Loading the tokenizer of {recipe.tokenizer_model}")
    tokenizer = load_pretrained(AutoTokenizer, recipe.tokenizer_model, revision=recipe.tokenizer_revision)
    with main_process_first(args):
        data = prepare_data(recipe, tokenizer, args.seed, num_training_rows(args))
    vocab_size = chosen.vocab_size or (recipe.teacher.vocab_size if recipe.teacher else None)
    vocab_size = vocab_size or vocabulary_size(recipe.tokenizer_model, recipe.tokenizer_revision)
    sources = [_open(Path(file), chosen, tokenizer) for file in files]
    on_stage("Preparing the rows to write")
    batch_size, shard_rows = args.per_device_train_batch_size, chosen.shard_rows
    plan, counts = plan_shards(cached_parts(data), _collate_token_inputs(data), batch_size, shard_rows, _SHIFT)
    index = RowIndex(plan, _SHIFT)
    matches = match_records(
        sources, index, vocab_size, chosen.k, chosen.allow_unused, lambda i: on_stage(f"Checking {files[i]}")
    )
    missing = [row.tokens for key, row in index.rows.items() if key not in matches.locations]
    if missing and missing_file is None:
        raise DistillError(_missing_message(missing, len(index.rows), tokenizer))
    if missing:
        run_on_main(lambda: _write_lines(missing, "prompt_token_ids", Path(str(missing_file))))
        return ImportSummary(None, None, matches, len(index.rows), len(missing))
    plain = cast(JSONObject, recipe.model_dump(exclude_none=True))
    max_length = cast(int | None, cast(JSONObject, plain["data"]).get("max_length"))
    manifest = Manifest(
        kind="top_k",
        options={"k": min(matches.k, vocab_size)},
        temperature=1.0,
        vocab_size=vocab_size,
        width=None,
        depth=0,
        scaling={"scale": 1.0, "softcap": None},
        teacher=_describe_teacher(chosen.teacher or recipe.primary_teacher.model, sources, matches),
        tokenizer=tokenizer_fingerprint(tokenizer),
        chat_template=template_fingerprint(tokenizer),
        data={**counts, "batch_size": batch_size, "shard_rows": shard_rows, "max_length": max_length},
        versions={name: version(name) for name in PACKAGES},
        recipe=without_servers(plain),
    )
    reader = _RecordTeacher(sources, matches, vocab_size)
    written = write_shards(reader, plan, manifest, Path(to), torch.device("cpu"), _SHIFT, on_progress)
    return ImportSummary(Path(to), written, matches, len(index.rows), 0)


def write_texts(
    files: Sequence[str],
    rows_file: str,
    model: str,
    revision: str | None = None,
    on_stage: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> int:
    """Write the token ids of the texts of some files as a JSON Lines file that a recipe can use as its data.

    Published log-probabilities often come without the text they were computed for. A recipe whose `data.task.path` is
    this file has their texts as its rows, so that they can be imported for it.

    Args:
        files: See `import_cache`.
        rows_file: File to write, with `input_ids` on each line.
        model: Id or path of a model with the tokenizer of the texts, such as the student.
        revision: Its revision.
        on_stage: Called with a short description of each stage when it begins.
        options: See `ImportOptions`.

    Returns:
        The number of texts.

    Raises:
        DistillError: A file, a record or an option is invalid.
    """
    chosen = ImportOptions(**options)
    _check_files(files, is_optional=False)
    on_stage(f"Loading the tokenizer of {model}")
    tokenizer = load_pretrained(AutoTokenizer, model, revision=revision)
    vocab_size = chosen.vocab_size or vocabulary_size(model, revision)

    def texts() -> Iterator[np.ndarray]:
        for file in files:
            on_stage(f"Checking {file}")
            for _, record in _open(Path(file), chosen, tokenizer).records():
                check_record(record, vocab_size)
                if len(record.tokens) > 1:
                    yield record.tokens

    return run_on_main(lambda: _write_lines(texts(), "input_ids", Path(rows_file)))


class _RecordTeacher:
    """Returns the log-probabilities of a batch from the matched records."""

    def __init__(self, sources: Sequence[RecordFile], matches: Matches, vocab_size: int):
        self._sources, self._matches, self._vocab_size = sources, matches, vocab_size

    def __call__(self, inputs: dict, targets: Targets, features: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Return the log-probabilities of the target tokens of a batch."""
        parts = []
        for row in token_rows(inputs, targets):
            source, location = self._matches.locations[row_key(row)]
            record = self._sources[source].read(location)
            parts.append(top_k(record, np.array(row.positions), self._matches.k))
        ids, log_probs = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
        log_tail = (-torch.expm1(torch.logsumexp(log_probs, -1))).clamp(min=0).log()
        return Signals(SparseLogProbs(ids, log_probs, log_tail, vocab_size=self._vocab_size))


def _check_recipe(recipe: Recipe, folder: str | None) -> str:
    """Check that a recipe can be trained from imported log-probabilities, and return the folder of the cache."""
    require_text_generation(recipe, "The import of log-probabilities")
    spec = recipe.teacher
    if spec is None or spec.kind not in _KINDS or recipe.on_policy:
        raise DistillError(
            "The recipe of an import has one teacher of kind cached (or frozen, or remote) and is not on-policy, "
            "because a cache holds the outputs of one teacher for the rows of the data. Set teacher to "
            "{kind: cached, path: DIR}."
        )
    if recipe.is_cross_tokenizer:
        raise DistillError(
            "The recipe has distill.cross_tokenizer, and log-probabilities are imported for the student's tokens. "
            "Write the cache of a teacher with another tokenizer with `hf-distill cache write`."
        )
    if (cut := recipe.student.from_teacher) is not None and cut.vocab is not None:
        raise DistillError(
            "The recipe has student.from_teacher.vocab, and log-probabilities are imported for the ids of the full "
            "vocabulary, of which the share of the removed ones is not known. Write the cache with "
            "`hf-distill cache write`."
        )
    if recipe.distill.temperature != 1:
        raise DistillError(
            f"The recipe has the temperature {recipe.distill.temperature:g}, and published log-probabilities are those "
            "at temperature 1, from which others cannot be computed. Set distill.temperature to 1, also with "
            "--set distill.temperature=1."
        )
    return local_folder(recipe, folder)


def _check_files(files: Sequence[str], is_optional: bool) -> None:
    if not files and not is_optional:
        raise DistillError("There are no files to import. Pass files, or --missing FILE to write what is needed.")
    if absent := [file for file in files if not Path(file).exists()]:
        raise DistillError(f"{', '.join(absent)}: there is no such file or folder.")


def _open(path: Path, options: ImportOptions, tokenizer: PreTrainedTokenizerBase) -> RecordFile:
    is_lines = path.is_file() and path.suffix in _VLLM_SUFFIXES
    if (options.format or ("vllm" if is_lines else "distillkit")) == "vllm":
        if path.is_dir():
            raise DistillError(f"{path} is a folder: pass its JSON Lines files.")
        return VLLMFile(path, tokenizer)
    return DistillKitFile(path, None if options.compression is None else Path(options.compression))


def _collate_token_inputs(data: PreparedData) -> Callable[[list], dict]:
    """Return the collator without inputs that the teacher did not read: a cached teacher ignores them as well."""

    def collate(rows: list) -> dict:
        batch = data.collator(rows)
        foreign = {*other_inputs(batch)}
        return {name: value for name, value in batch.items() if name not in foreign}

    return collate


def _describe_teacher(name: str | None, sources: Sequence[RecordFile], matches: Matches) -> TeacherRecord:
    described = [source.provenance() for source in sources]
    record: ImportRecord = {
        "formats": sorted({each.format for each in described}),
        "files": [entry for each in described for entry in each.files],
        "served_models": matches.models,
        "records": matches.records,
        "unused": matches.unused,
        "normalized_positions": matches.normalized,
    }
    if details := [each.details for each in described if each.details]:
        record["details"] = details
    name = name or next(iter(matches.models), None)
    return TeacherRecord(**{"model": name, "class": "unknown", "weights": "unknown", "imported": record})


def _missing_message(missing: Sequence[np.ndarray], rows: int, tokenizer: PreTrainedTokenizerBase) -> str:
    return (
        f"{len(missing)} of the {rows} different training and held-out rows of the recipe have no record. The first of "
        f"them begins with {str(tokenizer.decode(missing[0][:24].tolist()))!r}. Add files with the log-probabilities "
        "of these rows; --missing FILE writes their token ids to a file, to request them from the teacher."
    )


def _write_lines(texts: Iterable[np.ndarray], key: str, file: Path) -> int:
    """Write the token ids of texts, an object on each line, and return the number of texts."""
    count = 0
    with atomic_path(file) as temporary, temporary.open("w") as lines:
        for tokens in texts:
            lines.write(json.dumps({key: tokens.tolist()}) + "\n")
            count += 1
    return count
