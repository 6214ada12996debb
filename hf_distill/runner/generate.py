"""Generates a data set: the teacher of a recipe completes the prompts of its sources."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers.utils import logging

from ..cache import Manifest
from ..core.json_types import JSONObject
from ..core.locks import LOCK_FILE, lock_folder, remove_lock_file
from ..core.references import public_name, reference_kind
from ..data.load import load_columns
from ..errors import DistillError
from ..filters import StepCount, apply_filters, check_filters
from ..filters.apply import SET_ASIDE_COLUMNS
from ..generation.backends.api import Backend
from ..generation.card import CardFacts, render_card
from ..generation.completion import Completion, Part, Prompt, make_parts
from ..generation.dataset import column_names, make_rows, make_table, replaced_columns
from ..generation.evaluation import Evaluation, evaluate_data_set
from ..generation.generated_teacher import Coverage
from ..generation.progress import GenerationProgress, ProgressMeter
from ..generation.prompts import REFERENCE, SourceRow, read_source, with_system_prompt
from ..generation.store import SET_ASIDE, CompletionStore, check_folder
from ..recipe.generation import Generation
from ..recipe.schema import Recipe
from ..recipe.tasks import require_text_generation
from ..teachers.loading import env_world_size
from .complete_data import GeneratedData, cache_request, complete_data, digest_of, filter_files, request_of
from .generation_cache import CACHE, capture_of, write_generated_cache
from .generation_setup import Setup, local_setup, server_setup

logger = logging.get_logger(__name__)
_NO_IDENTITY = {
    *("backend", "url", "model", "api_key_env", "concurrency", "timeout", "retry_seconds", "batching", "batch_size"),
    *("reasoning", "reasoning_tags", "filters", "select", "output_dir", "samples_per_token"),
}  # keys of `generate` that do not change the completions, or are part of the identity of the backend


def generate_data(
    recipe: Recipe,
    folder: str,
    resume: bool = False,
    on_stage: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[GenerationProgress], None] = lambda progress: None,
    sources: Sequence[SourceRow] | None = None,
) -> GeneratedData:
    """Let the teacher of a recipe complete the prompts of its data, filter the completions, and write a data set.

    This is `hf-distill generate RECIPE -o FOLDER`. `hf_distill.data.load_examples` reads the folder.

    Args:
        recipe: The recipe, see `load_recipe`; without a section `generate` its defaults apply.
        folder: Local folder of the data set.
        resume: Continue the data set in the folder: generate the completions that are missing. If the data set is
            complete, the teacher is not loaded, and servers are not asked. Without a data set in the folder, start one.
            If false, a folder with one is an error.
        on_stage: Called with a short description of each stage when it begins.
        on_progress: Called at most twice a second.
        sources: The prompts; None: those of all sources.

    Returns:
        The folder, and the numbers of completions, tokens, and rows that the filters kept.

    Raises:
        DistillError: The recipe is not of text generation, a source has no prompts, the filters kept no row, or the
            folder holds other files or the completions of another recipe.
        RunError: A server failed.

    Example::

        from hf_distill import generate_data, load_recipe

        data = generate_data(load_recipe("my.yaml"), "data/answers")

    Source: sequence-level distillation, arXiv 1606.07947.
    """
    require_text_generation(recipe, "`hf-distill generate`")
    if reference_kind(folder) == "address":
        raise DistillError(f"A data set is generated into a local folder, and -o is {folder}: give a folder.")
    if env_world_size() > 1:
        raise DistillError("`hf-distill generate` runs in one process: start it without a launcher.")
    options = recipe.generate or Generation.model_validate({})
    with _claimed(Path(folder)):
        check_folder(Path(folder), resume)
        if sources is None:
            on_stage("Reading the prompts")
            sources = read_prompts(recipe, options)
        check_filters(options.filters, options.select, column_names(sources, options.reasoning, options.log_probs))
        _warn_of_replaced_columns(options, sources)
        capture = capture_of(recipe, options)
        request = request_of(recipe, options, sources)
        if data := complete_data(Path(folder), recipe, options, request):
            on_stage(f"{folder} holds the complete data set of this recipe: nothing is generated")
            return data
        if options.backend == "server":
            setup = server_setup(recipe, options, sources, capture)
        else:
            setup = local_setup(recipe, options, sources, capture, on_stage)
        try:
            return _generate(recipe, options, Path(folder), setup, request, on_stage, on_progress)
        finally:
            setup.backend.close()


def _warn_of_replaced_columns(options: Generation, sources: Sequence[SourceRow]) -> None:
    """Warn of columns of the sources whose names the data set, or its rows that are set aside, use for other values."""
    added = [*options.added_columns, *(SET_ASIDE_COLUMNS if options.filters or options.select else ())]
    if names := replaced_columns(sources, options.reasoning, added):
        why = "; its reference is the completion of the source" if REFERENCE in names else ""
        logger.warning(
            f"The sources have the columns {', '.join(names)}, and the data set has other values under these names, "
            f"which filters and loss_weight read{why}. Rename the columns of the sources to keep them."
        )


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


def _generate(
    recipe: Recipe,
    options: Generation,
    folder: Path,
    setup: Setup,
    request: JSONObject,
    on_stage: Callable[[str], None],
    on_progress: Callable[[GenerationProgress], None],
) -> GeneratedData:
    sources, backend = setup.sources, setup.backend
    prompts = [with_system_prompt(row.prompt, options.system_prompt) for row in sources]
    parts = make_parts(prompts, options.samples, options.seed, options.prompts_per_part)
    identity = _identity(recipe, options, prompts, setup)
    store = CompletionStore(folder, identity, parts, setup.cache is not None)
    missing = store.open()
    total = sum(len(part.requests) for part in parts)
    done = total - sum(len(part.requests) for part in missing)
    on_stage(f"Generating {total - done:,} completions of {len(prompts):,} prompts")
    _complete(store, backend, missing, ProgressMeter(total, done, on_progress))
    completions = store.read()
    rows = generated = make_rows(sources, completions, options.reasoning, options.reasoning_tags, setup.opened)
    set_aside, counts = list[dict[str, Any]](), list[StepCount]()
    if options.filters or options.select:
        on_stage("Filtering")
        filtered = apply_filters(rows, options.filters, options.select)
        counts, set_aside = filtered.counts, list(filtered.set_aside_rows(rows))
        rows = list(filtered.kept_rows(rows))
        for count in counts:
            failed = f", and {count.set_aside:,} raised an exception" if count.set_aside else ""
            first = next((item.error for item in filtered.set_aside if failed and item.filter == count.label), None)
            failed += f" (the first: {first}; all are in {SET_ASIDE})" if first else ""
            on_stage(f"{count.label}: removed {count.removed:,} of {count.given:,}{failed}")
    table = make_table(rows)
    on_stage(f"Measuring and writing {len(rows):,} rows")
    evaluation = evaluate_data_set(str(public_name(backend.identity()["model"])), generated, rows, counts)
    card = _card_facts(options, sources, backend, completions, evaluation, rows, table.column_names)
    cache = None if setup.cache is None else folder / CACHE
    tokens = sum(each.tokens for each in completions)
    data = GeneratedData(folder, len(completions), len(rows), tokens, counts, cache)
    facts: JSONObject = {"request": request, "evaluation": evaluation.as_json(), "result": data.as_facts()}
    facts["filter_files"] = filter_files(options)
    store.publish(table, render_card(card), make_table(set_aside) if set_aside else None, facts)
    if setup.cache is not None:
        manifest, coverage = write_generated_cache(recipe, options, setup.cache, store, on_stage)
        store.write_card(render_card(replace(card, cache=_cache_facts(manifest, coverage))))
        store.record({**facts, "cache_request": cache_request(recipe)})
    if unfinished := sum(row["finish_reason"] == "length" for row in rows):
        logger.warning(
            f"{unfinished:,} of {len(rows):,} completions were cut off at generate.max_new_tokens = "
            f"{options.max_new_tokens}: a student trained on them learns to end there. Raise it, or add the filter "
            "unfinished."
        )
    return data


def _cache_facts(manifest: Manifest, coverage: Coverage) -> JSONObject:
    """Return what the card states about the teacher cache."""
    return {
        "kind": manifest.kind,
        **cast(JSONObject, manifest.options),
        "temperature": "all" if manifest.temperature is None else manifest.temperature,
        "rows": manifest.data["examples"],
        "target tokens": manifest.data["tokens"],
        "target tokens predicted during the generation": coverage.tokens,
        "target tokens predicted in another forward": coverage.other_tokens,
        "rows with such tokens": coverage.other_rows,
    }


def _complete(store: CompletionStore, backend: Backend, missing: Sequence[Part], meter: ProgressMeter) -> None:
    for part, completions in backend.complete(missing, meter.add_tokens):
        store.write(part, completions)
        meter.add_completions(len(completions), sum(each.tokens for each in completions))


def _identity(recipe: Recipe, options: Generation, prompts: Sequence[Prompt], setup: Setup) -> JSONObject:
    """Return what determines the completions; a data set is continued only with the same values."""
    settings: JSONObject = {
        f"generate.{key}": value for key, value in options.model_dump(mode="json").items() if key not in _NO_IDENTITY
    }
    template: JSONObject = {"data.chat_template": recipe.data.chat_template}
    if setup.cache is not None:
        template["temperature of the cache"] = setup.cache.capture.temperature
    return {**setup.backend.identity(), **settings, **template, "prompts": len(prompts), "digest": digest_of(prompts)}


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
        added_columns=options.added_columns,
        filters=evaluation.filters,
        measures=evaluation.measures,
    )
