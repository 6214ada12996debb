"""Recognizes a generated data set that is complete, without loading its teacher."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from ..cache.fingerprints import template_fingerprint, tokenizer_fingerprint
from ..cache.manifest import FILE as MANIFEST
from ..core.files import file_entry
from ..core.json_types import JSON, JSONObject
from ..core.references import reference_kind
from ..filters import StepCount
from ..filters.contamination import Decontaminate
from ..filters.selections import LOG_PROBABILITY, BestOfN
from ..filters.user_functions import FunctionFilter, load_function
from ..generation.completion import Prompt
from ..generation.prompts import SourceRow
from ..generation.store import DATA, read_facts
from ..recipe.generation import Generation
from ..recipe.schema import Recipe
from .generation_cache import CACHE, student_tokenizer

# Keys of `generate` that change where or how fast a data set is generated, but not its content.
_KEYS_WITHOUT_EFFECT = (
    "url",
    "api_key_env",
    "concurrency",
    "timeout",
    "retry_seconds",
    "batching",
    "batch_size",
    "output_dir",
)
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".json")


@dataclass(frozen=True)
class GeneratedData:
    """The result of a generation.

    folder:      the folder
    completions: number of generated completions
    rows:        number of rows that the filters kept
    tokens:      number of generated tokens
    counts:      counts of each filter, the selection last
    cache:       folder of the teacher cache; None if the recipe requests none
    """

    folder: Path
    completions: int
    rows: int
    tokens: int
    counts: list[StepCount]
    cache: Path | None = None

    def as_facts(self) -> JSONObject:
        """Return the numbers and counts for the record of the data set."""
        counts: list[JSON] = [asdict(count) for count in self.counts]
        return {"completions": self.completions, "rows": self.rows, "tokens": self.tokens, "counts": counts}


def request_of(recipe: Recipe, options: Generation, sources: Sequence[SourceRow]) -> JSONObject:
    """Return what a recipe requests: teacher, settings with the filters, and prompts.

    A complete data set of the same request needs no teacher. The weights of a teacher in a local folder are compared by
    the sizes and times of their files.
    """
    settings = options.model_dump(mode="json", exclude={*_KEYS_WITHOUT_EFFECT})
    settings |= {"chat_template": recipe.data.chat_template, "digest": digest_of([row.prompt for row in sources])}
    spec = recipe.teacher.source_teacher if recipe.teacher else None
    if options.backend == "server" or spec is None:
        return settings
    settings |= {f"teacher.{key}": getattr(spec, key) for key in ("model", "revision", "dtype", "quantization")}
    if reference_kind(str(spec.loaded_model)) == "path":
        files = [file for file in sorted(Path(str(spec.loaded_model)).glob("*")) if file.suffix in _WEIGHTS]
        settings["weights"] = _stamps(files)
    return settings


def filter_files(options: Generation) -> JSON:
    """Return the local files that the filters read, with checksums: modules of functions, evaluation tasks.

    Raises:
        DistillError: a module cannot be imported.
    """
    files = list[Path]()
    for step in [*options.filters, *([options.select] if options.select else [])]:
        function = step.function if isinstance(step, FunctionFilter) else None
        if isinstance(step, BestOfN) and step.score != LOG_PROBABILITY:
            function = step.score
        if function is not None:
            load_function(function)
            files.append(Path(str(sys.modules[function.partition(":")[0]].__file__)))
        if isinstance(step, Decontaminate):
            files += [Path(data.path) for data in step.data if reference_kind(data.path) == "path"]
    return _checksums(files)


def cache_request(recipe: Recipe) -> str:
    """Return a digest of what determines the teacher cache of a data set, except for the data set and the teacher.

    These are the values of the recipe, the student's tokenizer with its template, and local files of data.
    """
    values = recipe.model_dump(mode="json", exclude={"generate", "teacher"})
    tokenizer = student_tokenizer(recipe)
    paths = [*(source.path for source in recipe.data.sources.values()), recipe.data.eval.path]
    files = [Path(path) for path in paths if path is not None and reference_kind(path) == "path"]
    read = [values, tokenizer_fingerprint(tokenizer), template_fingerprint(tokenizer), _checksums(files)]
    return hashlib.sha256(json.dumps(read, sort_keys=True, default=str).encode()).hexdigest()


def complete_data(folder: Path, recipe: Recipe, options: Generation, request: JSONObject) -> GeneratedData | None:
    """Return the data set in a folder if it is exactly what a recipe requests; None if anything of it is missing.

    Args:
        folder: The folder.
        recipe: The recipe.
        options: Its section `generate`.
        request: See `request_of`.
    """
    facts = read_facts(folder)
    result = cast(dict[str, Any] | None, facts.get("result"))
    if result is None or facts.get("request") != request or facts.get("filter_files") != filter_files(options):
        return None
    if not any((folder / DATA).glob("*.parquet")):
        return None
    has_cache = (folder / CACHE / MANIFEST).is_file()
    if options.cache is not None and not (has_cache and facts.get("cache_request") == cache_request(recipe)):
        return None
    counts = [StepCount(**count) for count in result["counts"]]
    cache = None if options.cache is None else folder / CACHE
    return GeneratedData(folder, result["completions"], result["rows"], result["tokens"], counts, cache)


def digest_of(prompts: Sequence[Prompt]) -> str:
    """Return a digest of prompts, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        values = [prompt.source, prompt.row, prompt.content, prompt.tools]
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _stamps(files: Sequence[Path]) -> list[JSON]:
    """Return the names of files, with their sizes in bytes and times in ns."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _checksums(paths: Sequence[Path]) -> list[JSON]:
    """Return the names of files that exist, with checksums; folders stand for the files in them."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [[file.name, file_entry(file)["sha256"]] for file in files if file.is_file()]
