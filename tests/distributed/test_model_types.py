"""Models of other types than causal language models train and evaluate on two processes as on one."""

import json
from pathlib import Path

import pytest
from launching import run_on_ranks

SCRIPT = str(Path(__file__).with_name("scripts_on_ranks.py"))
NAMES = (
    "glue",
    "multi_label",
    "qa",
    "image_classification",
    "summarization",
    "any_module",
    "two_image_sizes",
    "speech_recognition_ctc",
    "sentence_encoder",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, dict]:
    """Number of ranks -> name of a script -> its results."""
    folder = tmp_path_factory.mktemp("scripts")
    for ranks in (1, 2):
        ended = run_on_ranks(ranks, SCRIPT, str(folder), *NAMES)
        assert ended.returncode == 0, ended.stderr[-6000:]
    return {ranks: json.loads((folder / f"{ranks}.json").read_text()) for ranks in (1, 2)}


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_and_evaluate_a_script_as_one_does(results, name):
    """With 7 evaluation rows on 2 ranks, the row that is repeated to fill the last batch must not count twice."""
    one, two = results[1][name], results[2][name]
    assert (one["world"], two["world"], len(two["log"])) == (1, 2, 6)
    for a, b in zip(one["log"], two["log"], strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-5, abs=1e-6)
