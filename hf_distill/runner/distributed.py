"""Preparation on all processes of a launch, and the check that their recipe, rows and package versions are the same."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainingArguments

from ..core.processes import is_alone
from ..core.results import Results
from ..errors import DistillError
from ..recipe.schema import Recipe


@contextmanager
def main_process_first(args: TrainingArguments) -> Iterator[None]:
    """Run a block on the main process of each machine first; the others find in caches what it has prepared.

    What the block logs is the same on all processes, so that the first one of the launch alone logs its warnings.

    Args:
        args: The training arguments.
    """
    package = logging.getLogger(__name__.partition(".")[0])
    level = package.level
    with args.main_process_first():
        try:
            if args.process_index != 0:
                package.setLevel(logging.ERROR)
            yield
        finally:
            package.setLevel(level)


def check_same_on_all_ranks(recipe: Recipe, facts: Results) -> None:
    """Refuse a launch whose processes have different recipes, rows or versions, which would train incorrectly.

    Args:
        recipe: The recipe of this process.
        facts: The facts of the run; see `RunContext`.

    Raises:
        DistillError: Something differs. All processes raise it, and the message names the ranks.
    """
    if is_alone():
        return
    data, environment = facts["data"], facts["environment"]
    local_values = {
        "recipe": hashlib.sha256(json.dumps(recipe.model_dump(), sort_keys=True).encode()).hexdigest()[:12],
        "training rows": str(data.get("train_fingerprint"))[:12],
        "held-out rows": data["eval_fingerprint"][:12],
        **{name: version for name, version in environment.items() if name in ("hf_distill", "torch", "transformers")},
    }
    gathered = [local_values] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, local_values)
    problems = [_diff_by_rank(name, [str(of_rank[name]) for of_rank in gathered]) for name in local_values]
    if any(problems):
        raise DistillError(
            "The processes of this launch differ: "
            + "; ".join(problem for problem in problems if problem)
            + ". Start all of them with the same recipe, the same files and the same package versions."
        )


def _diff_by_rank(name: str, values: list[str]) -> str:
    """Describe which ranks have which value; empty if all ranks have the same."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    if len(ranks) == 1:
        return ""
    each = ", ".join(
        f"{value} on rank{'s' if len(ranks_with_value) > 1 else ''} {', '.join(ranks_with_value)}"
        for value, ranks_with_value in ranks.items()
    )
    return f"{name}: {each}"
