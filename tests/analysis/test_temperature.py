"""A search trains every candidate alike, judges by what T cannot change, and costs what it says."""

import json
import math

import pytest
from tiny import build
from transformers import TrainerCallback
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.analysis.halving import cost, rungs
from hf_distill.analysis.temperature import compute_objective, find_temperature, hp_space
from hf_distill.cli import app
from hf_distill.recipe import load_recipe, run_recipe

GRID = {"temperatures": [1.0, 2.0], "alphas": [0.5, 1.0]}


def recipe(folder, *overrides):
    return load_recipe("quickstart", [f"train.output_dir={folder}", "train.max_steps=8", *overrides], smoke=True)


@pytest.mark.parametrize(
    ("candidates", "steps", "eta", "plan", "runs"),
    [
        (8, 32, 2, [(8, 4), (4, 8), (2, 16), (1, 32)], 2.5),
        (9, 27, 3, [(9, 3), (3, 9), (1, 27)], 9 * 3 / 27 + 3 * 6 / 27 + 18 / 27),
        (5, 16, 2, [(5, 2), (4, 4), (2, 8), (1, 16)], (5 * 2 + 4 * 2 + 2 * 4 + 8) / 16),
        (1, 4, 2, [(1, 4)], 1.0),
    ],
)
def test_rungs_and_their_cost(candidates, steps, eta, plan, runs):
    assert rungs(candidates, steps, eta) == plan
    assert cost(plan) == pytest.approx(runs * steps)


def test_eight_candidates_cost_at_most_three_runs_at_any_length():
    for steps in range(16, 400):
        assert cost(rungs(8, steps)) <= 3 * steps


def test_too_few_steps_are_told():
    with pytest.raises(DistillError, match=r"15 steps are too few for 8 candidates.*train.max_steps to 16"):
        rungs(8, 15)


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "s"
    stages = []
    found = find_temperature(recipe(folder / "run"), **GRID, folder=str(folder), on_stage=stages.append)
    return found, stages


def test_the_winner_trained_as_a_run_with_its_values_does(search, tmp_path):
    """Stopped at each rung and resumed, it is the straight run: the same held-out numbers to the digit."""
    found, _ = search
    result = run_recipe(recipe(tmp_path / "run", "control=null", *found.overrides))
    last, after = found.candidates[0].rungs[-1], result.models["student"]
    assert last.step == 8
    assert last.kl == after["kl"]
    assert math.exp(last.nll) == pytest.approx(after["perplexity"], rel=1e-12)


def test_the_better_ones_go_on(search):
    found, _ = search
    steps = [[rung.step for rung in c.rungs] for c in found.candidates]
    assert sorted(steps, key=len) == [[2], [2], [2, 4], [2, 4, 8]]
    at = {step: sorted((c.rungs[i].nll, c.name) for c in found.candidates if len(c.rungs) > i)
          for i, step in enumerate((2, 4, 8))}  # fmt: skip
    assert {name for _, name in at[2][:2]} == {name for _, name in at[4]}
    assert at[4][0][1] == at[8][0][1] == found.candidates[0].name
    assert found.steps == 4 * 2 + 2 * 2 + 4
    assert found.runs == 2.0


def test_checkpoints_go_and_the_record_stays(search):
    found, _ = search
    assert {f.name for f in found.folder.iterdir()} == {"temperature.json", "metrics.jsonl"}
    record = json.loads((found.folder / "temperature.json").read_text())
    assert record["overrides"] == found.overrides
    assert recipe("x", *record["overrides"]).distill.temperature == found.candidates[0].temperature


def test_kl_judges_otherwise(search, tmp_path):
    found = find_temperature(recipe(tmp_path), **GRID, by="kl", folder=str(tmp_path / "s"))
    first = sorted(found.candidates, key=lambda c: c.rungs[0].kl)
    assert {c.name for c in found.candidates[:2]} == {c.name for c in first[:2]}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", [2, 5, 6])
