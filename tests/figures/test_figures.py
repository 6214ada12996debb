"""Figures that the documentation quotes come from benchmarks/results; tests/figures/*.yaml says how."""

import dataclasses
import re

import pytest
from expressions import evaluate, format_like
from quoted_figures import (
    NOT_MEASURED,
    ROOT,
    Entry,
    difference,
    entries,
    exemptions,
    lists,
    looks_measured,
    occurrences,
    unlisted,
)

ENTRIES = list(entries())
LISTED_PAGES = [listed["page"] for listed in lists()]
GENERATED = {"docs/evidence.md"}  # compared with the results by tests/test_evidence.py
PAGES = ["README.md", "recipes/README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md")))]
RECIPES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "recipes").glob("*.yaml"))]


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_a_quoted_figure_agrees_with_its_json(entry):
    if problem := difference(entry, (ROOT / entry.page).read_text()):
        pytest.fail(problem, pytrace=False)


@pytest.mark.parametrize("page", sorted({*PAGES, *RECIPES} - GENERATED))
def test_every_figure_that_looks_measured_is_listed(page):
    text = (ROOT / page).read_text()
    if page in RECIPES:
        text = re.match(r"(#.*\n)*", text)[0]  # the header
    not_measured = [quoted for listed, _, quoted in exemptions() if listed == page]
    if figures := unlisted(text, [entry for entry in ENTRIES if entry.page == page], not_measured):
        pytest.fail("\n".join([f"{page} has figures that tests/figures does not list:", *figures]), pytrace=False)


@pytest.mark.parametrize(("page", "category", "text"), list(exemptions()))
def test_a_text_with_figures_that_are_not_measured_is_on_its_page(page, category, text):
    assert category in NOT_MEASURED, f"{category}: the categories are {', '.join(NOT_MEASURED)}"
    assert occurrences(text, (ROOT / page).read_text()), f"{page} does not have: {text}"


def test_a_page_has_one_list_and_each_text_is_listed_once():
    assert len(LISTED_PAGES) == len(set(LISTED_PAGES))
    assert [page for page in LISTED_PAGES if page not in (*PAGES, *RECIPES)] == []
    texts = [(entry.page, entry.text) for entry in ENTRIES]
    assert [text for text in texts if texts.count(text) > 1] == []


def test_a_figure_that_differs_from_its_json_is_reported():
    entry = Entry("page.md", "it took {26} steps", {"": "quickstart.json"}, ("models.student.perplexity",))
    assert "listed are ['26'], quickstart.json gives ['25']" in difference(entry, "Here it took 26\nsteps.")
    entry = dataclasses.replace(entry, text="it took {25} steps")
    assert difference(entry, "Here it took 25\nsteps.") == ""
    assert "the page has [['24']], the JSON ['25']" in difference(entry, "Here it took 24 steps.")
    assert "the page does not have this text" in difference(entry, "Here it takes 25 steps.")
    assert "has 1 figures and 0 values" in difference(dataclasses.replace(entry, values=()), "")


def test_a_figure_of_another_text_is_not_listed():
    entry = Entry("page.md", "perplexity {25.5}", {"": "quickstart.json"}, ("models.student.perplexity",))
    text = "The perplexity 25.5 and\nthe loss 25.5, for T above 0.5."
    assert unlisted(text, [entry], ["T above 0.5"]) == [
        "line 2: 'The perplexity 25.5 and\\nthe loss 25.5, for T above 0.5.'"
    ]
    assert len(unlisted(text, [], [])) == 3


def test_expressions_read_paths_filters_and_arithmetic():
    names = {"cases": [{"who": "a", "s": 1.0}, {"who": "b", "s": 3.0}, {"who": "b", "s": 5.0, "k": 1}]}
    assert evaluate("cases[0].s", names) == 1.0
    assert evaluate('cases[who == "a"].s', names) == 1.0
    assert evaluate('mean(cases[who == "b"].s)', names) == 4.0
    assert evaluate('100 * (cases[who == "b", k == None].s / cases[0].s - 1)', names) == 200
    assert evaluate("max(cases.s / 2)", names) == 2.5
    with pytest.raises(LookupError, match="no item"):
        evaluate('cases[who == "c"]', names)


@pytest.mark.parametrize("text", ['__import__("os")', "cases.append(1)", "[x for x in cases]", "2 ** 9", "lambda: 1"])
def test_expressions_run_no_code(text):
    with pytest.raises((ValueError, KeyError)):
        evaluate(text, {"cases": []})


@pytest.mark.parametrize(
    ("quoted", "value", "text"),
    [
        ("1.0", 1.04, "1.0"),
        ("1,589", 1588.6, "1,589"),
        ("2939", 2938.6, "2939"),
        ("2e-7", 1.7e-7, "2e-7"),
        ("1", -0.9, "-1"),
    ],
)
def test_a_figure_is_formatted_as_it_is_quoted(quoted, value, text):
    assert format_like(quoted, value) == text


def test_figures_with_units_and_decimals_look_measured_and_code_and_versions_do_not():
    page = """It takes 3 minutes, 5 % and 2.5 of TRL 1.16 (`alpha=0.5`, 2503.16870), 4x,
12 rows. [0.3](0.4)

| a | 0.25 | 1,589 MiB | 7 |

```
0.75
```
"""
    found = [re.match(r"[\d.,]+", match[0])[0] for match in looks_measured(page)]
    assert found == ["3", "5", "2.5", "4", "0.3", "0.25", "1,589"]


def test_lists_have_no_unknown_keys():
    for listed in lists():
        assert listed.keys() <= {"page", "measured", "not_measured"}, listed["page"]
        for group in listed.get("measured", []):
            assert group.keys() <= {"file", "files", "names", "figures"}, listed["page"]
            assert all(figure.keys() <= {"text", "at", "values"} for figure in group["figures"]), listed["page"]
