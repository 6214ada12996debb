"""Selections among the samples of a prompt: best_of_n and majority_vote. Imports no torch."""

from collections.abc import Callable, Sequence
from typing import Literal, cast

from pydantic import Field, field_validator

from .answers import Answer, AnswerStep
from .base import Choice, Selection
from .rows import Row, column, completion_text
from .user_functions import SCORE, check_function_name, finite_score, load_function

LOG_PROBABILITY = "logprob"
_VOTE_SHARE = "vote_share"


class BestOfN(Selection):
    """Keeps the samples of each prompt with the highest score, which is stored in the column `score`.

    Of samples with equal scores, the first is kept. Samples whose score cannot be computed are set aside.
    """

    name: Literal["best_of_n"] = "best_of_n"
    score: str = Field(
        LOG_PROBABILITY,
        description="logprob: the mean log-probability of the completion's tokens under the teacher. Otherwise a "
        "function as module:function, which gets a row and returns a number; not allowed in recipes from the Hub. "
        "Default: logprob.",
    )
    keep: int = Field(1, ge=1, description="Number of samples of each prompt that are kept, at least 1. Default: 1.")

    @field_validator("score")
    @classmethod
    def _check_score(cls, score: str) -> str:
        return score if score == LOG_PROBABILITY else check_function_name(score)

    @property
    def label(self) -> str:
        """The name in counts and messages."""
        return f"best_of_n by {self.score}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads in addition to `prompt`, `completion` and `source`."""
        return (LOG_PROBABILITY,) if self.score == LOG_PROBABILITY else ()

    @property
    def added_columns(self) -> tuple[str, ...]:
        """The columns that it adds to the rows."""
        return (SCORE,)

    def start(self) -> Callable[[Row], float]:
        """Return the function that measures one sample."""
        if self.score == LOG_PROBABILITY:
            return lambda row: finite_score(column(row, LOG_PROBABILITY, self.name), LOG_PROBABILITY)
        function = load_function(self.score)
        return lambda row: finite_score(function(dict(row)), self.score)

    def choose(self, measures: Sequence[object]) -> Choice:
        """Return the samples of a prompt that are kept."""
        scores = cast(Sequence[float], measures)
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[: self.keep]
        return {i: {SCORE: scores[i]} for i in best}


class MajorityVote(AnswerStep, Selection):
    """Keeps samples with the most frequent answer of each prompt, and stores its share in the column `vote_share`.

    Samples without an answer do not vote, but count in the share. Of answers with equally many votes, the one that
    occurs first is taken. Source: self-consistency of Wang et al., 2203.11171.
    """

    name: Literal["majority_vote"] = "majority_vote"
    keep: Literal["first", "all"] = Field(
        "first", description="Whether the first or all samples with the most frequent answer are kept. Default: first."
    )
    min_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Minimum share of the samples that have the answer, from 0 to 1; prompts below it are removed. "
        "Default: 0.",
    )

    @property
    def added_columns(self) -> tuple[str, ...]:
        """The columns that it adds to the rows."""
        return (_VOTE_SHARE,)

    def start(self) -> Callable[[Row], Answer | None]:
        """Return the function that measures one sample."""
        self.check_thread()
        return lambda row: self.read_answer(completion_text(row))

    def choose(self, measures: Sequence[object]) -> Choice:
        """Return the samples of a prompt that are kept."""
        answers = cast(Sequence[Answer | None], measures)
        groups: list[tuple[Answer, list[int]]] = []
        for i, answer in enumerate(answers):
            if answer is None:
                continue
            for first, members in groups:
                if self.is_same(first, answer):
                    members.append(i)
                    break
            else:
                groups.append((answer, [i]))
        members = max((members for _, members in groups), key=len, default=[])
        share = len(members) / len(answers)
        if share < self.min_share:
            return {}
        return {i: {_VOTE_SHARE: share} for i in (members if self.keep == "all" else members[:1])}
