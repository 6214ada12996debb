"""Measures of generated text against naive references."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill import DistillError
from hf_distill.filters.diversity import distinct_n, measure_completions, self_bleu, summarize

WORDS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=12)


def grams(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def naive_bleu(tokens, references):
    """BLEU-4 with effective order and exponential smoothing, as sacrebleu has it by default."""
    logs, smoothing = [], 1.0
    for n in range(1, 5):
        counts = Counter(grams(tokens, n))
        if not counts:
            break
        most = Counter()
        for reference in references:
            most |= Counter(grams(reference, n))
        matches, total = sum((counts & most).values()), sum(counts.values())
        if n == 1 and not matches:
            return 0.0
        if not matches:
            smoothing *= 2
        logs.append(math.log(matches / total if matches else 1 / (smoothing * total)))
    closest = min((abs(len(reference) - len(tokens)), len(reference)) for reference in references)[1]
    brevity = min(1.0, math.exp(1 - closest / len(tokens)))
    return 100 * brevity * math.exp(sum(logs) / len(logs))


@given(st.lists(st.lists(WORDS, min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_self_bleu_equals_a_naive_bleu_against_the_other_texts_of_the_group(groups):
    expected = [
        naive_bleu(text, [*group[:i], *group[i + 1 :]])
        for group in groups
        if len(group) > 1
        for i, text in enumerate(group)
    ]
    result = self_bleu([[" ".join(text).upper() for text in group] for group in groups])
    assert result == (pytest.approx(sum(expected) / len(expected)) if expected else None)


@given(st.lists(WORDS, max_size=4), st.integers(1, 3))
@settings(deadline=None)
def test_distinct_n_equals_a_naive_count_over_all_texts(texts, n):
    everything = [gram for text in texts for gram in grams(text, n)]
    expected = len(set(everything)) / len(everything) if everything else None
    assert distinct_n([" ".join(text) for text in texts], n) == expected


def test_equal_texts_are_less_diverse_than_different_ones():
    same, other = ["The cat sat on the mat."] * 2, ["A dog ran away!", "Nobody else was there?"]
    assert self_bleu([same]) == pytest.approx(100)
    assert self_bleu([other]) < 20
    assert self_bleu([["猫坐在垫子上。", "狗跑到外面去了。"]]) < 30
    assert distinct_n(same, 1) < distinct_n(other, 1)


def test_lengths_are_summarized_by_percentiles():
    assert summarize(range(101)) == {"mean": 50, "min": 0, "p10": 10, "p50": 50, "p90": 90, "max": 100}
    assert summarize([7]) == dict.fromkeys(("mean", "min", "p10", "p50", "p90", "max"), 7)
    assert summarize([]) is None


def test_completions_are_measured_by_prompt():
    rows = [
        {"prompt": f"{i // 2}", "completion": f"The number {i // 2} is good.", "tokens": 4 + i % 2} for i in range(600)
    ]
    measures = measure_completions(iter(rows))
    assert (measures["rows"], measures["prompts"]) == (600, 300)
    assert measures["tokens"]["mean"] == 4.5
    assert measures["self_bleu_of_samples"] == pytest.approx(100)
    # Each text shares all but its number: 5 of 6 words, 3 of 5 bigrams, 1 of 4 trigrams, and 0 (smoothed) of 3 4-grams.
    assert measures["self_bleu_of_prompts"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)
    assert measures["distinct_1"] == pytest.approx(305 / 3600)
    measures = measure_completions([{"prompt": "p", "completion": ""}])
    assert {name for name, value in measures.items() if value is None} == {
        *("tokens", "distinct_1", "distinct_2", "distinct_3", "self_bleu_of_samples", "self_bleu_of_prompts")
    }


def test_self_bleu_without_sacrebleu_is_an_error(monkeypatch):
    monkeypatch.setattr("hf_distill.errors.find_spec", lambda name: None)
    with pytest.raises(DistillError, match=r'needs sacrebleu, .*pip install "hf-distill\[generate\]"'):
        self_bleu([])
