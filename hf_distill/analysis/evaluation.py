"""Retention: a student's scores on evaluation tasks relative to its teacher's, with the initial student and control."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..core import run_files
from ..core.defaults import LM_EVAL_BATCH_ROWS
from ..core.io import read_json, write_json
from ..errors import DistillError
from ..runner.run_results import Run
from .lm_eval_tasks import EvalTask, load_tasks, per_example_scores
from .run_models import RunModels

MODELS = ("teacher", "before", "student", "control")
_NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """A model's score on a task, and its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class RelativeScore:
    """Percent of the teacher's score, with the 95 % interval of a bootstrap over examples.

    score / teacher's score, or teacher's score / score where lower is better. A model and its teacher are resampled
    together.
    """

    percent: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskScore:
    """Scores of all models on one task.

    scores:          model -> `Score`
    relative_scores: model -> `RelativeScore`; None if the teacher scores 0, so the ratio is undefined
    """

    task: str
    category: str
    metric: str
    higher_is_better: bool
    examples: int
    scores: dict[str, Score]
    relative_scores: dict[str, RelativeScore | None]


@dataclass(frozen=True)
class Retention:
    """Scores on all tasks, and means over the tasks of a category: category -> model -> `RelativeScore`.

    limit: maximum number of examples of each task; None: all
    """

    tasks: list[TaskScore]
    categories: dict[str, dict[str, RelativeScore]]
    limit: int | None


def retention(
    models: Mapping[str, Callable[[], nn.Module]],
    tokenizer: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None,
    tasks: Sequence[EvalTask],
    limit: int | None = None,
    batch_size: int = LM_EVAL_BATCH_ROWS,
    seed: int = 0,
    earlier_values: Mapping[str, Mapping[str, list]] = MappingProxyType({}),
    on_model: Callable[[str, dict[str, list]], None] = lambda name, values: None,
) -> Retention:
    """Score models on tasks of the lm-evaluation-harness, relative to the teacher.

    Args:
        models: name -> function that loads the model; "teacher" is among them. One model is in memory at a time.
        tokenizer: of all models, or model -> its tokenizer.
        tasks: see `load_tasks`.
        limit: maximum number of examples of each task.
        batch_size: of the harness.
        seed: of the bootstrap.
        earlier_values: of an earlier evaluation, model -> task -> values of the examples; not computed again.
        on_model: called with a model's name and scores when they are complete.

    Raises:
        DistillError: there is no teacher among the models, or a model is not a causal language model.
    """
    if "teacher" not in models:
        raise DistillError(
            f"The models are {', '.join(models)}: add the teacher, because scores are relative to the teacher's."
        )
    values = {name: dict(earlier_values.get(name, {})) for name in models}
    for name, load in models.items():
        if missing := [task for task in tasks if task.name not in values[name]]:
            of_model = tokenizer[name] if isinstance(tokenizer, Mapping) else tokenizer
            values[name] |= per_example_scores(load(), of_model, missing, limit, batch_size)
        on_model(name, values[name])
    scores, resamples = [], {}
    for task in tasks:
        task_values = {name: values[name][task.name] for name in models}
        task_score, resamples[task.name] = _score_task(task, task_values, seed)
        scores.append(task_score)
    return Retention(scores, _by_category(scores, resamples), limit)


