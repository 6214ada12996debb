"""A curve is a run's own evaluations; its operations are the plan's."""

import json
import math

import pytest
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.analysis import open_run, plan
from hf_distill.analysis.curve import Point as P
from hf_distill.analysis.curve import _reached, compute, data_curve
from hf_distill.cli import app
from hf_distill.recipe import load_recipe, run_recipe


def run_of(folder, *overrides, name="quickstart"):
    run_recipe(load_recipe(name, [f"train.output_dir={folder}", "control=null", *overrides], smoke=True))
    return open_run(folder)


def test_points_are_the_run_s_evaluations(tmp_path):
    run = run_of(tmp_path / "run", "train.eval_strategy=steps", "train.eval_steps=1")
    found = data_curve(run)
    evaluations = {line["step"]: line for line in run.logs() if "eval_perplexity" in line}
    assert [p.step for p in found.points] == [0, 1, 2, 3, 4]
    for p in found.points:
        assert p.nll == pytest.approx(math.log(evaluations[p.step]["eval_perplexity"]))
        assert p.kl == evaluations[p.step]["eval_kl"]
        assert p.tokens == round(p.step * 2 * run.results["data"]["tokens_per_row"])
        first, last = found.points[0].nll, found.points[-1].nll
        assert p.share == pytest.approx((first - p.nll) / (first - last))
    assert found.hint is None
    assert (run.folder / "curve.json").exists() is False


def test_shares_are_reached_on_lines_between_points():
    points = [P(0, 0, 5, None, None, 0.0), P(1, 100, 3, None, None, 0.8), P(2, 300, 2.5, None, None, 1.0)]
    assert _reached(points, (0.4, 0.9)) == {0.4: 50, 0.9: 200}


def test_two_evaluations_are_no_curve_and_say_so(tmp_path):
    run = run_of(tmp_path / "run")
    found = data_curve(run)
    assert [p.step for p in found.points] == [0, 4]
    assert "train.eval_steps" in found.hint
    assert found.reached == {}


def test_operations_are_those_of_the_plan(tmp_path):
    recipe = load_recipe("llama-70b-to-8b-nf4")
    found, planned = compute(recipe, 10**9), plan(recipe, 1, 80.0)
    assert found.teacher == pytest.approx(planned.teacher.forward * 1e9)
    assert found.student == pytest.approx(planned.student.training * 1e9)
    assert found.pretraining == planned.pretraining
    assert found.share == pytest.approx((found.teacher + found.student) / planned.pretraining)
    cached = compute(load_recipe("cached", smoke=True), 1000)
    assert cached.teacher == 0


def test_a_sharded_recipe_is_counted_too():
    assert compute(load_recipe("qwen-72b-to-7b-fsdp2"), 1000).teacher > 2 * 72e9 * 1000 * 0.95


def test_what_has_no_curve_is_told(tmp_path):
    run = run_of(tmp_path / "run")
    evidence = json.loads((run.folder / "results.json").read_text())
    (run.folder / "results.json").write_text(json.dumps(evidence | {"log_lines": {}}))
    (run.folder / "metrics.jsonl").write_text("")
    with pytest.raises(DistillError, match=r"has 0 evaluations.*train\.eval_strategy=steps"):
        data_curve(run)
    chain = run_of(tmp_path / "chain", name="progressive")
    with pytest.raises(DistillError, match=r"is a chain: give one of its stages, such as .*stage-1"):
        data_curve(chain)


def test_the_command_shows_the_curve(tmp_path):
    run = run_of(tmp_path / "run", "train.eval_strategy=steps", "train.eval_steps=1")
    result = CliRunner().invoke(app, ["curve", str(run.folder)], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "95% of the fall after" in result.output
    assert "of pretraining the student" in result.output
    assert (run.folder / "curve.json").is_file()
