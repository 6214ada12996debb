"""The rows of tables of held-out metrics."""

import pytest

from hf_distill.core.held_out_metrics import formatted, rows_with_teacher, shown_metrics


def metrics(perplexity, teacher, **others):
    return {"perplexity": perplexity, "teacher_perplexity": teacher, "kl": 0.1, **others}


def titles_of(models, titles):
    return [title for title, _ in rows_with_teacher(models, titles, shown_metrics(models.values()))]


def test_a_chain_whose_students_have_different_tokens_has_a_row_of_the_teacher_for_each_vocabulary():
    numbers = {"stage-1": 0, "stage-2": 0, "student": 1, "control": 1}  # both vocabularies give almost one perplexity
    models = {name: metrics(9.0, 5.0 - number * 1e-5, vocabulary=number) for name, number in numbers.items()}
    titles = {name: name for name in models}
    rows = rows_with_teacher(models, titles, shown_metrics(models.values()))
    teacher = "teacher, over the tokens of the rows below"
    assert [title for title, _ in rows] == [teacher, "stage-1", "stage-2", teacher, "student", "control"]
    assert [values["perplexity"] for title, values in rows if title == teacher] == [5.0, 5.0 - 1e-5]


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ({"stage-1": metrics(9, 5), "student": metrics(7, 5.1)}, ["teacher", "stage-1", "student"]),
        ({"before": metrics(9, 5), "student": metrics(7, 4)}, ["teacher", "before", "student"]),  # an EMA changes
        ({"before": {"loss": 1.0}, "student": {"perplexity": 7.0}}, ["student"]),
    ],
)
def test_other_tables_have_at_most_one_row_of_the_teacher(models, expected):
    assert titles_of(models, {name: name for name in models}) == expected


def test_a_large_perplexity_fits_its_column():
    models = [metrics(3.1823036002007676e16, 9999999.5)]
    shown = [metric for metric in shown_metrics(models) if metric.key == "perplexity"]
    assert formatted(models[0], shown) == ["3.18e+16"]
    assert formatted(metrics(123456.789, 5), shown) == ["123456.79"]
    assert formatted({}, shown) == ["-"]
