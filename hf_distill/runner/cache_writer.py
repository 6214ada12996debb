"""A recipe's teacher written to disk, on the data of the recipe; and compared with it again."""

from collections.abc import Callable
from pathlib import Path

from transformers import AutoConfig

from ..cache import CacheReader, Manifest, write_cache
from ..cache.example_keys import batch_examples
from ..cache.manifest import FILE
from ..cache.serialization import encode_signals
from ..cache.writer import CacheProgress, batch_of, plan_shards, taps_of
from ..core.references import reference_kind
from ..errors import DistillError, collect_errors, raise_if_any
from ..layers import LEARNED, map_layers
from ..losses import get_loss
from ..models.model_types import model_type_of
from ..recipe.load import validate
from ..recipe.schema import Recipe
from ..teachers import CachedTeacher, MultiTeacher, Teacher
from .datasets import PreparedData
from .model_loading import load_pretrained
from .teacher_only import load_teacher_and_data, static_teacher_spec, with_teacher
from .watchdog import HangWatchdog

_PROBED = 16  # rows that are looked up before training begins


def write_recipe_cache(
    recipe: Recipe,
    folder: str | None = None,
    on_stage: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[CacheProgress], None] = lambda progress: None,
    **options,
) -> tuple[Path, Manifest]:
    """Write what a recipe's teacher says of the recipe's rows, those held out too; goes on with what was cut off.

    Args:
        recipe: its teacher is frozen, or cached with a source.
        folder: where to; None: the `path` of a cached teacher.
        on_stage: told in a few words what begins.
        on_progress: see `write_cache`.
        options: of `write_cache`: kind, draws, proposal, k, dtype, seed, batch_size, shard_rows.

    Returns:
        the folder, and the manifest of the whole cache.

    Raises:
        DistillError: a teacher that moves, losses that no cache serves, or see `write_cache`.
    """
    spec = static_teacher_spec(recipe)
    to = folder or (recipe.teacher.path if recipe.teacher and recipe.teacher.kind == "cached" else None)
    if to is None or reference_kind(to) == "address":
        raise DistillError("Where to? Give a folder with -o; `hf-distill cache push` brings it to the Hub.")
    teacher, data, tokenizer, args = load_teacher_and_data(recipe, spec, on_stage)
    layers = _layers(recipe, teacher) if options.get("kind", "hidden") == "hidden" else []
    given = {
        "temperature": recipe.distill.temperature,
        "batch_size": args.per_device_train_batch_size,
        "layers": layers,
    }
    if not hasattr(data.train, "__len__"):
        raise DistillError("A stream has no end to be written to: leave data.*.streaming out.")
    on_stage("Finding the rows to write")
    with HangWatchdog(args.ddp_timeout).kept():
        manifest = write_cache(
            to,
            teacher,
            data.train,
            data.held_out,
            collator=data.collator,
            processing_class=tokenizer,
            device=args.device,
            teacher_name={"model": spec.model, "revision": spec.revision, "quantization": spec.quantization},
            recipe=with_teacher(recipe, spec),
            on_progress=on_progress,
            **given | options,
        )
    return Path(to), manifest


def write_smoke_cache(recipe: Recipe, on_stage: Callable[[str], None]) -> None:
    """Of a recipe with tiny models: write its cache, if there is none, so that the whole path runs."""
    spec = recipe.teacher
    if spec is None or spec.kind != "cached" or spec.use_source or not spec.source_teacher.model or not spec.path:
        return
    if reference_kind(str(spec.source_teacher.model)) == "smoke" and not (Path(spec.path) / FILE).is_file():
        on_stage(f"Writing {spec.path}, for there is none")
        write_recipe_cache(recipe)


