"""The lm-evaluation-harness: its tasks, and what models score on each example of them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import DistillError, did_you_mean, require_package
from ..models.model_types import model_type_of

PACKAGED = ("mini_hellaswag", "mini_truthfulqa", "mini_gsm8k", "mini_documentation")
# What a task measures, by how its name begins; a task's own metadata.category counts first.
CATEGORIES = {
    "reasoning": ("hellaswag", "arc", "winogrande", "piqa", "boolq", "openbookqa", "bbh", "commonsense", "social_iqa"),
    "instruction": ("ifeval", "mt_bench", "alpaca"),
    "maths": ("gsm8k", "minerva_math", "math", "hendrycks_math", "mathqa", "asdiv"),
    "code": ("humaneval", "mbpp"),
    "factual": ("truthfulqa", "mmlu", "triviaqa", "nq_open", "gpqa", "sciq"),
    "language": ("wikitext", "lambada", "pile", "c4", "blimp"),
}


@dataclass(frozen=True)
class EvalTask:
    """One task of the harness, as it is judged.

    metric:           the task's first one
    higher_is_better: of it
    aggregate:        values of examples to a score
    """

    name: str
    category: str
    metric: str
    higher_is_better: bool
    aggregate: Callable[[Sequence[Any]], float]
    task: Any


def load_tasks(names: Sequence[str] | None = None, folder: str | Path | None = None) -> list[EvalTask]:
    """Tasks of the harness by name, of a folder of YAML tasks too; their data are loaded.

    Args:
        names: None: all tasks of the folder, or the packaged ones, which need no network.
        folder: of YAML tasks of one's own.

    Raises:
        DistillError: lm-eval is not installed, a name is unknown, or data cannot be reached.
    """
    require_package("lm_eval", "eval", "Retention")
    from lm_eval.tasks import TaskManager, get_task_dict

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    packaged = files("hf_distill.recipes").joinpath("tasks")
    if folder is not None and not [*Path(folder).glob("*.yaml")]:
        raise DistillError(f"{folder} has no .yaml task: write one as lm-evaluation-harness reads it, or leave it out.")
    places = [str(packaged), *([] if folder is None else [str(folder)])]
    manager = TaskManager(include_path=places)
    own = [] if folder is None else [*TaskManager(include_path=str(folder), include_defaults=False).all_tasks]
    wanted = [*(names if names is not None else own or PACKAGED)]
    if not wanted:
        raise DistillError("No task was given: name one with --task, or leave it out for the packaged ones.")
    if unknown := [name for name in wanted if name not in manager.all_tasks]:
        near = did_you_mean(unknown[0], manager.all_tasks)
        raise DistillError(f"There is no task {unknown[0]!r}{near}. `lm-eval ls tasks` lists those of the harness.")
    found: list[EvalTask] = []
    for name in wanted:
        try:
            loaded = get_task_dict([name], manager)
        except ModuleNotFoundError as error:
            raise DistillError(f"Task {name!r}: {error}") from error
        except Exception as error:  # of datasets, huggingface_hub, httpx: whatever a download may raise
            raise DistillError(
                f"The data of task {name!r} cannot be loaded ({type(error).__name__}: {_short(error)}). A task of the "
                "harness is downloaded from the Hub: go online, or give YAML tasks on local files (--tasks-folder)."
            ) from error
        found += [_measured(task) for task in _flat(loaded)]
    return found


def per_example_scores(
    model: Any, tokenizer: Any, tasks: Sequence[EvalTask], limit: int | None, batch_size: int
) -> dict:
    """What a model scores on each example, task -> values, in the order of the examples.

    Raises:
        DistillError: the model predicts no next token, so it can neither score nor write texts.
    """
    check_model(model)
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    given = {task.name: task.task for task in tasks}
    found = evaluate(lm=wrapped, task_dict=given, limit=limit, log_samples=True, bootstrap_iters=0)
    values = {}
    for task in tasks:
        samples = found["samples"][task.name]
        first = samples[0]["filter"] if samples else None  # of several filters the task's first
        samples = sorted((s for s in samples if s["filter"] == first), key=lambda s: s["doc_id"])
        values[task.name] = [sample[task.metric] for sample in samples]
    return values


def check_model(model: Any) -> None:
    """Refuse a model that does not write text from left to right.

    Raises:
        DistillError: names its kind.
    """
    kind = model_type_of(model)
    if not (kind.vocabulary and kind.shifts_labels):
        raise DistillError(
            f"{type(model).__name__} predicts no next token, and tasks of the harness ask for likelihoods of texts or "
            "for texts: measure it with `trainer.evaluate()` on labels of its own kind."
        )


def _measured(task: Any) -> EvalTask:
    name, metrics = str(task.config.task), [*task.higher_is_better()]
    if not metrics:
        raise DistillError(f"Task {name!r} has no metric: give its YAML a metric_list.")
    own = (task.config.metadata or {}).get("category")
    plain = name.removeprefix("mini_")
    category = own or next((c for c, starts in CATEGORIES.items() if plain.startswith(starts)), "other")
    return EvalTask(
        name, category, metrics[0], bool(task.higher_is_better()[metrics[0]]), task.aggregation()[metrics[0]], task
    )


def _flat(tasks: dict) -> list[Any]:
    """The tasks of a dictionary in which groups are dictionaries again."""
    return [leaf for value in tasks.values() for leaf in (_flat(value) if isinstance(value, dict) else [value])]


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else "no message"