def retention_of(
    run: Run,
    names: Sequence[str] | None = None,
    folder: str | Path | None = None,
    models: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = LM_EVAL_BATCH_ROWS,
    on_stage: Callable[[str], None] = lambda text: None,
) -> Retention:
    """Score the models of a run and write RUN/retention.json; an interrupted evaluation continues.

    Args:
        run: see `open_run`.
        names: of tasks; None: all tasks of the folder, or the packaged ones.
        folder: of custom tasks in YAML.
        models: of teacher, before, student, control; None: all that the run has.
        limit: maximum number of examples of each task.
        batch_size: of the harness.
        on_stage: called with a short description of each stage as it begins.

    Returns:
        the scores of the models on each task.

    Raises:
        DistillError: see `load_tasks`, `RunModels.of_run`.
    """
    tasks = load_tasks(names, folder)
    requested = [*(models or [m for m in MODELS if m != "control" or run.has("control")])]
    if unknown := [name for name in requested if name not in MODELS]:
        raise DistillError(f"Unknown model {', '.join(unknown)}: possible models are {', '.join(MODELS)}.")
    if "control" in requested:
        run.path("control")
    run_models = RunModels.of_run(run, on_stage)
    file = run.folder / run_files.RETENTION
    saved = read_json(file)
    values_by_model = saved.get("values", {}) if saved.get("limit") == limit else {}

    def load(name: str) -> nn.Module:
        on_stage(f"{name}: {', '.join(task.name for task in tasks)}")
        return run_models.load(name)

    def save(name: str, values: dict[str, list]) -> None:
        values_by_model[name] = values_by_model.get(name, {}) | values
        write_json(file, {"limit": limit, "values": values_by_model})

    requested_loaders = {name: partial(load, name) for name in requested}
    tokenizers = {name: run_models.tokenizer(name) for name in requested}
    result = retention(requested_loaders, tokenizers, tasks, limit, batch_size, 0, values_by_model, save)
    write_json(file, asdict(result) | {"values": values_by_model})
    return result


def _score_task(task: EvalTask, values: Mapping[str, list], seed: int) -> tuple[TaskScore, dict[str, np.ndarray]]:
    """Return a task's scores, and model -> share of the teacher's score in each resample."""
    count = len(values["teacher"])
    samples = np.random.default_rng(seed).integers(0, count, (_NUM_RESAMPLES, count))
    scores: dict[str, Score] = {}
    resampled: dict[str, np.ndarray] = {}
    for name, examples in values.items():
        resampled[name] = np.array([task.aggregate([examples[i] for i in row]) for row in samples], dtype=float)
        is_numeric = all(isinstance(value, int | float) for value in examples)
        stderr = np.std(examples, ddof=1) / np.sqrt(count) if is_numeric and count > 1 else resampled[name].std()
        scores[name] = Score(float(task.aggregate(examples)), float(stderr))
    relative: dict[str, RelativeScore | None] = {}
    shares: dict[str, np.ndarray] = {}
    for name in values:
        if name == "teacher":
            continue
        if scores["teacher"].value == 0:
            relative[name] = None
            continue
        shares[name] = _share(resampled[name], resampled["teacher"], task.higher_is_better)
        student, teacher = np.array([scores[name].value]), np.array([scores["teacher"].value])
        share = _share(student, teacher, task.higher_is_better)
        relative[name] = _relative_score(float(share[0]), shares[name])
    result = TaskScore(task.name, task.category, task.metric, task.higher_is_better, count, scores, relative)
    return result, shares


def _share(scores: np.ndarray, teacher_scores: np.ndarray, higher_is_better: bool) -> np.ndarray:
    """Return the share of the teacher's score; NaN where the divisor is 0."""
    above, below = (scores, teacher_scores) if higher_is_better else (teacher_scores, scores)
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def _relative_score(share: float, resampled_shares: np.ndarray) -> RelativeScore:
    low, high = np.nanpercentile(resampled_shares, [2.5, 97.5])
    return RelativeScore(100 * share, 100 * float(low), 100 * float(high))


def _by_category(tasks: Sequence[TaskScore], resamples: Mapping[str, Mapping[str, np.ndarray]]) -> dict:
    """Return means over the tasks of each category; tasks without a relative score are left out."""
    categories: dict[str, dict[str, RelativeScore]] = {}
    for category in dict.fromkeys(task.category for task in tasks):
        for name in dict.fromkeys(name for task in tasks for name in task.relative_scores):
            scored = {
                task.task: score
                for task in tasks
                if task.category == category and (score := task.relative_scores.get(name)) is not None
            }
            if scored:
                percents = [score.percent for score in scored.values()]
                shares = np.mean([resamples[task][name] for task in scored], axis=0)
                mean = _relative_score(float(np.mean(percents)) / 100, shares)
                categories.setdefault(category, {})[name] = mean
    return categories
