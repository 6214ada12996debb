"""What a student kept of its teacher, task by task, beside the student before and the control on hard labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.io import read_json, write_json
from ..errors import DistillError
from ..runner.run_results import Run
from .initial_student import student_before
from .lm_eval_tasks import EvalTask, load_tasks, per_example_scores
from .model_pair import ModelPair, load_model

MODELS = ("teacher", "before", "student", "control")
_RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """A model on a task: its score and the standard error of it."""

    value: float
    stderr: float


@dataclass(frozen=True)
class RelativeScore:
    """Percent of the teacher's score, and the 95 % interval of a bootstrap over examples.

    score / teacher's, or teacher's / score where less is better. A model and its teacher are resampled together.
    """

    percent: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskScore:
    """One task.

    scores: model -> `Score`
    kept:   model -> `RelativeScore`; None where the teacher scores 0, of which nothing can be kept
    """

    task: str
    category: str
    metric: str
    higher_is_better: bool
    examples: int
    scores: dict[str, Score]
    kept: dict[str, RelativeScore | None]


@dataclass(frozen=True)
class Retention:
    """All tasks, and means over the tasks of a category: category -> model -> `RelativeScore`.

    limit: examples of each task at most; None: all
    """

    tasks: list[TaskScore]
    categories: dict[str, dict[str, RelativeScore]]
    limit: int | None


def retention(
    models: Mapping[str, Callable[[], Any]],
    tokenizer: Any,
    tasks: Sequence[EvalTask],
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    known: dict[str, dict[str, list]] | None = None,
    on_model: Callable[[str, dict], None] = lambda name, values: None,
) -> Retention:
    """Score models on tasks of the lm-evaluation-harness, against the teacher.

    Args:
        models: "teacher" and others, name -> a function that loads the model; one is held at a time.
        tokenizer: of all of them.
        tasks: see `load_tasks`.
        limit: examples of each task at most.
        batch_size: of the harness.
        seed: of the bootstrap.
        known: values that were found before, model -> task -> those of the examples; they are not taken again.
        on_model: told each model's values once they are there.

    Raises:
        DistillError: there is no teacher among them, or a model predicts no next token.
    """
    if "teacher" not in models:
        raise DistillError(f"Models are {', '.join(models)}: what is kept is told against a teacher.")
    values = {name: dict((known or {}).get(name, {})) for name in models}
    for name, make in models.items():
        if missing := [task for task in tasks if task.name not in values[name]]:
            values[name] |= per_example_scores(make(), tokenizer, missing, limit, batch_size)
        on_model(name, values[name])
    scored, draws = [], {}
    for task in tasks:
        of_task = {name: values[name][task.name] for name in models}
        found, draws[task.name] = _scored(task, of_task, seed)
        scored.append(found)
    return Retention(scored, _by_category(scored, draws), limit)


def retention_of(
    run: Run,
    names: Sequence[str] | None = None,
    folder: str | Path | None = None,
    models: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    on_stage: Callable[[str], None] = lambda text: None,
) -> Retention:
    """What the student of a run kept; leaves RUN/retention.json, and goes on with one that was cut off.

    Args:
        run: see `open_run`.
        names: of tasks; None: all of the folder, or the packaged ones.
        folder: of YAML tasks of one's own.
        models: of teacher, before, student, control; None: all that the run has.
        limit: examples of each task at most.
        batch_size: of the harness.
        on_stage: told in a few words what begins.

    Raises:
        DistillError: see `load_tasks`, `ModelPair.of_run`.
    """
    tasks = load_tasks(names, folder)
    wanted = [*(models or [m for m in MODELS if m != "control" or run.has("control")])]
    if unknown := [name for name in wanted if name not in MODELS]:
        raise DistillError(f"Models are {', '.join(MODELS)}; got {', '.join(unknown)}.")
    if "control" in wanted:
        run.path("control")
    pair = ModelPair.of_run(run, on_stage=on_stage)
    makers: dict[str, Callable[[], Any]] = {
        "teacher": lambda: pair.teacher,
        "before": lambda: student_before(run, pair.teacher).to(pair.device),
        "student": lambda: pair.student,
        "control": lambda: load_model(run.path("control"), pair.device),
    }
    file = run.folder / "retention.json"
    before = read_json(file)
    known = before.get("values", {}) if before.get("limit") == limit else {}

    def make(name: str) -> Callable[[], Any]:
        def maker() -> Any:
            on_stage(f"{name}: {', '.join(task.name for task in tasks)}")
            return makers[name]()

        return maker

    def keep(name: str, values: dict) -> None:
        known[name] = known.get(name, {}) | values
        write_json(file, {"limit": limit, "values": known})

    found = retention({name: make(name) for name in wanted}, pair.tokenizer, tasks, limit, batch_size, 0, known, keep)
    write_json(file, asdict(found) | {"values": known})
    return found


def _scored(task: EvalTask, values: Mapping[str, list], seed: int) -> tuple[TaskScore, dict[str, np.ndarray]]:
    """A task's scores, and for each model what it kept in each resample."""
    count = len(values["teacher"])
    order = np.random.default_rng(seed).integers(0, count, (_RESAMPLES, count))
    scores: dict[str, Score] = {}
    draws: dict[str, np.ndarray] = {}
    for name, own in values.items():
        drawn = np.array([task.aggregate([own[i] for i in row]) for row in order], dtype=float)
        plain = all(isinstance(value, int | float) for value in own)
        stderr = np.std(own, ddof=1) / np.sqrt(count) if plain and count > 1 else drawn.std()
        scores[name], draws[name] = Score(float(task.aggregate(own)), float(stderr)), drawn
    kept: dict[str, RelativeScore | None] = {}
    shares: dict[str, np.ndarray] = {}
    for name in values:
        if name == "teacher":
            continue
        if scores["teacher"].value == 0:
            kept[name] = None
            continue
        shares[name] = _share(draws[name], draws["teacher"], task.higher_is_better)
        whole = _share(np.array([scores[name].value]), np.array([scores["teacher"].value]), task.higher_is_better)
        kept[name] = _kept(float(whole[0]), shares[name])
    found = TaskScore(task.name, task.category, task.metric, task.higher_is_better, count, scores, kept)
    return found, shares


def _share(own: np.ndarray, teacher: np.ndarray, higher_is_better: bool) -> np.ndarray:
    """Share of the teacher's score, NaN where there is nothing to divide by."""
    above, below = (own, teacher) if higher_is_better else (teacher, own)
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def _kept(share: float, draws: np.ndarray) -> RelativeScore:
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return RelativeScore(100 * share, 100 * float(low), 100 * float(high))


def _by_category(tasks: Sequence[TaskScore], draws: Mapping[str, Mapping[str, np.ndarray]]) -> dict:
    """Means over the tasks of each category; tasks of which nothing can be kept are left out."""
    found: dict[str, dict[str, RelativeScore]] = {}
    for category in dict.fromkeys(task.category for task in tasks):
        for name in dict.fromkeys(name for task in tasks for name in task.kept):
            own = [task for task in tasks if task.category == category and task.kept.get(name) is not None]
            if own:
                percents = [kept.percent for task in own if (kept := task.kept[name]) is not None]
                together = np.mean([draws[task.task][name] for task in own], axis=0)
                found.setdefault(category, {})[name] = _kept(float(np.mean(percents)) / 100, together)
    return found
