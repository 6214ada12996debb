"""The processes of a launch: what all must have in common."""

import hashlib
import json
from typing import Any

import torch

from ..core.processes import is_alone
from ..errors import DistillError
from ..recipe.schema import Recipe


def check_same_on_all_ranks(recipe: Recipe, facts: dict[str, Any]) -> None:
    """Refuse a launch whose processes were given different recipes, rows or versions: they would train on, wrongly.

    Args:
        recipe: of this process.
        facts: of the run, see `RunContext`.

    Raises:
        DistillError: on all processes; says what differs on which ranks.
    """
    if is_alone():
        return
    data, made = facts["data"], facts["environment"]
    own = {
        "recipe": hashlib.sha256(json.dumps(recipe.model_dump(), sort_keys=True).encode()).hexdigest()[:12],
        "rows to train on": str(data.get("train_fingerprint"))[:12],
        "held-out rows": data["eval_fingerprint"][:12],
        **{name: version for name, version in made.items() if name in ("hf_distill", "torch", "transformers")},
    }
    told: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, own)
    problems = [_diff_by_rank(name, [of_rank[name] for of_rank in told]) for name in own]
    if any(problems):
        raise DistillError(
            "The processes of this launch were not given the same: "
            + "; ".join(problem for problem in problems if problem)
            + ". Start all of them with one recipe, the same files and the same packages."
        )


def _diff_by_rank(name: str, values: list[str]) -> str:
    """Which ranks have which value; empty where all have one."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    if len(ranks) == 1:
        return ""
    each = ", ".join(f"{value} on rank{'s' if len(on) > 1 else ''} {', '.join(on)}" for value, on in ranks.items())
    return f"{name}: {each}"