def test_killed_it_goes_on_to_the_same_end(search, tmp_path, stage):
    straight, _ = search
    told = []

    def on_stage(text):
        told.append(text)
        if len([t for t in told if t.startswith("T =")]) == stage:
            raise Killed

    given = {**GRID, "folder": str(tmp_path / "s")}
    same = recipe(straight.folder / "run")
    with pytest.raises(Killed):
        find_temperature(same, **given, on_stage=on_stage)
    again = []
    found = find_temperature(same, **given, on_stage=again.append)
    assert found.candidates == straight.candidates
    assert len([t for t in again if t.startswith("T =")]) == 7 - (stage - 1)
    nothing = []
    assert find_temperature(same, **given, on_stage=nothing.append).candidates == straight.candidates
    assert nothing == []


def test_the_folder_of_another_search_is_refused(search, tmp_path):
    found, _ = search
    with pytest.raises(DistillError, match="holds another search: the grid differ"):
        find_temperature(recipe(found.folder / "run"), [1.0], [0.5], folder=str(found.folder))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DistillError, match=r"holds files and no temperature\.json"):
        find_temperature(recipe(tmp_path), **GRID, folder=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "changes", "options", "said"),
    [
        ("quickstart", [], {"temperatures": [0.0]}, "temperatures are above 0"),
        ("quickstart", [], {"alphas": [1.5]}, "at most 1; got T = 1 with alpha = 1.5"),
        ("quickstart", [], {"alphas": [0.5, 0.5]}, "given twice"),
        ("quickstart", [], {"by": "loss"}, "by is 'loss'; known: nll, kl"),
        ("quickstart", ["train.max_steps=-1"], {}, "counts epochs: set train.max_steps"),
        ("mtp", [], {}, "one teacher that does not move"),
        ("on-policy", [], {}, "rows that are there"),
        ("progressive", [], {}, "rows that are there"),
    ],
)
def test_what_cannot_be_searched_is_told_before_anything_is_written(tmp_path, name, changes, options, said):
    given = load_recipe(name, [f"train.output_dir={tmp_path / 'run'}", *changes], smoke=True)
    with pytest.raises(DistillError, match=said):
        find_temperature(given, **options)
    assert not any(tmp_path.iterdir())


def test_the_command_says_what_to_take(tmp_path):
    given = ["temperature", "quickstart", f"train.output_dir={tmp_path / 'run'}", "train.max_steps=4", "--smoke"]
    result = CliRunner().invoke(app, [*given, "-t", "1", "-t", "2", "-a", "0.5"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "Take it: hf-distill run quickstart distill.temperature=" in result.output
    assert (tmp_path / "run-temperature" / "temperature.png").stat().st_size > 10_000


class Seen(TrainerCallback):
    """What the steps of each trial were taken with."""

    def __init__(self):
        self.trainer, self.found = None, []

    def on_step_begin(self, args, state, control, **kwargs):
        terms = {term.name: term for term in self.trainer.distiller.terms}
        self.found.append((terms["soft"].options["temperature"], terms["soft"].weight, args.temperature, args.alpha))


def test_a_trial_of_optuna_trains_with_its_own_temperature(make_trainer):
    seen = Seen()
    trainer = make_trainer(model_init=lambda: build("llama", 0), callbacks=[seen], max_steps=2, eval_strategy="no")
    seen.trainer = trainer
    best = trainer.hyperparameter_search(
        hp_space=hp_space, compute_objective=compute_objective, n_trials=3, direction="minimize", backend="optuna"
    )
    assert len({t for t, *_ in seen.found}) == 3
    for temperature, weight, asked, alpha in seen.found:
        assert temperature == asked
        assert weight == pytest.approx(alpha)
    assert set(best.hyperparameters) == {"temperature", "alpha"}


def test_an_objective_that_t_changes_decides_nothing():
    assert compute_objective({"eval_loss": 1.0, "eval_perplexity": math.e}) == pytest.approx(1.0)
    assert compute_objective({"eval_loss": 9.0, "eval_perplexity": math.e}) == pytest.approx(1.0)
