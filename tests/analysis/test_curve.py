"""A curve consists of the evaluations of its run, and its compute is that of the plan."""

import json
import math

import pytest
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.analysis import open_run, plan
from hf_distill.analysis.curve import Point, _tokens_at_shares, compute, data_curve
from hf_distill.cli import app
from hf_distill.recipe import load_recipe, run_recipe


def run_of(folder, *overrides, name="quickstart"):
    run_recipe(load_recipe(name, [f"train.output_dir={folder}", "control=null", *overrides], smoke=True))
    return open_run(folder)


def test_points_equal_the_evaluations_of_the_run(tmp_path):
    run = run_of(tmp_path / "run", "train.eval_strategy=steps", "train.eval_steps=1")
    result = data_curve(run)
    evaluations = {line["step"]: line for line in run.logs() if "eval_perplexity" in line}
    assert [p.step for p in result.points] == [0, 1, 2, 3, 4]
    for p in result.points:
        assert p.nll == pytest.approx(math.log(evaluations[p.step]["eval_perplexity"]))
        assert p.kl == evaluations[p.step]["eval_kl"]
        assert p.tokens == round(p.step * 2 * run.results["data"]["tokens_per_row"])
        first, last = result.points[0].nll, result.points[-1].nll
        assert p.share == pytest.approx((first - p.nll) / (first - last))
    assert result.hint is None
    assert (run.folder / "curve.json").exists() is False


def test_shares_are_interpolated_linearly_between_points():
    points = [Point(0, 0, 5, None, None, 0.0), Point(1, 100, 3, None, None, 0.8), Point(2, 300, 2.5, None, None, 1.0)]
    assert _tokens_at_shares(points, (0.4, 0.9)) == {0.4: 50, 0.9: 200}


def test_two_evaluations_give_a_hint_instead_of_a_curve(tmp_path):
    run = run_of(tmp_path / "run")
    result = data_curve(run)
    assert [p.step for p in result.points] == [0, 4]
    assert "train.eval_steps" in result.hint
    assert result.reached == {}


def test_compute_equals_that_of_the_plan(tmp_path):
    recipe = load_recipe("llama-70b-to-8b-nf4")
    result, planned = compute(recipe, 10**9), plan(recipe, 1, 80.0)
    assert result.teacher == pytest.approx(planned.teacher.forward * 1e9)
    assert result.student == pytest.approx(planned.student.training * 1e9)
    assert result.pretraining == planned.pretraining
    assert result.share == pytest.approx((result.teacher + result.student) / planned.pretraining)
    cached = compute(load_recipe("cached", smoke=True), 1000)
    assert cached.teacher == 0


def test_compute_of_a_sharded_recipe_contains_the_teacher():
    assert compute(load_recipe("qwen-72b-to-7b-fsdp2"), 1000).teacher > 2 * 72e9 * 1000 * 0.95


def test_a_run_without_evaluations_or_with_stages_gives_an_error(tmp_path):
    run = run_of(tmp_path / "run")
    evidence = json.loads((run.folder / "results.json").read_text())
    (run.folder / "results.json").write_text(json.dumps(evidence | {"log_lines": {}}))
    (run.folder / "metrics.jsonl").write_text("")
    with pytest.raises(DistillError, match=r"has 0 evaluations.*train\.eval_strategy=steps"):
        data_curve(run)
    staged = run_of(tmp_path / "chain", name="progressive")
    with pytest.raises(
        DistillError, match=r"is a run with stages: give the folder of one of its stages, such as .*stage-1"
    ):
        data_curve(staged)


def test_the_command_prints_and_writes_the_curve(tmp_path):
    run = run_of(tmp_path / "run", "train.eval_strategy=steps", "train.eval_steps=1")
    outcome = CliRunner().invoke(app, ["curve", str(run.folder)], env={"COLUMNS": "80"})
    assert outcome.exit_code == 0, outcome.output
    assert "95% of the fall in NLL was reached after" in outcome.output
    assert "of pretraining the student" in outcome.output
    assert (run.folder / "curve.json").is_file()
