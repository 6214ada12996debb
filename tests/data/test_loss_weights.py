"""Weights of rows from a column of scores, `loss_weight` of a data source."""

import json

import pytest
import torch
import yaml

from hf_distill.data import load_examples
from hf_distill.data.loss_weights import with_loss_weights
from hf_distill.errors import DistillError
from hf_distill.recipe.load import load_recipe
from hf_distill.runner.tasks import task_of

SCORES = [-1.5, 0.0, 2.0, 700.0, -300.0, 1.0]


@pytest.fixture
def source(tmp_path):
    """`source(scores)`: a file of prompts and completions with a column `score`."""

    def write(scores, **columns):
        rows = [
            {"prompt": f"q{i}", "completion": f"a{i}", "score": s, "weight": 9.0, **columns}
            for i, s in enumerate(scores)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "rows.jsonl"

    return write


def weights_of(path, temperature):
    return list(with_loss_weights(load_examples(str(path)), "score", temperature, "data.task")["weight"])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 50.0])
def test_weights_are_the_powers_of_the_scores_divided_by_their_mean(source, temperature):
    powers = torch.softmax(torch.tensor(SCORES, dtype=torch.float64) / temperature, 0)
    torch.testing.assert_close(
        torch.tensor(weights_of(source(SCORES), temperature)), (powers * len(SCORES)).float(), rtol=1e-6, atol=0
    )


def test_without_a_temperature_the_weight_is_the_score(source):
    assert weights_of(source([0, 0.5, 3.0]), None) == [0.0, 0.5, 3.0]


@pytest.mark.parametrize(
    ("scores", "temperature", "message"),
    [
        (
            [0.5, -0.1],
            None,
            r"data.task, row 1 \(counted from 0\), column score: -0.1 cannot be the factor.*temperature",
        ),
        ([0.5, None], None, r"row 1 .*column score: loss_weight needs a finite number in each row; found None"),
        ([0.5, None], 1.0, r"row 1 .*column score: loss_weight needs a finite number in each row; found None"),
        (["good", "bad"], 1.0, r"row 0 .*found 'good'"),
        ([True, False], None, r"row 0 .*found True"),
    ],
)
def test_scores_that_are_no_weights_are_refused(source, scores, temperature, message):
    with pytest.raises(DistillError, match=message):
        weights_of(source(scores), temperature)


@pytest.mark.parametrize(("text", "message"), [(False, "did you mean 'score'"), (True, "text sources are joined")])
def test_a_missing_column_is_named(source, tmp_path, text, message):
    path = source([1.0])
    if text:
        path = tmp_path / "text.txt"
        path.write_text("some text")
    with pytest.raises(DistillError, match=rf"loss_weight names the column 'scor'.*{message}"):
        with_loss_weights(load_examples(str(path)), "scor", None, "data.task")


@pytest.mark.parametrize("by", ["score", {"column": "score"}, {"column": "score", "temperature": 2.0}])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_recipe_weights_the_training_rows_and_only_them(source, tmp_path, by, streaming):
    """The held-out rows of `eval.path` have no column of scores."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
    values = {
        "student": {"model": "smoke:llama/student"},
        "teacher": {"model": "smoke:llama/teacher"},
        "data": {
            "task": {"path": str(source([0.5, 2.0, 1.0])), "loss_weight": by, "streaming": streaming},
            "eval": {"path": str(held_out)},
        },
        "train": {"output_dir": str(tmp_path / "run"), "max_steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    if streaming and "temperature" in by:
        with pytest.raises(DistillError, match="which a stream does not give"):
            load_recipe(str(tmp_path / "recipe.yaml"))
        return
    task = task_of(load_recipe(str(tmp_path / "recipe.yaml")))
    prepared = task.prepare_data(task.load_processor(), 0, 3)
    powers = torch.exp(torch.tensor([0.5, 2.0, 1.0]) / 2)
    expected = powers / powers.mean() if "temperature" in by else torch.tensor([0.5, 2.0, 1.0])
    torch.testing.assert_close(torch.tensor([row["weight"] for row in prepared.train]).sort()[0], expected.sort()[0])
    assert "weight" not in prepared.held_out.column_names
