"""Reference answers, majority vote and best of n: which completions have the right answer."""

import sys
import threading
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill import DistillError
from hf_distill.filters import apply_filters
from hf_distill.filters.reference import Reference
from hf_distill.filters.selections import BestOfN, MajorityVote


def row(completion="", prompt="p", **columns):
    return {"prompt": prompt, "completion": completion, "source": "task"} | columns


@pytest.mark.parametrize(
    ("compare", "completion", "reference", "is_right"),
    [
        ("exact", "  New\nYork. ", "new york", True),
        ("exact", "It is New York", "new york", False),
        ("exact", "", "new york", False),
        ("numeric", "3 + 4 = 7, so 7 eggs cost $1,234.50 in all.", "1234.5", True),
        ("numeric", "The answer is 12. Note that 3 is left.", 12, True),
        ("numeric", "#### 72.0", 72, True),
        ("numeric", "#### 72.1", 72, False),
        ("numeric", "It is 1.5e-2", 0.015, True),
        ("numeric", "It is 1e3", "1000", True),
        ("numeric", "It is 1e3", "1", False),
        ("numeric", "It is 3", 3.0000000001, True),
        ("numeric", "It is 0.333333", "1/3", True),
        ("numeric", "I do not know.", 3, False),
        ("choice", "The answer is (B).", "B", True),
        ("choice", "A cat is an animal.\nThe correct option is **B**", "B", True),
        ("choice", "A cat is an animal.\nThe correct option is **B**", "A", False),
        ("choice", r"So $\boxed{\text{B}}$", 1, True),
        ("choice", "B) Paris", "(B) Paris", True),
        ("choice", "Answer: B", "b", True),
        ("choice", "I do not know.", "A", False),
        ("math", r"So $\frac{2}{4}$", "1/2", True),
        ("math", r"\boxed{x^2 + 2x + 1}", "(x+1)^2", True),
        ("math", r"\boxed{x^2 + 2x}", "(x+1)^2", False),
        ("math", r"The answer is $2\sqrt{2}$", r"$\sqrt{8}$", True),
        ("math", r"\boxed{12\text{ cm}}", 12, True),
        ("math", r"\boxed{\{1, 2\}}", r"\{2, 1\}", True),
        ("math", "I do not know.", "2", False),
    ],
)
def test_an_answer_agrees_with_the_reference(compare, completion, reference, is_right):
    assert Reference(compare=compare).keep(row(completion, reference=reference)) is is_right


@pytest.mark.parametrize(
    ("compare", "value", "message"),
    [
        ("numeric", "none", "cannot be read as a number"),
        ("numeric", None, "not a text or a number"),
        ("numeric", True, "not a text or a number"),
        ("numeric", [], "is empty"),
        ("choice", 7, "not the index of one of 5 choices"),
        ("choice", "Paris", "cannot be read as a choice"),
        ("exact", " ", "cannot be read as text"),
        ("exact", "72", "does not contain '####'"),
    ],
)
def test_a_reference_that_cannot_be_read_sets_the_row_aside(compare, value, message):
    filters = [Reference(compare=compare, reference_after="####" if message.endswith("'####'") else None)]
    good = row("A 1", reference={"exact": "#### A 1", "choice": "A"}.get(compare, "1"))
    good["reference"] = good["reference"] if filters[0].reference_after else good["reference"].removeprefix("#### ")
    result = apply_filters([row("A 1", reference=value), good], filters)
    assert (result.positions, result.counts[0].set_aside) == ([1], 1)
    assert message in result.set_aside[0].error


def test_markers_and_lists_of_references():
    filters = [Reference(compare="exact", after="Answer:", reference_after="####", column="solutions")]
    solutions = ["By adding.\n#### five", "#### 5"]
    rows = [row(text, solutions=solutions) for text in ("Hm. Answer: 5", "Answer: 4. Answer: Five.", "5", "Answer: 55")]
    assert apply_filters(rows, filters).positions == [0, 1]


def test_an_answer_that_takes_too_long_to_compare_sets_the_row_aside(monkeypatch):
    monkeypatch.setattr("hf_distill.filters.answers._TIMEOUT_SECONDS", 1)
    rows = [row("$9^{9^{9^{9}}}$", reference="1"), row("$1$", reference="1")]
    result = apply_filters(rows, [Reference(compare="math")])
    assert (result.positions, result.set_aside[0].position) == ([1], 0)
    assert "TimeoutError: comparing two answers takes more than 1 seconds" in result.set_aside[0].error


