"""Generates a data set: the teacher of a recipe completes the prompts of its sources."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..cache.fingerprints import weights_fingerprint
from ..core.defaults import CONCURRENT_REQUESTS, REQUEST_TIMEOUT_SECONDS, RETRY_SECONDS
from ..core.json_types import JSONObject
from ..core.locks import LOCK_FILE, lock_folder, remove_lock_file
from ..core.references import public_name, reference_kind
from ..data.load import load_columns
from ..data.training_templates import training_template
from ..errors import DistillError
from ..filters import StepCount, apply_filters, check_filters
from ..generation.backends.api import Backend
from ..generation.backends.local import TransformersBackend
from ..generation.backends.server import ServerBackend
from ..generation.backends.vllm import VLLMBackend
from ..generation.card import CardFacts, render_card
from ..generation.completion import Completion, Part, Prompt, Request, SamplingSettings, make_parts
from ..generation.dataset import column_names, make_rows, make_table
from ..generation.evaluation import Evaluation, evaluate_data_set
from ..generation.progress import GenerationProgress, ProgressMeter
from ..generation.prompts import PromptRenderer, SourceRow, read_source, with_system_prompt
from ..generation.reasoning import ends_with_open_tag
from ..generation.store import CompletionStore
from ..recipe.generation import Generation
from ..recipe.models import TeacherSpec
from ..recipe.schema import Recipe
from ..recipe.tasks import require_text_generation
from ..teachers.loading import direct_loading, dtype_of, env_world_size, quantization_config
from ..teachers.remote.pool import ServerPool
from .model_loading import load_pretrained, resolve_model
from .teacher_only import static_teacher_spec

logger = logging.get_logger(__name__)
_NO_IDENTITY = {
    *("backend", "url", "model", "api_key_env", "concurrency", "timeout", "retry_seconds", "batching", "batch_size"),
    *("reasoning", "reasoning_tags", "filters", "select", "output_dir"),
}  # keys of `generate` that do not change the completions, or are part of the identity of the backend
# Keys of `generate` that do not change the data set.
_PACE = ("url", "api_key_env", "concurrency", "timeout", "retry_seconds", "batching", "batch_size", "output_dir")
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".json")


@dataclass(frozen=True)
class GeneratedData:
    """What a generation has written.

    folder:      the folder
    completions: number of generated completions
    rows:        number of rows that the filters kept
    tokens:      number of generated tokens
    counts:      counts of each filter, the selection last
    """

    folder: Path
    completions: int
    rows: int
    tokens: int
    counts: list[StepCount]


def generate_data(
    recipe: Recipe,
    folder: str,
    resume: bool = False,
    on_stage: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[GenerationProgress], None] = lambda progress: None,
    sources: Sequence[SourceRow] | None = None,
) -> GeneratedData:
    """Complete the prompts of a recipe, and write the completions as a data set.

    After an interruption, `resume` generates the parts that are missing.

    Args:
        recipe: The recipe; without a section `generate` its defaults apply.
        folder: Folder of the data set.
        resume: Whether to continue a data set.
        on_stage: Called with a short description of each stage when it begins.
        on_progress: Called at most twice a second.
        sources: The prompts; None: those of all sources.

    Raises:
        DistillError: The recipe, the data or the folder is not possible.
        RunError: A server failed.
    """
    require_text_generation(recipe, "`hf-distill generate`")
    if reference_kind(folder) == "address":
        raise DistillError(f"A data set is generated into a local folder, and -o is {folder}: give a folder.")
    if env_world_size() > 1:
        raise DistillError("`hf-distill generate` runs in one process: start it without a launcher.")
    options = recipe.generate or Generation.model_validate({})
    if sources is None:
        on_stage("Reading the prompts")
        sources = read_prompts(recipe, options)
    check_filters(options.filters, options.select, column_names(sources, options.reasoning, options.log_probs))
    request = request_of(recipe, options, sources)
    with _claimed(Path(folder)):
        if options.backend == "server":
            opened: dict[int, bool] = {}
            backend: Backend = _server_backend(options)
        else:
            sources, opened, backend = _local_backend(recipe, options, sources, on_stage)
        try:
            return _generate(
                recipe, options, Path(folder), sources, opened, backend, resume, request, on_stage, on_progress
            )
        finally:
            backend.close()


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Lock a folder while the block runs. A generation that is refused before it has saved anything leaves no files."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    with lock_folder(folder, "a generation"):
        try:
            yield
        except BaseException:
            if folder in created and {path.name for path in folder.iterdir()} == {LOCK_FILE}:
                remove_lock_file(folder)
                for path in created:
                    with suppress(OSError):  # another process has written into it
                        path.rmdir()
            raise


def read_prompts(recipe: Recipe, options: Generation) -> list[SourceRow]:
    """Return the prompts of all sources.

    Raises:
        DistillError: A source is streamed, or has no prompts.
    """
    prompts = list[SourceRow]()
    for name in recipe.data.sources:
        prompts += read_prompts_of(recipe, options, name, len(prompts))
    return prompts


def read_prompts_of(
    recipe: Recipe, options: Generation, name: str, first: int = 0, select: Callable[[int], Sequence[int]] | None = None
) -> list[SourceRow]:
    """Return the prompts of one source.

    Args:
        recipe: The recipe.
        options: Its section `generate`.
        name: Name of the source.
        first: Index of its first prompt.
        select: Returns the numbers of the rows that are read, from the number of all rows; None: all rows.

    Raises:
        DistillError: The source is streamed, or has no prompts.
    """
    source = recipe.data.sources[name]
    if source.streaming:
        raise DistillError(
            f"data.{name}.streaming: prompts of a stream cannot be resumed: set it to false; max_prompts reads the "
            "first ones."
        )
    rows = load_columns(source.path, source.split, source.name)
    if source.column is not None:
        if source.column not in rows.column_names:
            raise DistillError(f"data.{name} has no column {source.column!r}; it has {rows.column_names}.")
        if source.column != "prompt":
            rows = rows.remove_columns([name for name in ("prompt",) if name in rows.column_names])
            rows = rows.rename_columns({source.column: "prompt"})
    numbers = [*range(len(rows))] if select is None else select(len(rows))
    numbers = numbers[: options.max_prompts]
    prompts = [*read_source(rows.select(numbers), name, first, options.chat, numbers)]
    for row in prompts[:1] if options.system_prompt else []:
        with_system_prompt(row.prompt, options.system_prompt)
    return prompts


def request_of(recipe: Recipe, options: Generation, sources: Sequence[SourceRow]) -> JSONObject:
    """Return what a recipe requests: teacher, settings with the filters, and prompts.

    A complete data set of the same request needs no teacher. The weights of a teacher in a local folder are compared by
    the sizes and times of their files.
    """
    settings = options.model_dump(mode="json", exclude={*_PACE})
    settings |= {"chat_template": recipe.data.chat_template, "digest": _digest([row.prompt for row in sources])}
    spec = recipe.teacher.source_teacher if recipe.teacher else None
    if options.backend == "server" or spec is None:
        return settings
    settings |= {f"teacher.{key}": getattr(spec, key) for key in ("model", "revision", "dtype", "quantization")}
    if reference_kind(str(spec.loaded_model)) == "path":
        files = [file for file in sorted(Path(str(spec.loaded_model)).glob("*")) if file.suffix in _WEIGHTS]
        settings["weights"] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return settings


def _settings(options: Generation) -> SamplingSettings:
    return SamplingSettings(
        options.temperature, options.top_p, options.max_new_tokens, tuple(options.stop), options.log_probs
    )


def _server_backend(options: Generation) -> ServerBackend:
    if options.url is None:
        raise DistillError("generate.backend server needs a URL: pass generate.url=http://HOST:PORT.")
    pool = ServerPool(
        options.url,
        timeout=options.timeout or REQUEST_TIMEOUT_SECONDS,
        retry_seconds=RETRY_SECONDS if options.retry_seconds is None else options.retry_seconds,
        concurrency=options.concurrency or CONCURRENT_REQUESTS,
        api_key_env=options.api_key_env,
    )
    return ServerBackend(pool, options.model, _settings(options), options.reasoning_tags, options.chat_template_kwargs)


def _local_backend(
    recipe: Recipe, options: Generation, sources: Sequence[SourceRow], on_stage: Callable[[str], None]
) -> tuple[list[SourceRow], dict[int, bool], Backend]:
    """Return the prompts that fit into the context, whether each ends with the tag of reasoning, and the backend."""
    spec = static_teacher_spec(recipe)
    if spec.deepspeed or spec.fsdp:
        raise DistillError("`hf-distill generate` does not shard the teacher: use teacher.device_map, or a server.")
    path = resolve_model(str(spec.loaded_model))
    tokenizer = load_pretrained(AutoTokenizer, str(spec.loaded_model), revision=spec.revision)
    config = load_pretrained(AutoConfig, str(spec.loaded_model), revision=spec.revision)
    template = None if recipe.data.chat_template is None else training_template(recipe.data.chat_template)
    renderer = PromptRenderer(tokenizer, template, options.chat_template_kwargs)
    prompts = {row.prompt.index: with_system_prompt(row.prompt, options.system_prompt) for row in sources}
    ids = {index: renderer.ids(prompt) for index, prompt in prompts.items()}
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    kept = _fitting(sources, {index: len(each) for index, each in ids.items()}, context, options)
    opened = {row.prompt.index: _is_open(renderer, prompts[row.prompt.index], options) for row in kept}

    def encode(request: Request) -> list[int]:
        return ids[request.prompt.index]

    identity: JSONObject = {"model": str(spec.loaded_model), "revision": spec.revision, "dtype": spec.dtype}
    identity["quantization"] = spec.quantization
    on_stage(f"Loading {spec.loaded_model}")
    if options.backend == "vllm":
        engine = {"revision": spec.revision, "dtype": spec.dtype, "max_num_seqs": options.batch_size}
        return kept, opened, VLLMBackend(path, engine, encode, _settings(options), identity)
    model = _load_model(spec, config)
    identity["weights"] = weights_fingerprint(model)
    backend = TransformersBackend(
        model, tokenizer, encode, _settings(options), options.batching, options.batch_size, identity
    )
    return kept, opened, backend


def _is_open(renderer: PromptRenderer, prompt: Prompt, options: Generation) -> bool:
    return not isinstance(prompt.content, str) and ends_with_open_tag(renderer.text(prompt), options.reasoning_tags)


def _fitting(
    sources: Sequence[SourceRow], lengths: Mapping[int, int], context: int | None, options: Generation
) -> list[SourceRow]:
    """Return the prompts that fit into the context together with their completions.

    Raises:
        DistillError: Some do not fit and `overflow` is error, or none fits.
    """
    limit = None if context is None else context - options.max_new_tokens
    long = [row for row in sources if limit is not None and lengths[row.prompt.index] > limit]
    if not long:
        return list(sources)
    first = long[0].prompt
    text = (
        f"{len(long):,} of {len(sources):,} prompts do not fit into the context of {context:,} tokens together with "
        f"generate.max_new_tokens = {options.max_new_tokens:,}; the first is data.{first.source}, row {first.row} "
        f"(counted from 0), with {lengths[first.index]:,} tokens"
    )
    if options.overflow == "error" or len(long) == len(sources):
        raise DistillError(f"{text}. Lower max_new_tokens, or set generate.overflow to drop, which leaves them out.")
    logger.warning(f"{text}. They are left out.")
    left_out = {row.prompt.index for row in long}
    return [row for row in sources if row.prompt.index not in left_out]


def _load_model(spec: TeacherSpec, config: Any) -> PreTrainedModel:
    """Load the teacher on the accelerator of this machine, if it has one."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    options: dict[str, object] = {"revision": spec.revision, "attn_implementation": spec.attn_implementation}
    options = {name: value for name, value in options.items() if value is not None}
    options |= {"device_map": spec.device_map} if spec.device_map else direct_loading(device)
    if spec.quantization:
        options["quantization_config"] = quantization_config(spec.quantization, dtype_of(config, {"dtype": spec.dtype}))
    model = load_pretrained(AutoModelForCausalLM, str(spec.loaded_model), dtype=spec.dtype, **options)
    if not (spec.device_map or spec.quantization):
        cast(nn.Module, model).to(device)
    return model