def verify_against_teacher(
    store: CacheReader, count: int, on_stage: Callable[[str], None] = lambda text: None
) -> dict[str, float]:
    """Ask the teacher again about some of a cache's examples.

    Args:
        store: of a cache that was written from a recipe.
        count: examples, about.
        on_stage: told in a few words what begins.

    Returns:
        "examples" that were compared; "identical": the share of them of which the same bytes would be written now.

    Raises:
        DistillError: it was written from a script, or its teacher is another one now.
    """
    manifest = store.manifest
    if manifest.recipe is None:
        raise DistillError("This cache was written from a script, so its teacher and data are not known here.")
    recipe = validate(manifest.recipe)
    teacher, data, _, args = load_teacher_and_data(recipe, recipe.primary_teacher, on_stage)
    size, shard_rows = manifest.data["batch_size"], manifest.data["shard_rows"]
    shift = model_type_of(teacher.model).shifts_labels
    rows, facts = plan_shards([data.train, data.held_out], data.collator, size, shard_rows, shift)
    if facts["fingerprint"] != manifest.data["fingerprint"]:
        raise DistillError("The data of the cache's recipe are other ones now: they have another fingerprint.")
    every = max(1, manifest.data["examples"] // max(count, 1) // size)
    compared = identical = 0
    for number in range(0, len(rows.tokens), every):
        batch, targets = batch_of(rows, number, args.device, shift)
        examples = batch_examples(batch, targets)
        taps = taps_of(manifest.options.get("layers", ()), batch, targets, shift)
        now, then = (
            encode_signals(teacher(batch, targets, taps), examples, manifest),
            store.get([e.key for e in examples]),
        )
        compared += len(examples)
        identical += sum(b is not None and bytes(a.payload) == bytes(b.payload) for a, b in zip(now, then, strict=True))
    return {"examples": compared, "identical": identical / max(compared, 1)}


def check_cached(teacher: Teacher, recipe: Recipe, data: PreparedData, shift: bool) -> None:
    """Look some rows of a run up in its cache, before the first step is paid for.

    Raises:
        DistillError: a cache lacks some of them; says what its recipe had otherwise.
    """
    for one in teacher if isinstance(teacher, MultiTeacher) else [teacher]:
        if not isinstance(one, CachedTeacher) or one.source is not None:
            continue
        for part in (data.train, data.held_out):
            if not hasattr(part, "__len__"):
                continue
            every = max(1, len(part) // _PROBED)
            missing = [i for i in range(0, len(part), every) if not one.contains(data.collator([part[i]]), shift)]
            if missing:
                there, here = (one.manifest.recipe or {}).get("data", {}), recipe.model_dump(exclude_none=True)["data"]
                differ = [f"{k}: {there.get(k)} there, {here.get(k)} here" for k in here if there.get(k) != here[k]]
                raise DistillError(
                    f"{one.path} lacks {len(missing)} of {len(range(0, len(part), every))} rows that were looked up. "
                    + (f"It was written for other data: {'; '.join(differ)}. " if differ and there else "")
                    + "Write it with this recipe (`hf-distill cache write`), or set teacher.on_miss to query_teacher."
                )


def _layers(recipe: Recipe, teacher: Teacher) -> list[int]:
    """Blocks of the teacher whose hidden states the recipe's losses look at."""
    depth, found, problems = len(teacher.layer_stack().blocks), set[int](), list[str]()
    cut, student = recipe.student.from_teacher, recipe.student.model
    own = len(cut.layers) if cut and cut.layers else cut.keep_layers if cut else None
    for spec in recipe.losses:
        options, feature = spec.model_extra or {}, get_loss(spec.name).feature
        if feature not in (None, "hidden"):
            problems.append(f"{spec.name} needs {feature} of attention, which no cache holds: leave it out")
        if feature == "hidden":
            if own is None:
                config = load_pretrained(AutoConfig, str(student), revision=recipe.student.revision)
                own = config.get_text_config().num_hidden_layers
            layers = options.get("layers", "stretch")
            with collect_errors(problems):
                found |= {*range(depth)} if layers == LEARNED else {t for _, t in map_layers(layers, own, depth)}
    raise_if_any(problems)
    return sorted(found)
