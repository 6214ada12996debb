"""Imports published log-probabilities as the `top_k` teacher cache of a recipe.

The rows, their target tokens and the keys of the cache are those of the recipe, so that its training finds them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ...cache import Manifest
from ...cache.api import PACKAGES, CacheOptions
from ...cache.example_keys import other_inputs
from ...cache.fingerprints import template_fingerprint, tokenizer_fingerprint
from ...cache.manifest import ImportRecord
from ...cache.writer import CacheProgress, plan_shards, write_shards
from ...core.defaults import SHARD_ROWS
from ...core.files import atomic_path
from ...core.json_types import JSONObject
from ...core.logits import SparseLogProbs
from ...core.references import reference_kind
from ...core.signals import FeatureKey, Signals
from ...core.targets import FeatureTokens, Targets
from ...errors import DistillError
from ...recipe.schema import Recipe
from ...teachers.remote.rows import token_rows
from ..datasets import PreparedData, num_training_rows, prepare_data
from ..model_loading import load_pretrained
from ..training_arguments import arguments
from .distillkit import DistillKitFile
from .matching import Matches, RowIndex, match_records, needed_tokens, row_key
from .records import RecordFile, top_k
from .vllm import VLLMFile

FORMATS = ("vllm", "distillkit")
_VLLM_SUFFIXES = (".jsonl", ".json", ".ndjson")
_KINDS = ("cached", "frozen", "remote")  # of teachers whose recipe can be trained from the cache
_SHIFT = True  # prompt log-probabilities are those of causal language models


@dataclass(frozen=True)
class ImportSummary:
    """What an import did.

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
    format: str | None = None,
    compression: str | None = None,
    k: int | None = None,
    teacher: str | None = None,
    vocab_size: int | None = None,
    allow_unused: bool = False,
    missing_file: str | None = None,
    shard_rows: int = SHARD_ROWS,
    on_stage: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[CacheProgress], None] = lambda progress: None,
) -> ImportSummary:
    """Write the log-probabilities of some files as the `top_k` cache of a recipe; an interrupted write is continued.

    Every record is checked before anything is written.

    Args:
        recipe: Recipe that will be trained from the cache, at temperature 1.
        files: Files of vLLM's prompt log-probabilities, or files and folders of DistillKit.
        folder: Folder of the cache. None: the `path` of the cached teacher.
        format: vllm or distillkit. None: vllm for JSON Lines, distillkit for other files.
        compression: YAML file with the compression of DistillKit. None: `compression_config.yaml` next to the data.
        k: Number of ids of each target token. None: that of the files.
        teacher: Name of the teacher for the manifest. None: the source of the recipe's teacher, or the name in the
            files.
        vocab_size: Number of ids that the teacher predicts. None: that of the model of the recipe's tokenizer.
        allow_unused: Whether records of other texts are skipped; otherwise they are refused.
        missing_file: If rows have no record, their token ids are written to this JSON Lines file, and no cache is
            written. None: such rows are refused.
        shard_rows: Rows of a shard.
        on_stage: Called with a short description of each stage when it begins.
        on_progress: See `write_cache`.

    Raises:
        DistillError: A file, a record or an option is invalid, rows have no record, or the folder holds another cache.
    """
    to = _check_options(recipe, files, folder, format, k, vocab_size, missing_file)
    args = arguments(recipe)
    on_stage(f"Loading the tokenizer of {recipe.tokenizer_model}")
    tokenizer = load_pretrained(AutoTokenizer, recipe.tokenizer_model, revision=recipe.tokenizer_revision)
    data = prepare_data(recipe, tokenizer, args.seed, num_training_rows(args))
    vocab_size = vocab_size or _teacher_vocab_size(recipe)
    sources = [_open(Path(file), format, compression, tokenizer) for file in files]
    on_stage("Preparing the rows to write")
    batch_size = args.per_device_train_batch_size
    plan, counts = plan_shards(_parts(data), _collate_token_inputs(data), batch_size, shard_rows, _SHIFT)
    index = RowIndex(plan, _SHIFT)
    matches = match_records(
        sources, index, vocab_size, k, allow_unused, lambda number: on_stage(f"Checking {files[number]}")
    )
    missing = [row for key, row in index.rows.items() if key not in matches.locations]
    if missing:
        if missing_file is None:
            raise DistillError(_missing_message([needed_tokens(row) for row in missing], len(index.rows), tokenizer))
        _write_missing([needed_tokens(row) for row in missing], Path(missing_file))
        return ImportSummary(None, None, matches, len(index.rows), len(missing))
    values = recipe.model_dump(exclude_none=True)
    name = teacher or recipe.primary_teacher.model or next(iter(matches.models), None)
    manifest = Manifest(
        kind="top_k",
        options={"k": min(matches.k, vocab_size)},
        temperature=1.0,
        vocab_size=vocab_size,
        width=None,
        depth=0,
        scaling={"scale": 1.0, "softcap": None},
        teacher={
            "model": name,
            "class": "unknown",
            "weights": "unknown",
            "imported": _describe_sources(sources, matches),
        },
        tokenizer=tokenizer_fingerprint(tokenizer),
        chat_template=template_fingerprint(tokenizer),
        data={
            **counts,
            "batch_size": batch_size,
            "shard_rows": shard_rows,
            "max_length": cast(int | None, values["data"].get("max_length")),
        },
        versions={name: version(name) for name in PACKAGES},
        recipe=cast(JSONObject, values),
    )
    reader = _RecordTeacher(sources, matches, vocab_size)
    written = write_shards(reader, plan, manifest, Path(to), torch.device("cpu"), _SHIFT, on_progress)
    return ImportSummary(Path(to), written, matches, len(index.rows), 0)


