"""Tasks of the lm-evaluation-harness, and the scores of a model on each of their examples."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import DistillError, did_you_mean, require_package
from ..models.model_types import model_type_of

if TYPE_CHECKING:
    from lm_eval.api.task import Task

PACKAGED = ("mini_hellaswag", "mini_truthfulqa", "mini_gsm8k", "mini_gsm8k_solutions", "mini_documentation")
# Category of a task by the beginning of its name; metadata.category of the task has precedence.
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
    """One task of the harness with its first metric.

    metric:           name of the metric
    higher_is_better: of the metric
    aggregate:        computes a score from the values of examples
    """

    name: str
    category: str
    metric: str
    higher_is_better: bool
    aggregate: Callable[[Sequence], float]
    task: "Task"


def load_tasks(names: Sequence[str] | None = None, folder: str | Path | None = None) -> list[EvalTask]:
    """Load tasks of the harness and of a folder of YAML tasks by name, with their data.

    Args:
        names: None: all tasks of the folder, or the packaged ones, which need no network.
        folder: of custom tasks in YAML.

    Returns:
        the tasks.

    Raises:
        DistillError: lm-eval is not installed, a name is unknown, or a task's data cannot be loaded.
    """
    require_package("lm_eval", "eval", "Retention")
    from lm_eval.tasks import TaskManager, get_task_dict

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    packaged = files("hf_distill.recipes").joinpath("tasks")
    if folder is not None and not [*Path(folder).glob("*.yaml")]:
        raise DistillError(
            f"The folder {folder} has no .yaml task: write a task in the format of the lm-evaluation-harness, or omit "
            "the folder."
        )
    include_paths = [str(packaged), *([] if folder is None else [str(folder)])]
    custom = [] if folder is None else [*TaskManager(include_path=str(folder), include_defaults=False).all_tasks]
    requested = [*(names if names is not None else custom or PACKAGED)]
    if not requested:
        raise DistillError("No task was given: name one with --task, or omit the option to use the packaged tasks.")
    manager = TaskManager(include_path=include_paths, include_defaults=False)
    if not {*requested} <= {*manager.all_subtasks}:  # a task or group of the harness, whose index takes seconds
        manager = TaskManager(include_path=include_paths)
    if unknown := [name for name in requested if name not in manager.all_tasks]:
        near = did_you_mean(unknown[0], manager.all_tasks)
        raise DistillError(f"There is no task {unknown[0]!r}{near}. `lm-eval ls tasks` lists the tasks of the harness.")
    tasks: list[EvalTask] = []
    for name in requested:
        try:
            loaded = get_task_dict([name], manager)
        except ModuleNotFoundError as error:
            raise DistillError(f"Task {name!r}: {error}") from error
        except Exception as error:  # of datasets, huggingface_hub, httpx: whatever a download may raise
            raise DistillError(
                f"The data of task {name!r} cannot be loaded ({type(error).__name__}: {_first_line(error)}). A task of "
                "the harness is downloaded from the Hub: go online, or give YAML tasks on local files (--tasks-folder)."
            ) from error
        tasks += [_eval_task(task) for task in _leaves(loaded)]
    return tasks


def per_example_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[EvalTask],
    limit: int | None,
    batch_size: int,
) -> dict[str, list]:
    """Return task -> scores of a model on each example, in the order of the examples.

    Raises:
        DistillError: the model is not a causal language model, so it can neither score nor generate text.
    """
    check_model(model)
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    task_dict = {task.name: task.task for task in tasks}
    results = evaluate(lm=language_model, task_dict=task_dict, limit=limit, log_samples=True, bootstrap_iters=0)
    scores = {}
    for task in tasks:
        samples = results["samples"][task.name]
        first = samples[0]["filter"] if samples else None  # of several filters the task's first
        samples = sorted((s for s in samples if s["filter"] == first), key=lambda s: s["doc_id"])
        scores[task.name] = [sample[task.metric] for sample in samples]
    return scores


def check_model(model: nn.Module) -> None:
    """Check that a model is a causal language model.

    Raises:
        DistillError: it is not; names its class.
    """
    model_type = model_type_of(model)
    if not (model_type.vocabulary and model_type.shifts_labels):
        raise DistillError(
            f"{type(model).__name__} predicts no next token, and tasks of the harness need the likelihood of a text or "
            "a generated text: evaluate it with `trainer.evaluate()` on its labels instead."
        )


def _eval_task(task: "Task") -> EvalTask:
    name, metrics = str(task.config.task), [*task.higher_is_better()]
    if not metrics:
        raise DistillError(f"Task {name!r} has no metric: add a metric_list to its YAML.")
    declared = (task.config.metadata or {}).get("category")
    plain = name.removeprefix("mini_")
    category = declared or next((c for c, starts in CATEGORIES.items() if plain.startswith(starts)), "other")
    return EvalTask(
        name, category, metrics[0], bool(task.higher_is_better()[metrics[0]]), task.aggregation()[metrics[0]], task
    )


def _leaves(tasks: dict) -> list["Task"]:
    """Return the tasks of a nested dictionary of task groups."""
    return [leaf for value in tasks.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else "no message"
