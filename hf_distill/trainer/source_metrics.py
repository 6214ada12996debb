"""Losses of each source of a data mixture, in addition to those of all target tokens."""

import torch
from torch import Tensor

from ..core.row_values import ORIGINS
from .distiller import StepOutput


def split_by_source(step: StepOutput, source: Tensor | None, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Split the hard and soft losses of a step by the source of each target token.

    Args:
        step: the output of the step.
        source: [B, S] index of the source of each token, or [B] of each row; None if the batch has none.
        names: names of the sources. With fewer than two there is nothing to split.

    Returns:
        {"TERM@NAME" for hard and soft terms, "target_tokens@NAME"} -> [T], zero for the tokens of other sources, so
        that a sum over the tokens is the sum of one source.
    """
    if source is None or len(names) < 2:
        return {}
    token_source = step.targets.gather_by_row(source)
    per_source = {}
    for index, name in enumerate(names):
        mask = token_source == index
        per_source[f"target_tokens@{name}"] = mask.to(torch.float32)
        per_source |= {f"{term}@{name}": values * mask for term, values in step.per_token.items() if _is_split(term)}
    return per_source


def origin_label(origin: str) -> str:
    """Return the name of an author of target tokens in the logs, as in `soft_loss_origin_teacher`."""
    return f"origin_{origin}"


ORIGIN_LABELS = tuple(map(origin_label, ORIGINS))


def average_by_source(sums: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """Return `soft_loss_NAME` and `hard_loss_NAME`, the means over the target tokens of each source that has any.

    Args:
        sums: sums of `split_by_source` over target tokens.
        names: names of the sources.
    """
    counts = {name: sums.get(f"target_tokens@{name}", 0.0) for name in names}
    term_and_source = {key: key.split("@", 1) for key in sums if "@" in key}
    return {
        f"{term}_loss_{name}": sums[key] / counts[name]
        for key, (term, name) in term_and_source.items()
        if term != "target_tokens" and counts[name]
    }


def _is_split(term: str) -> bool:
    """Return whether a term is reported for each source: the hard loss and the soft losses."""
    return term in ("hard", "soft") or term.startswith("soft_")