class _RecordTeacher:
    """Returns the log-probabilities of a batch from the matched records."""

    def __init__(self, sources: Sequence[RecordFile], matches: Matches, vocab_size: int):
        self._sources, self._matches, self._vocab_size = sources, matches, vocab_size

    def __call__(self, inputs: dict, targets: Targets, features: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Return the log-probabilities of the target tokens of a batch."""
        parts = []
        for row in token_rows(inputs, targets):
            source, location = self._matches.locations[row_key(needed_tokens(row))]
            record = self._sources[source].read(location)
            parts.append(top_k(record, np.array(row.positions), self._matches.k))
        ids, log_probs = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
        log_tail = (-torch.expm1(torch.logsumexp(log_probs, -1))).clamp(min=0).log()
        return Signals(SparseLogProbs(ids, log_probs, log_tail, vocab_size=self._vocab_size))


def _check_options(
    recipe: Recipe,
    files: Sequence[str],
    folder: str | None,
    format: str | None,
    k: int | None,
    vocab_size: int | None,
    missing_file: str | None,
) -> str:
    """Check the options before anything is loaded, and return the folder of the cache."""
    spec = recipe.teacher
    if spec is None or spec.kind not in _KINDS or recipe.on_policy:
        raise DistillError(
            "The recipe of an import has one teacher of kind cached (or frozen, or remote) and is not on-policy, "
            "because a cache holds the outputs of one teacher for the rows of the data. Set teacher to "
            "{kind: cached, path: DIR}."
        )
    if recipe.distill.temperature != 1:
        raise DistillError(
            f"The recipe has the temperature {recipe.distill.temperature:g}, and published log-probabilities are those "
            "at temperature 1, from which others cannot be computed. Set distill.temperature to 1, also with "
            "--set distill.temperature=1."
        )
    if not files and missing_file is None:
        raise DistillError("There are no files to import. Pass files, or --missing FILE to write what is needed.")
    if absent := [file for file in files if not Path(file).exists()]:
        raise DistillError(f"{', '.join(absent)}: there is no such file or folder.")
    if format not in (None, *FORMATS):
        raise DistillError(f"The format is {format!r}; it must be one of {', '.join(FORMATS)}.")
    if vocab_size is not None and vocab_size < 2:
        raise DistillError(f"The vocabulary size is {vocab_size}; it must be 2 or more.")
    if k is not None:
        CacheOptions(kind="top_k", k=k)
    to = folder or (spec.path if spec.kind == "cached" else None)
    if to is None or reference_kind(to) == "address":
        raise DistillError("A cache is written to a local folder, and none is given. Pass one with -o.")
    return to


def _open(
    path: Path, format: str | None, compression: str | None, tokenizer: PreTrainedTokenizerBase
) -> VLLMFile | DistillKitFile:
    is_lines = path.is_file() and path.suffix in _VLLM_SUFFIXES
    if (format or ("vllm" if is_lines else "distillkit")) == "vllm":
        if path.is_dir():
            raise DistillError(f"{path} is a folder: pass its JSON Lines files.")
        return VLLMFile(path, tokenizer)
    return DistillKitFile(path, None if compression is None else Path(compression))


def _teacher_vocab_size(recipe: Recipe) -> int:
    """Return the vocabulary size of the model whose tokenizer the recipe uses."""
    if recipe.teacher and recipe.teacher.vocab_size:
        return recipe.teacher.vocab_size
    config = load_pretrained(AutoConfig, recipe.tokenizer_model, revision=recipe.tokenizer_revision)
    return int(config.get_text_config().vocab_size)


def _parts(data: PreparedData) -> list:
    if not hasattr(data.train, "__len__"):
        raise DistillError(
            "A streamed source cannot be cached, because its length is not known. Set streaming to false in all "
            "sources."
        )
    return [data.train, data.held_out]


def _collate_token_inputs(data: PreparedData) -> Callable[[list], dict]:
    """Return the collator without inputs that the teacher did not read: a cached teacher ignores them as well."""

    def collate(rows: list) -> dict:
        batch = data.collator(rows)
        foreign = {*other_inputs(batch)}
        return {name: value for name, value in batch.items() if name not in foreign}

    return collate


def _describe_sources(sources: Sequence[VLLMFile | DistillKitFile], matches: Matches) -> ImportRecord:
    described = [source.provenance() for source in sources]
    details = [each.details for each in described if each.details]
    record: ImportRecord = {
        "formats": sorted({each.format for each in described}),
        "files": [entry for each in described for entry in each.files],
        "served_models": matches.models,
        "records": matches.records,
        "unused": matches.unused,
        "normalized_positions": matches.normalized,
    }
    if details:
        record["details"] = details
    return record


def _missing_message(missing: Sequence[Sequence[int]], rows: int, tokenizer: PreTrainedTokenizerBase) -> str:
    return (
        f"{len(missing)} of the {rows} different training and held-out rows of the recipe have no record. The first of "
        f"them begins with {str(tokenizer.decode(list(missing[0][:24])))!r}. Add files with the log-probabilities of "
        "these rows; --missing FILE writes their token ids to a file, to request them from the teacher."
    )


def _write_missing(missing: Sequence[Sequence[int]], file: Path) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text("".join(json.dumps({"prompt_token_ids": list(ids)}) + "\n" for ids in missing))
