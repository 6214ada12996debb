"""Why a distillation is worse than it should be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DistillError
from .agreement import Agreement, agreement_of
from .pair import Pair
from .verdicts import Verdict, verdicts


@dataclass(frozen=True)
class Tokenizer:
    """Whether text survives the tokenizer.

    rows:    that were read back and tokenised again
    changed: how many of them did not come back as they were
    outside: ids of these rows that the models do not have
    """

    rows: int
    changed: int
    outside: int


@dataclass(frozen=True)
class Diagnosis:
    """What was measured of a pair, and what it means.

    agreement:     see `Agreement`
    tokenizer:     None: the pair has none
    verdicts:      failures by name; none: nothing was found
    not_looked_at: what could not be judged, and why
    """

    agreement: Agreement
    tokenizer: Tokenizer | None
    verdicts: list[Verdict]
    not_looked_at: list[str]


def diagnose(pair: Pair, tokens: int | None = 4096, logs: Sequence[Mapping[str, Any]] = ()) -> Diagnosis:
    """Compare student and teacher over held-out tokens, in one forward of each, and name what went wrong.

    Args:
        pair: see `Pair.of_run`; its objective is the one that the student was trained with.
        tokens: until so many were asked; None: all.
        logs: lines of the training's log (`run.logs()`); without them nothing is said of its course.

    Raises:
        DistillError: the slice is empty, or a model is missing.
    """
    if pair.teacher is None or pair.student is None:
        lacks = "teacher" if pair.teacher is None else "student"
        raise DistillError(f"There is no {lacks} to diagnose: a pair of both is compared.")
    found = agreement_of(pair, tokens)
    objective = {"temperature": pair.temperature, "alpha": pair.alpha}
    unknown = []
    if len([log for log in logs if "loss" in log]) < 8:
        unknown.append("under_trained, capacity_gap: fewer than 8 lines of the training's log; set train.logging_steps")
    return Diagnosis(found, _tokenizer(pair, found.vocab_size), verdicts(found, logs, objective), unknown)


def _tokenizer(pair: Pair, vocab_size: int, count: int = 8) -> Tokenizer | None:
    if pair.tokenizer is None:
        return None
    rows = [list(pair.rows[i]["input_ids"]) for i in range(min(count, len(pair.rows)))]
    texts = [pair.tokenizer.decode(ids) for ids in rows]
    again = [pair.tokenizer.decode(pair.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    outside = sum(int(i) >= vocab_size for ids in rows for i in ids)
    return Tokenizer(len(rows), sum(a != b for a, b in zip(texts, again, strict=True)), outside)
