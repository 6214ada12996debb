"""Losses of each source of a mixture, beside those of all."""

import torch
from torch import Tensor

from .distiller import StepOutput


def split_by_source(step: StepOutput, source: Tensor | None, names: tuple[str, ...]) -> dict[str, Tensor]:
    """What a step found of each source's asked tokens, zero for the others' tokens, so that sums tell them apart.

    Args:
        step: see `Step`.
        source: [B, S] index of each token's source; None: unknown.
        names: of the sources; a single one has nothing to be told apart from.

    Returns:
        {"TERM@NAME" of hard and soft terms, "asked@NAME"} -> [T].
    """
    if source is None or len(names) < 2:
        return {}
    own = step.targets.gather(source)
    found = {}
    for index, name in enumerate(names):
        mine = own == index
        found[f"asked@{name}"] = mine.to(torch.float32)
        found |= {f"{term}@{name}": values * mine for term, values in step.per_token.items() if _is_split(term)}
    return found


def average_by_source(sums: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """`soft_loss_NAME` and `hard_loss_NAME`, means over the asked tokens of each source that has any."""
    asked = {name: sums.get(f"asked@{name}", 0.0) for name in names}
    parts = {key: key.split("@", 1) for key in sums if "@" in key}
    return {
        f"{term}_loss_{name}": sums[key] / asked[name]
        for key, (term, name) in parts.items()
        if term != "asked" and asked[name]
    }


def _is_split(term: str) -> bool:
    return term in ("hard", "soft") or term.startswith("soft_")
