"""Measures of generated text: distinct-n, self-BLEU and lengths. Imports no torch."""

from collections.abc import Iterable, Sequence
from statistics import fmean, quantiles
from typing import TypeAlias, TypeVar

from ..errors import require_package
from .rows import Row, completion_text, prompt_key
from .words import ngrams, words_and_marks

T = TypeVar("T")
Summary: TypeAlias = dict[str, float]
_MAX_TEXTS = 50  # of which self-BLEU compares all pairs
_MAX_DISTINCT_TEXTS = 2_000  # whose n-grams are held in memory
_MAX_PROMPTS = 200  # of which self-BLEU compares the samples


def distinct_n(texts: Iterable[str], n: int) -> float | None:
    """Return distinct n-grams / n-grams of all texts together; None if no text has n words and punctuation marks.

    Source: Li et al., 1510.03055.

    Args:
        texts: the texts.
        n: number of words and punctuation marks in an n-gram.
    """
    grams = [gram for text in texts for gram in ngrams(words_and_marks(text), n)]
    return len({*grams}) / len(grams) if grams else None


def self_bleu(groups: Iterable[Sequence[str]]) -> float | None:
    """Return the mean BLEU, from 0 to 100, of each text with the other texts of its group as references.

    Low values mean diverse texts. sacrebleu computes BLEU-4 on words and punctuation marks in lower case. Source: Zhu
    et al., 1802.01886.

    Args:
        groups: groups of texts, such as the samples of one prompt. Groups of one text are ignored.

    Returns:
        The mean over all texts; None if no group has two texts.
    """
    require_package("sacrebleu", "generate", "Self-BLEU")
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True, tokenize="none", force=True)  # the texts are split into words here
    scores = []
    for group in groups:
        texts = [" ".join(words_and_marks(text)) for text in group]
        for i, text in enumerate(texts if len(texts) > 1 else ()):
            scores.append(bleu.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score)
    return fmean(scores) if scores else None


def summarize(values: Iterable[float]) -> Summary | None:
    """Return mean, smallest and largest value and the 10th, 50th and 90th percentile; None without values."""
    values = sorted(values)
    if not values:
        return None
    tenths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return {
        "mean": fmean(values),
        "min": values[0],
        "p10": tenths[0],
        "p50": tenths[4],
        "p90": tenths[8],
        "max": values[-1],
    }


def measure_completions(rows: Iterable[Row], with_self_bleu: bool = True) -> dict[str, object]:
    """Return measures of the completions of a data set, for its card and the report.

    Args:
        rows: the rows; see `rows`.
        with_self_bleu: whether self-BLEU is computed, which needs sacrebleu.

    Returns:
        `rows` and `prompts` (numbers); `characters` and, if the rows have the column, `tokens` (see `summarize`);
        `distinct_1` to `distinct_3` (of up to 2,000 completions at equal distances); `self_bleu_of_samples` (between
        the samples of a prompt, of up to 200 prompts), and `self_bleu_of_prompts` (between the first samples of up to
        50 prompts). An undefined measure is None.
    """
    groups: dict[object, list[str]] = {}
    tokens = list[float]()
    for row in rows:
        groups.setdefault(prompt_key(row), []).append(completion_text(row))
        if isinstance(count := row.get("tokens"), int):
            tokens.append(count)
    texts = [text for group in groups.values() for text in group]
    sampled = [group for group in groups.values() if len(group) > 1] if with_self_bleu else []
    first = [group[0] for group in groups.values()] if with_self_bleu else []
    distinct_texts = _spread(texts, _MAX_DISTINCT_TEXTS)
    return {
        "rows": len(texts),
        "prompts": len(groups),
        "characters": summarize(map(len, texts)),
        "tokens": summarize(tokens),
        **{f"distinct_{n}": distinct_n(distinct_texts, n) for n in (1, 2, 3)},
        "self_bleu_of_samples": self_bleu(_spread(sampled, _MAX_PROMPTS)) if with_self_bleu else None,
        "self_bleu_of_prompts": self_bleu([_spread(first, _MAX_TEXTS)]) if with_self_bleu else None,
    }


def _spread(items: Sequence[T], number: int) -> list[T]:
    """Return at most `number` items at equal distances."""
    return [items[i * len(items) // number] for i in range(number)] if len(items) > number else [*items]
