"""Writes the teacher cache of a recipe, and verifies a cache against its teacher."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import AutoConfig

from ..cache import CacheReader, Manifest, write_cache
from ..cache.api import CacheOptions, ServedTeacher
from ..cache.example_keys import batch_examples
from ..cache.manifest import FILE
from ..cache.serialization import encode_signals
from ..cache.writer import CacheProgress, load_batch, plan_shards, request_layers
from ..core.defaults import CACHE_KIND, TOP_K_IDS
from ..core.json_types import JSON, JSONObject
from ..core.references import reference_kind
from ..core.server_urls import without_servers
from ..data import Examples
from ..errors import DistillError, collect_errors, raise_if_any
from ..layers import AUTO, KEPT, LEARNED, map_layers
from ..losses import get_loss
from ..models.model_types import model_type_of
from ..recipe.from_teacher import FromTeacher
from ..recipe.load import validate
from ..recipe.models import TeacherSpec
from ..recipe.schema import Recipe
from ..teachers import (
    CachedTeacher,
    CrossTokenizerTeacher,
    RemoteTeacher,
    RoutedTeacher,
    Teacher,
    TrimmedVocabularyTeacher,
)
from ..teachers.group import TeacherGroup
from .datasets import PreparedData
from .model_loading import load_pretrained
from .pruning import Pruner
from .teacher_only import load_teacher_and_data, static_teacher_spec, with_teacher
from .watchdog import HangWatchdog

_MAX_PROBED_ROWS = 16  # rows that are looked up before training begins


def write_recipe_cache(
    recipe: Recipe,
    folder: str | None = None,
    on_stage: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[CacheProgress], None] = lambda progress: None,
    **options: Any,
) -> tuple[Path, Manifest]:
    """Write the outputs of a recipe's teacher for all training and held-out rows. An unfinished cache is continued.

    Args:
        recipe: Recipe whose teacher is frozen, remote, or cached with a source. `k` is the top_k of a remote teacher.
        folder: Folder of the cache. None: the `path` of the cached teacher.
        on_stage: Called with a short description of each stage when it begins.
        on_progress: See `write_cache`.
        options: Options of `write_cache`: kind, samples_per_token, proposal_temperature, k, dtype, seed, batch_size,
            shard_rows.

    Returns:
        The folder, and the manifest of the complete cache.

    Raises:
        DistillError: The teacher is not frozen, a loss needs outputs that a cache does not hold, or `write_cache`
            refuses.
    """
    spec = static_teacher_spec(recipe, ("frozen", "remote"))
    if spec.kind == "remote" and spec.api != "hidden":
        _check_served_kind(spec, options.get("kind", CACHE_KIND))
        spec = spec.model_copy(update={"top_k": options.get("k", TOP_K_IDS)})
    cache_folder = local_folder(recipe, folder)
    if recipe.is_cross_tokenizer and options.get("kind") == "sampled":
        raise DistillError(
            "distill.cross_tokenizer is set, and its losses do not support a sampled cache: use --kind hidden or top_k."
        )
    # Check the values before anything is loaded.
    CacheOptions(**{name: value for name, value in options.items() if name not in ("batch_size", "shard_rows")})
    loaded_teacher, data, student_tokenizer, args = load_teacher_and_data(recipe, spec, on_stage)
    teacher, collator, tokenizer = _own_rows(loaded_teacher, data.collator, student_tokenizer)
    context_length = None
    if isinstance(loaded_teacher, CrossTokenizerTeacher):
        options = {"labels": options.get("kind", CACHE_KIND) == "top_k", **options}
        context_length = loaded_teacher.row_maker.max_length
    layers = _layers(recipe, teacher, data.train) if options.get("kind", "hidden") == "hidden" else []
    options = {
        "temperature": recipe.distill.soft_temperature or 1.0,
        "batch_size": args.per_device_train_batch_size,
        "layers": layers,
        **options,
    }
    parts = cached_parts(data)
    on_stage("Preparing the rows to write")
    with HangWatchdog(args.ddp_timeout).running():
        manifest = write_cache(
            cache_folder,
            teacher,
            *parts,
            collator=collator,
            processing_class=tokenizer,
            device=args.device,
            teacher_name=None
            if isinstance(teacher, RemoteTeacher)
            else {"model": spec.model, "revision": spec.revision, "quantization": spec.quantization},
            recipe=with_teacher(recipe, spec),
            served=_served(teacher, spec, tokenizer),
            context_length=context_length,
            on_progress=on_progress,
            **options,
        )
    return Path(cache_folder), manifest


def local_folder(recipe: Recipe, folder: str | None) -> str:
    """Return the folder to write to: the given one, or that of the recipe's cached teacher.

    Raises:
        DistillError: neither is given, or the recipe's is an address on the Hub.
    """
    local_folder = folder or (recipe.teacher.path if recipe.teacher and recipe.teacher.kind == "cached" else None)
    if local_folder is None or reference_kind(local_folder) == "address":
        raise DistillError(
            "A cache is written to a local folder, and none is given. Pass one with -o; `hf-distill cache push` "
            "uploads it to the Hub."
        )
    return local_folder


def cached_parts(data: PreparedData) -> list[Dataset]:
    """Return the data sets whose rows a cache holds, those of the training first.

    Raises:
        DistillError: A source is streamed.
    """
    if not isinstance(data.train, Dataset):
        raise DistillError(
            "A streamed source cannot be cached, because its length is not known. Set streaming to false in all "
            "sources."
        )
    return [data.train, data.held_out]


def _check_served_kind(spec: TeacherSpec, kind: str) -> None:
    """Refuse the kinds of cache that need logits of all ids, which vLLM and SGLang do not return."""
    if kind != "top_k":
        raise DistillError(
            f"A server with api {spec.api or 'vllm'} returns log-probabilities of the k most probable ids, and a cache "
            f"of kind {kind} needs more: use --kind top_k."
        )


def _own_rows(
    teacher: Teacher, collator: Callable[[list], dict], tokenizer: Any
) -> tuple[Teacher, Callable[[list], dict], Any]:
    """Return a teacher, the collator of the rows that it reads, and their tokenizer.

    A teacher with another tokenizer than the student reads rows of its own, see `CrossTokenizerTeacher`.
    """
    if not isinstance(teacher, CrossTokenizerTeacher):
        return teacher, collator, tokenizer
    return teacher.unwrapped, teacher.own_batches(collator), teacher.tokenizer


def _served(teacher: Teacher, spec: TeacherSpec, tokenizer: Any) -> ServedTeacher | None:
    """Return the facts of a remote teacher; None for another one."""
    if not isinstance(teacher, RemoteTeacher):
        return None
    depth = teacher.protocol.depth
    vocab_size = len(tokenizer) if teacher.keeps_all_ids else teacher.student_vocab_size
    return ServedTeacher(spec.vocab_size or vocab_size, teacher.summary(), depth)


def write_smoke_cache(recipe: Recipe, on_stage: Callable[[str], None]) -> None:
    """Write the cache of a smoke recipe if it does not exist, so that the run can read it."""
    spec = recipe.teacher
    if spec is None or spec.kind != "cached" or spec.use_source or not spec.source_teacher.model or not spec.path:
        return
    if reference_kind(str(spec.source_teacher.model)) == "smoke" and not (Path(spec.path) / FILE).is_file():
        on_stage(f"Writing the cache {spec.path}, because it does not exist")
        write_recipe_cache(recipe)


def verify_against_teacher(
    cache: CacheReader,
    count: int,
    on_stage: Callable[[str], None] = lambda text: None,
    *,
    url: Sequence[str] = (),
    api_key_env: str | None = None,
) -> dict[str, float]:
    """Compare some examples of a cache with new outputs of its teacher.

    A manifest names no servers, so a cache cannot send the user's data or key to one that the user did not name.

    Args:
        cache: Reader of a cache that was written from a recipe.
        count: Approximate number of examples to compare.
        on_stage: Called with a short description of each stage when it begins.
        url: URLs of the servers, for a cache that was written from a remote teacher.
        api_key_env: See `RemoteTeacher`.

    Returns:
        "examples": number of compared examples. "identical": share of them whose stored bytes would be the same now,
        from 0 to 1.

    Raises:
        DistillError: The cache was written from a script or imported, the data of its recipe has changed, or `url` is
            missing or has no effect.
    """
    manifest = cache.manifest
    if manifest.recipe is None:
        raise DistillError(
            "This cache was written from a script, so its manifest does not record the teacher and the data. "
            "Only a cache "
            "that was written from a recipe can be compared with its teacher."
        )
    if "imported" in manifest.teacher:
        raise DistillError(
            "This cache was imported from published log-probabilities, so there is no teacher whose outputs it could "
            "be compared with."
        )
    recipe = validate(_with_servers(manifest.recipe, "served" in manifest.teacher, list(url), api_key_env))
    teacher, data, _, args = load_teacher_and_data(recipe, recipe.primary_teacher, on_stage)
    size, shard_rows = manifest.data["batch_size"], manifest.data["shard_rows"]
    teacher, collator, _ = _own_rows(teacher, data.collator, None)
    shift = teacher.model is None or model_type_of(teacher.model).shifts_labels
    rows, facts = plan_shards([data.train, data.held_out], collator, size, shard_rows, shift)
    if facts["fingerprint"] != manifest.data["fingerprint"]:
        raise DistillError(
            "The data of the cache's recipe has changed since the cache was written: it has another "
            "fingerprint. Restore "
            "the data, or write the cache again."
        )
    every = max(1, manifest.data["examples"] // max(count, 1) // size)
    compared = identical = 0
    for number in range(0, len(rows.tokens), every):
        batch, targets = load_batch(rows, number, args.device, shift)
        examples = batch_examples(batch, targets)
        feature_requests = request_layers(manifest.options.get("layers", ()), batch, targets, shift)
        current, stored = (
            encode_signals(teacher(batch, targets, feature_requests), examples, manifest, targets.labels),
            cache.get([example.key for example in examples]),
        )
        compared += len(examples)
        identical += sum(
            old is not None and bytes(new.payload) == bytes(old.payload)
            for new, old in zip(current, stored, strict=True)
        )
    return {"examples": compared, "identical": identical / max(compared, 1)}


def _with_servers(recipe: JSONObject, is_served: bool, urls: list[str], api_key_env: str | None) -> JSONObject:
    """Return the recipe of a manifest with the servers of its teacher, which only the user names.

    Raises:
        DistillError: The teacher is on a server and there is no URL, or it is not and there is one.
    """
    if is_served != bool(urls):
        raise DistillError(
            "This cache was written from a teacher on a server, and the manifest of a cache names no server: pass its "
            "URL (--teacher-url)."
            if is_served
            else "The teacher of this cache is not on a server: remove --teacher-url."
        )
    recipe, teacher = without_servers(recipe), recipe.get("teacher")
    if not is_served or not isinstance(teacher, dict):
        return recipe
    servers: JSONObject = {"url": [*urls], "api_key_env": api_key_env}
    with_servers: JSON = {**teacher, **servers}
    return recipe | {"teacher": with_servers}


def _reads_row(teacher: Teacher, name: str | None, row: Mapping[str, Any], sources: Sequence[str]) -> bool:
    """Whether a teacher of a group reads a row: all of them do, unless rows are routed by their source.

    Args:
        teacher: The teacher, or the group.
        name: The name of the teacher in the group.
        row: A row, whose `source` is a number, or a list of numbers if it is packed.
        sources: The names of the sources.
    """
    if not isinstance(teacher, RoutedTeacher) or teacher.sources is None:
        return True
    source = row.get("source", 0)
    present = {sources[index] for index in (source if isinstance(source, list) else [source])}
    return not present.isdisjoint(teacher.sources[str(name)])


def check_cached(teacher: Teacher, recipe: Recipe, data: PreparedData, shift: bool) -> None:
    """Check before the first step that the teacher caches contain some of the rows of a run.

    Raises:
        DistillError: A cache lacks some of the rows. The message lists the data options that differ.
    """
    for name, each in (teacher.teachers if isinstance(teacher, TeacherGroup) else {None: teacher}).items():
        one, collator, _ = _own_rows(each, data.collator, None)
        if isinstance(one, TrimmedVocabularyTeacher):
            collator = one.own_batches(collator)
            one = one.unwrapped
        if not isinstance(one, CachedTeacher) or one.source is not None:
            continue
        for part in (data.train, data.held_out):
            if not hasattr(part, "__len__"):
                continue
            sources, every = data.collator.sources, max(1, len(part) // _MAX_PROBED_ROWS)
            probed = [i for i in range(0, len(part), every) if _reads_row(teacher, name, part[i], sources)]
            missing = [i for i in probed if not one.contains(collator([part[i]]), shift)]
            if missing:
                cached_data = (one.manifest.recipe or {}).get("data")
                cached_data = cached_data if isinstance(cached_data, dict) else {}
                run_data = recipe.model_dump(exclude_none=True)["data"]
                differ = [
                    f"{key}: {cached_data.get(key)} in the cache, {run_data[key]} in this recipe"
                    for key in run_data
                    if cached_data.get(key) != run_data[key]
                ]
                raise DistillError(
                    f"The cache {one.path} lacks {len(missing)} of the {len(probed)} rows "
                    "that were checked. "
                    + (
                        f"It was written with other data options: {'; '.join(differ)}. "
                        if differ and cached_data
                        else ""
                    )
                    + "Write it with this recipe (`hf-distill cache write`), or set teacher.on_miss to query_teacher."
                )


def _layers(recipe: Recipe, teacher: Teacher, rows: Examples) -> list[int]:
    """Return the indices of the teacher's layers whose hidden states the losses of the recipe need.

    Args:
        recipe: The recipe.
        teacher: Its teacher.
        rows: Training rows, which measure the layers that a pruned student keeps.
    """
    if not any(get_loss(spec.name).feature for spec in recipe.losses):
        return []
    depth, needed, problems = len(teacher.layer_stack().blocks), set[int](), list[str]()
    cut, student = recipe.student.from_teacher, recipe.student.model
    student_depth = (cut.num_layers or depth) if cut else None
    kept: Sequence[int] | None = None
    for spec in recipe.losses:
        options, feature = spec.model_extra or {}, get_loss(spec.name).feature
        if feature not in (None, "hidden"):
            problems.append(
                f"loss {spec.name!r} compares features of the kind {feature}, which a cache does not hold: remove it"
            )
        if feature == "hidden":
            if student_depth is None:
                config = load_pretrained(AutoConfig, str(student), revision=recipe.student.revision)
                student_depth = config.get_text_config().num_hidden_layers
            layers = options.get("layers", AUTO)
            if layers in (AUTO, KEPT) and cut and kept is None:
                kept = _kept_layers(cut, teacher, rows, depth)
            with collect_errors(problems):
                needed |= (
                    {*range(depth)}
                    if layers == LEARNED
                    else {teacher_layer for _, teacher_layer in map_layers(layers, student_depth, depth, kept)}
                )
    raise_if_any(problems)
    return sorted(needed)


def _kept_layers(cut: FromTeacher, teacher: Teacher, rows: Examples, depth: int) -> Sequence[int]:
    """Return the indices of the layers that a student keeps of a teacher with this depth.

    Raises:
        DistillError: They are measured, and the teacher has no weights here.
    """
    if cut.layers is None and cut.keep_layers is not None and teacher.model is None:
        raise DistillError(
            "losses on hidden states compare the layers that block influence selects, and the weights of the teacher "
            "are not here to measure it: set student.from_teacher.layers, or the option layers of the losses."
        )
    kept_ids = teacher.kept_ids.tolist() if isinstance(teacher, TrimmedVocabularyTeacher) else None
    kept = Pruner(cut, kept_ids).kept_layers(teacher.model or nn.Module(), rows)
    return range(depth) if kept is None else kept