def test_answers_outside_of_the_main_thread_are_an_error_and_not_set_aside():
    errors = []

    def run():
        try:
            apply_filters([row("1", reference="1")], [Reference(compare="numeric")])
        except DistillError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "runs in the main thread only" in errors[0]


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
@settings(deadline=None)
def test_numbers_are_compared_to_six_decimals(number, other):
    filters = Reference(compare="numeric")
    assert filters.keep(row(f"It is {number!r}", reference=repr(number)))
    if abs(number - other) > 2e-6:
        assert not filters.keep(row(f"It is {number!r}", reference=other))


def sampled(*groups):
    """Rows of the samples of several prompts, interleaved."""
    longest = max(map(len, groups))
    return [
        row(group[i], prompt=f"prompt {number}", sample=i)
        for i in range(longest)
        for number, group in enumerate(groups)
        if i < len(group)
    ]


def test_the_most_frequent_answer_of_each_prompt_is_kept():
    rows = sampled(["I say 1", "0.5", "$\\frac{1}{2}$", "1/2"], ["7", "8"], ["none", "none"])
    result = apply_filters(rows, [], MajorityVote(compare="math"))
    kept = [*result.kept_rows(rows)]
    assert [(each["prompt"], each["completion"], each["vote_share"]) for each in kept] == [
        ("prompt 1", "7", 0.5),
        ("prompt 0", "0.5", 0.75),
    ]
    result = apply_filters(rows, [], MajorityVote(compare="math", keep="all", min_share=0.6))
    assert [rows[i]["completion"] for i in result.positions] == ["0.5", "$\\frac{1}{2}$", "1/2"]
    assert (result.counts[0].given, result.counts[0].removed) == (8, 5)


def naive_majority(answers):
    counts = {answer: answers.count(answer) for answer in answers if answer}
    if not counts:
        return None, 0
    best = max(counts.values())
    return next(answer for answer in answers if counts.get(answer) == best), best / len(answers)


@given(st.lists(st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=1, max_size=6), min_size=1, max_size=4))
@settings(deadline=None)
def test_majority_vote_equals_a_naive_count(groups):
    rows = sampled(*groups)
    expected = {}
    for number, group in enumerate(groups):
        answer, share = naive_majority(group)
        if answer:
            expected[f"prompt {number}"] = (answer, share)
    if not expected:
        with pytest.raises(DistillError, match="leave none"):
            apply_filters(rows, [], MajorityVote(compare="exact"))
        return
    kept = apply_filters(rows, [], MajorityVote(compare="exact")).kept_rows(rows)
    assert {each["prompt"]: (each["completion"], each["vote_share"]) for each in kept} == expected


@given(st.lists(st.lists(st.integers(-3, 0), min_size=1, max_size=5), min_size=1, max_size=4), st.integers(1, 3))
@settings(deadline=None)
def test_best_of_n_keeps_the_highest_scores_of_each_prompt(groups, keep):
    rows = [
        row(str(i), prompt=f"prompt {number}", logprob=float(score))
        for number, group in enumerate(groups)
        for i, score in enumerate(group)
    ]
    result = apply_filters(rows, [], BestOfN(keep=keep))
    kept = [*result.kept_rows(rows)]
    for number, group in enumerate(groups):
        samples = [each for each in kept if each["prompt"] == f"prompt {number}"]
        order = sorted(range(len(group)), key=lambda i: (-group[i], i))[:keep]
        assert [int(each["completion"]) for each in samples] == sorted(order)
        assert [each["score"] for each in samples] == [group[i] for i in sorted(order)]


def test_a_sample_without_a_score_is_set_aside_and_the_others_compete(monkeypatch):
    module = ModuleType("judges")
    module.length = lambda row: len(row["completion"]) / row["divisor"]
    monkeypatch.setitem(sys.modules, "judges", module)
    rows = [row("long answer", divisor=0), row("ab", divisor=1), row("abc", divisor=1), row("x", "other", divisor=1)]
    result = apply_filters(rows, [], BestOfN(score="judges:length"))
    assert (result.positions, result.added) == ([2, 3], {"score": [3.0, 1.0]})
    assert (result.counts[0].label, result.counts[0].set_aside) == ("best_of_n by judges:length", 1)
    assert "ZeroDivisionError" in result.set_aside[0].error
    rows = [row("a", logprob=None), row("b", logprob=-1.0)]
    result = apply_filters(rows, [], BestOfN())
    assert (result.positions, result.counts[0].set_aside) == ([1], 1)


def test_prompts_with_one_text_are_apart_if_their_number_differs():
    rows = [row("a", row=0, logprob=-1.0), row("b", row=1, logprob=-2.0)]
    assert apply_filters(rows, [], BestOfN()).positions == [0, 1]
    rows = [{"prompt": [{"role": "user", "content": text}], "completion": "c", "logprob": -1.0} for text in "xxy"]
    assert apply_filters(rows, [], BestOfN()).positions == [0, 2]
