"""Filters in order: what is kept, what each one took, what is set aside, and what is an error."""

import sys
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from hf_distill import DistillError
from hf_distill.filters import apply_filters, check_filters
from hf_distill.recipe.filters import FilterSpec, SelectSpec

FILTERS, SELECT = TypeAdapter(list[FilterSpec]), TypeAdapter(SelectSpec)


def filters(*specs):
    return FILTERS.validate_python(specs)


def row(completion="An answer.", prompt="A question?", **columns):
    return {
        "prompt": prompt,
        "completion": completion,
        "source": "task",
        "finish_reason": "stop",
        "tokens": 3,
    } | columns


@pytest.fixture
def checks(monkeypatch):
    """A module with functions of a user."""
    module = ModuleType("checks")

    def divide(row):
        return 1 / row["number"] > 0

    module.divide = divide
    module.score = lambda row: row["number"]
    module.text = lambda row: "good"
    monkeypatch.setitem(sys.modules, "checks", module)
    return module


def test_each_filter_is_given_what_those_before_it_kept():
    rows = [row(), row(finish_reason="length"), row("x" * 50, finish_reason="length"), row("x" * 50), row("Other.")]
    result = apply_filters(rows, filters("unfinished", {"name": "length", "max_characters": 20}))
    assert result.positions == [0, 4]
    assert [(count.label, count.given, count.removed, count.kept) for count in result.counts] == [
        ("unfinished", 5, 2, 3),
        ("length", 3, 1, 2),
    ]
    assert [count.examples for count in result.counts] == [[1, 2], [3]]
    assert [*result.kept_rows(rows)] == [rows[0], rows[4]]
    assert result.counts[1].as_json() == {
        "filter": "length",
        "options": {"max_characters": 20},
        "given": 3,
        "removed": 1,
        "set_aside": 0,
        "kept": 2,
    }


def test_rows_for_which_a_function_raises_are_set_aside_with_the_exception(checks):
    rows = [row(number=1), row(number=0), row(number=-1)]
    result = apply_filters(rows, filters({"name": "function", "function": "checks:divide"}))
    assert (result.positions, result.counts[0].removed, result.counts[0].set_aside) == ([0], 1, 1)
    (aside,) = result.set_aside_rows(rows)
    assert aside == rows[1] | {
        "set_aside_by": "function checks:divide",
        "set_aside_error": "ZeroDivisionError: division by zero",
    }


def test_scores_of_a_function_are_added_and_compared(checks):
    rows = [row(number=number) for number in (1.0, 3, 2)]
    spec = {"name": "function", "function": "checks:score", "min_score": 2}
    result = apply_filters(iter(rows), filters(spec))
    assert [(kept["number"], kept["score"]) for kept in result.kept_rows(rows)] == [(3, 3.0), (2, 2.0)]


@pytest.mark.parametrize("value", ["good", None, float("nan"), [1]])
def test_a_function_that_returns_no_number_sets_the_row_aside(checks, value):
    checks.text = lambda row: value if row["completion"] == "bad" else True
    result = apply_filters([row(), row("bad")], filters({"name": "function", "function": "checks:text"}))
    assert result.positions == [0]
    assert "must be a finite number" in result.set_aside[0].error


@pytest.mark.parametrize("as_scalar", ["numpy", "torch"])
def test_scalars_of_numpy_and_torch_are_numbers_and_booleans(checks, as_scalar):
    import numpy
    import torch

    make = numpy.float32 if as_scalar == "numpy" else torch.tensor
    checks.score = lambda row: make(0.5)
    checks.text = lambda row: make(1.0) > 0
    steps = ({"name": "function", "function": f"checks:{name}"} for name in ("score", "text"))
    assert apply_filters([row()], filters(*steps)).added == {"score": [0.5]}


def test_filters_that_leave_nothing_are_an_error_that_says_which_took_how_many(checks):
    rows = [row(finish_reason="length")] * 3 + [row(number=0)]
    steps = filters("unfinished", {"name": "function", "function": "checks:divide"})
    with pytest.raises(DistillError) as error:
        apply_filters(rows, steps)
    assert "leave none of 4 rows: unfinished removed 3 of 4; " in str(error.value)
    assert "function checks:divide removed 0 of 1 and raised an exception for 1" in str(error.value)
    assert "ZeroDivisionError: division by zero. Change the options" in str(error.value)
    with pytest.raises(DistillError, match="no rows to filter"):
        apply_filters([], steps)


def test_without_filters_all_rows_are_kept():
    rows = [row(), row()]
    assert [*apply_filters(rows, []).kept_rows(rows)] == rows


def test_a_missing_column_is_an_error_and_not_a_row_that_is_set_aside():
    with pytest.raises(DistillError, match="'finish_reason', which the rows do not have"):
        apply_filters([{"prompt": "p", "completion": "c"}], filters("unfinished"))


def test_problems_are_listed_together_before_rows_are_generated(checks):
    steps = filters(
        "unfinished",
        {"name": "function", "function": "checks:scor"},
        {"name": "function", "function": "no_such_module:f"},
        {"name": "decontaminate", "data": [{"path": "missing.jsonl"}]},
        {"name": "reference", "column": "solution", "compare": "exact"},
    )
    with pytest.raises(DistillError) as error:
        check_filters(steps, SELECT.validate_python("best_of_n"), ["prompt", "completion", "solutions"])
    for part in ("'finish_reason'", "mean 'score'?", "no_such_module", "missing.jsonl", "'solutions'?", "'logprob'"):
        assert part in str(error.value)
    check_filters(filters("unfinished"), None, ["finish_reason"])


@pytest.mark.parametrize("package", ["datasketch", "py3langid", "math_verify"])
def test_a_missing_package_is_an_error_with_the_command_that_installs_it(package, monkeypatch):
    steps = filters("near_duplicates", "language", {"name": "reference", "compare": "math"})
    monkeypatch.setattr("hf_distill.errors.find_spec", lambda name: None if name == package else object())
    with pytest.raises(DistillError, match=rf'needs {package}, .*pip install "hf-distill\[generate\]"'):
        apply_filters([row()], steps)


def test_a_users_module_is_found_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checks_of_this_folder.py").write_text("def long(row):\n    return len(row['completion']) > 3\n")
    steps = filters({"name": "function", "function": "checks_of_this_folder:long"})
    assert apply_filters([row("ab"), row("abcd")], steps).positions == [1]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["stop", "length"]), st.integers(0, 4)), min_size=1))
@settings(deadline=None)
def test_counts_add_up_and_equal_a_naive_loop(values):
    rows = [row(text * number, finish_reason=reason) for text, reason, number in values]
    steps = filters("unfinished", {"name": "length", "min_characters": 1}, "exact_duplicates")
    seen, expected = set(), []
    for i, each in enumerate(rows):
        if each["finish_reason"] == "stop" and each["completion"] and each["completion"] not in seen:
            seen.add(each["completion"])
            expected.append(i)
    if not expected:
        with pytest.raises(DistillError, match="leave none"):
            apply_filters(rows, steps)
        return
    result = apply_filters(rows, steps)
    assert result.positions == expected
    assert [count.given for count in result.counts[1:]] == [count.kept for count in result.counts[:-1]]
    assert result.counts[0].given == len(rows)
    assert result.counts[-1].kept == len(expected)