def _generate(
    recipe: Recipe,
    options: Generation,
    folder: Path,
    sources: Sequence[SourceRow],
    opened: Mapping[int, bool],
    backend: Backend,
    resume: bool,
    request: JSONObject,
    on_stage: Callable[[str], None],
    on_progress: Callable[[GenerationProgress], None],
) -> GeneratedData:
    prompts = [with_system_prompt(row.prompt, options.system_prompt) for row in sources]
    parts = make_parts(prompts, options.samples, options.seed, options.prompts_per_part)
    store = CompletionStore(folder, _identity(recipe, options, prompts, backend), parts)
    missing = store.open(resume)
    total = sum(len(part.requests) for part in parts)
    done = total - sum(len(part.requests) for part in missing)
    on_stage(f"Generating {total - done:,} completions of {len(prompts):,} prompts")
    _complete(store, backend, missing, ProgressMeter(total, done, on_progress))
    completions = store.read()
    rows = generated = make_rows(sources, completions, options.reasoning, options.reasoning_tags, opened)
    set_aside, counts = list[dict[str, Any]](), list[StepCount]()
    if options.filters or options.select:
        on_stage("Filtering")
        filtered = apply_filters(rows, options.filters, options.select)
        counts, set_aside = filtered.counts, list(filtered.set_aside_rows(rows))
        rows = list(filtered.kept_rows(rows))
        for count in counts:
            failed = f", and {count.set_aside:,} raised an exception" if count.set_aside else ""
            on_stage(f"{count.label}: removed {count.removed:,} of {count.given:,}{failed}")
    table = make_table(rows)
    on_stage(f"Measuring and writing {len(rows):,} rows")
    evaluation = evaluate_data_set(str(public_name(backend.identity()["model"])), generated, rows, counts)
    card = _card_facts(options, sources, backend, completions, evaluation, rows, table.column_names)
    facts: JSONObject = {"request": request, "evaluation": evaluation.as_json()}
    store.publish(table, render_card(card), make_table(set_aside) if set_aside else None, facts)
    if unfinished := sum(row["finish_reason"] == "length" for row in rows):
        logger.warning(
            f"{unfinished:,} of {len(rows):,} completions were cut off at generate.max_new_tokens = "
            f"{options.max_new_tokens}: a student trained on them learns to end there. Raise it, or add the filter "
            "unfinished."
        )
    return GeneratedData(folder, len(completions), len(rows), sum(each.tokens for each in completions), counts)


