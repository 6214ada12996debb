"""Evaluation of a generated data set against naive counts."""

from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.filters import apply_filters
from hf_distill.filters.selections import BestOfN
from hf_distill.filters.text_filters import Length, Unfinished
from hf_distill.generation import evaluation
from hf_distill.generation.card import CardFacts, render_card
from hf_distill.generation.evaluation import KEPT, Example, evaluate_data_set, measures_table, token_histogram


def rows_of(prompts, samples=2):
    return [
        {
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "completion": [{"role": "assistant", "content": f"answer {i} of sample {j}" * (1 + i)}],
            **{"source": "task", "row": i, "sample": j, "tokens": 3 * (1 + i) + j, "reference": f"reference {i}"},
            "finish_reason": "length" if i == 1 else "stop",
            "logprob": -float(j),
        }
        for i in range(prompts)
        for j in range(samples)
    ]


def evaluated(rows, filters=(), select=None):
    if not filters:
        return evaluate_data_set("org/teacher", rows, rows, []), rows
    result = apply_filters(rows, filters, select)
    kept = [*result.kept_rows(rows)]
    return evaluate_data_set("org/teacher", rows, kept, result.counts), kept


def test_filters_are_counted_and_shown_with_what_they_removed():
    rows = rows_of(4)
    result, kept = evaluated(rows, [Unfinished(), Length(max_tokens=11)], BestOfN())
    assert [(each["filter"], each["given"], each["removed"], each["kept"]) for each in result.filters] == [
        ("unfinished", 8, 2, 6),
        ("length", 6, 2, 4),
        ("best_of_n by logprob", 4, 2, 2),
    ]
    assert [(row["row"], row["sample"]) for row in kept] == [(0, 0), (2, 0)]
    assert {name: part["rows"] for name, part in result.measures.items()} == {
        "generated": 8,
        "kept": 2,
        "references": 4,
    }
    assert result.measures["references"]["characters"]["mean"] == len("reference 0")
    assert [(each.removed_by, each.completion.split("answer ")[1]) for each in result.examples] == [
        (None, "0 of sample 0"),
        (None, "2 of sample 0"),
        ("unfinished", "1 of sample 0"),
        ("unfinished", "1 of sample 1"),
        ("length", "3 of sample 0"),
        ("length", "3 of sample 1"),
        ("best_of_n by logprob", "0 of sample 1"),
        ("best_of_n by logprob", "2 of sample 1"),
    ]
    assert result.examples[2].prompt == "question 1"
    assert result.examples[2].reference == "reference 1"


def test_without_filters_and_references_one_part_is_measured():
    rows = [{**row, "reference": None} for row in rows_of(2)]
    result, _ = evaluated(rows)
    assert list(result.measures) == list(result.lengths.counts) == [KEPT]
    assert {example.reference for example in result.examples} == {None}


@given(st.lists(st.integers(0, 1000), max_size=40), st.lists(st.integers(0, 1000), min_size=1, max_size=40))
@settings(deadline=None)
def test_the_histogram_equals_a_naive_count(kept, generated):
    parts = {"generated": [{"tokens": n} for n in generated], KEPT: [{"tokens": n} for n in kept]}
    result = token_histogram(parts)
    edges = result.edges
    for name, lengths in (("generated", generated), (KEPT, kept)):
        expected = [0] * 24
        for n in lengths:
            expected[min(next(i for i in range(24) if n < edges[i + 1] or i == 23), 23)] += 1
        assert result.counts[name] == expected
    assert edges[0] == 0
    assert edges[-1] == max(1, *kept, *generated)


def test_long_texts_of_examples_lose_their_middle():
    rows = [{**rows_of(1)[0], "completion": "a" * 2000 + "b" * 2000}]
    (example,) = evaluated(rows)[0].examples
    assert example == Example(
        "question 0", "a" * 750 + "\n[... 2,500 characters ...]\n" + "b" * 750, "reference 0", None
    )


def test_the_card_shows_the_measures():
    result, _ = evaluated(rows_of(4), [Unfinished()])
    card = render_card(
        CardFacts("t", "m", None, {}, {}, {}, [], filters=result.filters, measures=result.measures)
    ).splitlines()
    assert "|  | generated | kept | in the data |" in card
    assert "| rows | 8 | 6 | 4 |" in card
    (tokens,) = (line for line in card if line.startswith("| tokens, mean"))
    values = sorted(row["tokens"] for row in rows_of(4))
    assert tokens.split(" | ")[1] == f"{sum(values) / 8:.1f}"
    assert tokens.endswith("| - |")
    assert any(line.startswith("| self-BLEU of the samples") for line in card)


def test_self_bleu_is_left_out_without_sacrebleu(monkeypatch):
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    result, _ = evaluated(rows_of(3))
    assert result.measures[KEPT]["self_bleu_of_samples"] is None
    assert not any(row[0].startswith("self-BLEU") for row in measures_table(result.measures)[1])
    assert result.measures[KEPT]["distinct_1"] > 0