def _complete(store: CompletionStore, backend: Backend, missing: Sequence[Part], meter: ProgressMeter) -> None:
    for part, completions in backend.complete(missing, meter.add_tokens):
        store.write(part, completions)
        meter.add_completions(len(completions), sum(each.tokens for each in completions))


def _identity(recipe: Recipe, options: Generation, prompts: Sequence[Prompt], backend: Backend) -> JSONObject:
    """Return what determines the completions; a data set is continued only with the same values."""
    settings: JSONObject = {
        f"generate.{key}": value for key, value in options.model_dump(mode="json").items() if key not in _NO_IDENTITY
    }
    template = {"data.chat_template": recipe.data.chat_template}
    return {**backend.identity(), **settings, **template, "prompts": len(prompts), "digest": _digest(prompts)}


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        values = [prompt.source, prompt.row, prompt.content, prompt.tools]
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _card_facts(
    options: Generation,
    sources: Sequence[SourceRow],
    backend: Backend,
    completions: Sequence[Completion],
    evaluation: Evaluation,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
) -> CardFacts:
    identity = backend.identity()
    model = str(identity["model"])
    unset = {name for name, value in options.model_dump().items() if value in (None, [], {})}
    settings = options.model_dump(mode="json", exclude={"url", "api_key_env", "model", "filters", "select", *unset})
    settings |= {"revision": identity.get("revision"), "log-probabilities": backend.log_prob_distribution}
    tokens = sum(each.tokens for each in completions)
    counts: dict[str, int | float] = {
        "prompts": len(sources),
        "completions": len(completions),
        "of these cut off at max_new_tokens": sum(each.finish_reason == "length" for each in completions),
        "generated tokens": tokens,
        "rows": len(rows),
        "tokens per completion": round(tokens / max(len(completions), 1), 1),
    }
    return CardFacts(
        title=f"Completions of {public_name(model)}",
        model=str(public_name(model)),
        url=f"https://huggingface.co/{model}" if reference_kind(model) == "id" and backend.name != "server" else None,
        settings=settings,
        sources=Counter(row.prompt.source for row in sources),
        counts=counts,
        columns=columns,
        filters=evaluation.filters,
        measures=evaluation.measures,
    )
