"""A search trains every candidate alike, judges by what T cannot change, and costs what it says."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny import build
from transformers import TrainerCallback
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.analysis import temperature_search as temperature
from hf_distill.analysis.successive_halving import Candidate, Rung, cost, pareto_front, ranked, rungs
from hf_distill.analysis.temperature_search import compute_objective, find_temperature, hp_space
from hf_distill.cli import app
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.report import plots
from hf_distill.runner.cache_writer import write_recipe_cache
from hf_distill.trainer.config import DistillArguments

STEPS_PER_NAT = {"temperatures": [1.0, 2.0], "alphas": [0.5, 1.0]}


def recipe(folder, *overrides):
    return load_recipe("quickstart", [f"train.output_dir={folder}", "train.max_steps=8", *overrides], smoke=True)


@pytest.mark.parametrize(
    ("candidates", "steps", "eta", "plan", "runs"),
    [
        (8, 32, 2, [(8, 4), (4, 8), (2, 16), (1, 32)], 2.5),
        (9, 27, 3, [(9, 3), (3, 9), (1, 27)], 9 * 3 / 27 + 3 * 6 / 27 + 18 / 27),
        (5, 16, 2, [(5, 4), (2, 8), (1, 16)], (5 * 4 + 2 * 4 + 8) / 16),
        (7, 32, 2, [(7, 4), (4, 8), (2, 16), (1, 32)], (7 * 4 + 4 * 4 + 2 * 8 + 16) / 32),
        (9, 32, 2, [(9, 4), (4, 8), (2, 16), (1, 32)], (9 * 4 + 4 * 4 + 2 * 8 + 16) / 32),
        (2, 16, 8, [(2, 2), (1, 16)], (2 * 2 + 14) / 16),
        (1, 4, 2, [(1, 4)], 1.0),
    ],
)
def test_rungs_and_their_cost(candidates, steps, eta, plan, runs):
    assert rungs(candidates, steps, eta) == plan
    assert cost(plan) == pytest.approx(runs * steps)


def test_up_to_eleven_candidates_cost_at_most_three_runs_at_any_length():
    for candidates in range(1, 12):
        for steps in range(16, 400):
            plan = rungs(candidates, steps)
            assert cost(plan) <= 3 * steps
            assert plan[-1] == (1, steps)


def test_too_few_steps_are_told():
    with pytest.raises(DistillError, match=r"15 steps are too few for 8 candidates.*train.max_steps to 16"):
        rungs(8, 15)


def candidate(name: str, *measured: tuple[int, float, float | None]) -> Candidate:
    t, alpha = name.split("-")
    return Candidate(float(t), float(alpha), False, [Rung(*numbers, None) for numbers in measured])


def test_one_whose_training_diverged_loses_and_ties_fall_to_the_other_measure():
    found = [
        candidate("1-0.5", (2, math.nan, 0.1)),
        candidate("2-0.5", (2, 3.0, 0.3)),
        candidate("4-0.5", (2, 3.0, 0.2)),
        candidate("8-0.5", (2, 9.0, 0.1), (4, 8.0, 0.9)),
    ]
    assert [c.temperature for c in ranked(found, "nll")] == [8, 4, 2, 1]
    assert [c.temperature for c in ranked(found, "kl")] == [8, 1, 4, 2]


def test_the_front_compares_at_the_step_where_a_candidate_stopped():
    found = [
        candidate("1-0.5", (2, 3.0, 0.5), (4, 2.0, 0.4)),
        candidate("2-0.5", (2, 4.0, 0.1)),  # less KL at step 2 than any other there
        candidate("4-0.5", (2, 4.0, 0.6)),  # beaten in both by the first
        candidate("8-0.5", (2, 3.5, 0.1)),  # beats the second
    ]
    assert [c.temperature for c in pareto_front(found)] == [1, 8]
    assert [c.temperature for c in pareto_front(found[:3])] == [1, 2]
    assert [
        c.temperature for c in pareto_front([candidate("1-1", (2, 3.0, None)), candidate("2-1", (2, 4.0, None))])
    ] == [1]


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "s"
    stages = []
    found = find_temperature(recipe(folder / "run"), **STEPS_PER_NAT, folder=str(folder), on_stage=stages.append)
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
    folder = Path(found.folder)
    assert {f.name for f in folder.iterdir()} == {"temperature.json", "metrics.jsonl", ".lock"}
    record = json.loads((folder / "temperature.json").read_text())
    assert {key: record[key] for key in asdict(found)} == asdict(found)
    assert recipe("x", *record["overrides"]).distill.temperature == found.candidates[0].temperature


def test_kl_judges_otherwise(search, tmp_path):
    found = find_temperature(recipe(tmp_path), **STEPS_PER_NAT, by="kl", folder=str(tmp_path / "s"))
    first = sorted(found.candidates, key=lambda c: c.rungs[0].kl)
    assert {c.name for c in found.candidates[:2]} == {c.name for c in first[:2]}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", [2, 6])
def test_killed_it_goes_on_to_the_same_end(search, tmp_path, stage):
    straight, _ = search
    told = []

    def on_stage(text):
        told.append(text)
        if len([t for t in told if t.startswith("T =")]) == stage:
            raise Killed

    given = {**STEPS_PER_NAT, "folder": str(tmp_path / "s")}
    same = recipe(Path(straight.folder) / "run")
    with pytest.raises(Killed):
        find_temperature(same, **given, on_stage=on_stage)
    again = []
    found = find_temperature(same, **given, on_stage=again.append)
    assert found.candidates == straight.candidates
    assert len([t for t in again if t.startswith("T =")]) == 7 - (stage - 1)
    nothing = []
    assert find_temperature(same, **given, on_stage=nothing.append).candidates == straight.candidates
    assert nothing == []


def test_killed_between_a_checkpoint_and_the_record_it_trains_no_step_too_many(search, tmp_path, monkeypatch):
    """The checkpoint of step 4 is there, and the record knows of step 2."""
    straight, _ = search
    folder, write = tmp_path / "s", temperature.record

    def dies(place, asked, candidates):
        if any(len(c.rungs) == 2 for c in candidates):
            raise Killed
        write(place, asked, candidates)

    same = recipe(Path(straight.folder) / "run")
    monkeypatch.setattr(temperature, "save_search", dies)
    with pytest.raises(Killed):
        find_temperature(same, **STEPS_PER_NAT, folder=str(folder))
    assert [*folder.glob("*/checkpoint-4")]
    monkeypatch.undo()
    assert find_temperature(same, **STEPS_PER_NAT, folder=str(folder)).candidates == straight.candidates


def test_the_folder_of_another_search_is_refused(search, tmp_path):
    found, _ = search
    with pytest.raises(DistillError, match="holds another search: the grid differ"):
        find_temperature(recipe(Path(found.folder) / "run"), [1.0], [0.5], folder=found.folder)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DistillError, match=r"holds files and no temperature\.json"):
        find_temperature(recipe(tmp_path), **STEPS_PER_NAT, folder=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "changes", "options", "said"),
    [
        ("quickstart", [], {"temperatures": [0.0]}, r"temperatures above 0.*got temperatures .0\.0."),
        ("quickstart", [], {"temperatures": [math.nan]}, "temperatures above 0"),
        ("quickstart", [], {"temperatures": []}, r"one or more temperatures.*got temperatures \[\]"),
        ("quickstart", [], {"alphas": [1.5]}, r"at most 1; got .* alphas \[1.5\]"),
        ("quickstart", [], {"alphas": [0.0]}, "would be the control"),
        ("quickstart", ["train.max_steps=15"], {}, "15 steps are too few for 8 candidates"),
        ("quickstart", [], {"alphas": [0.5, 0.5]}, "given twice"),
        ("quickstart", [], {"by": "loss"}, "by is 'loss'; known: nll, kl"),
        ("quickstart", ["train.max_steps=-1"], {}, "counts epochs: set train.max_steps"),
        ("mtp", [], {}, "kind mtp has no soft labels that stay the same"),
        ("ema", [], {}, "kind ema has no soft labels that stay the same"),
        ("on-policy", [], {}, "on-policy"),
        ("progressive", [], {}, "a chain: search for one of its stages"),
    ],
)
def test_what_cannot_be_searched_is_told_before_anything_is_written(tmp_path, name, changes, options, said):
    given = load_recipe(name, [f"train.output_dir={tmp_path / 'run'}", *changes], smoke=True)
    with pytest.raises(DistillError, match=said):
        find_temperature(given, **options)
    assert not any(tmp_path.iterdir())


def test_the_recipes_own_values_are_a_candidate(tmp_path):
    given = recipe(tmp_path / "run", "distill.temperature=3", "distill.alpha=0.7")
    found = find_temperature(given, [1.0], [0.5], folder=str(tmp_path / "s"))
    assert {(c.temperature, c.alpha, c.own) for c in found.candidates} == {(1.0, 0.5, False), (3.0, 0.7, True)}


LORA = "student={model: 'smoke:llama/teacher', lora: {r: 2, target_modules: [q_proj]}}"


def test_of_an_own_base_each_candidate_starts_from_the_base(tmp_path):
    given = ["teacher={kind: adapter_base}", LORA, "train.learning_rate=0.01", "control=null"]
    found = find_temperature(recipe(tmp_path / "run", *given), [1.0, 8.0], [0.9], folder=str(tmp_path / "s"))
    result = run_recipe(recipe(tmp_path / "run", *given, *found.overrides))
    assert found.candidates[0].rungs[-1].kl == pytest.approx(result.models["student"]["kl"], rel=1e-6)
    assert found.candidates[0].rungs[-1].kl > 0


def test_a_cache_without_whole_distributions_is_judged_by_nll_alone(tmp_path):
    texts = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"{i} times {i} is {i * i}, and no other number. " * 3}) for i in range(40)]
    texts.write_text("\n".join(lines))
    changes = [f"train.output_dir={tmp_path / 'run'}", f"teacher.path={tmp_path / 'c'}", f"data.task.path={texts}"]
    given = load_recipe("cached", [*changes, "train.max_steps=4"], smoke=True)
    write_recipe_cache(given, kind="top_k", k=8)
    options = {"temperatures": [2.0], "alphas": [0.9], "folder": str(tmp_path / "s")}
    with pytest.raises(DistillError, match="no KL to judge by: judge by nll"):
        find_temperature(given, **options, by="kl")
    found = find_temperature(given, **options)
    assert {c.rungs[-1].kl for c in found.candidates} == {None}
    assert found.pareto_front == [found.candidates[0].name]
    assert len(plots.search(asdict(found)).axes[1].lines) == 0


def test_the_plot_shows_what_was_measured(search):
    found, _ = search
    nll, kl, over_t = plots.search(asdict(found)).axes
    for axes, key in ((nll, "nll"), (kl, "kl")):
        shown = sorted([*map(float, line.get_ydata())] for line in axes.lines)
        assert shown == sorted([getattr(rung, key) for rung in c.rungs] for c in found.candidates)
    assert sorted(y for line in over_t.lines for y in line.get_ydata()) == sorted(
        c.rungs[0].nll for c in found.candidates
    )


def test_the_command_says_what_to_take(tmp_path):
    given = ["quickstart", f"train.output_dir={tmp_path / 'run'}", "train.max_steps=4"]
    options = ["--smoke", "-t", "1", "-t", "2", "-a", "0.5"]
    result = CliRunner().invoke(app, ["temperature", *given, *options], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    command = result.output.split("Take it: hf-distill run ")[1].split()
    assert command[:3] == given
    assert command[-1] == "--smoke"
    taken = load_recipe("quickstart", command[1:-1], smoke=True)
    again = CliRunner().invoke(app, ["temperature", *given, *options, "--json"])
    record = json.loads(again.output)
    first = record["candidates"][0]
    assert (taken.distill.temperature, taken.distill.alpha) == (first["temperature"], first["alpha"])
    assert (tmp_path / "run-temperature" / "temperature.png").stat().st_size > 10_000


class PairBatch(TrainerCallback):
    """What the steps of each trial were taken with."""

    def __init__(self):
        self.trainer, self.found = None, []

    def on_step_begin(self, args, state, control, **kwargs):
        terms = {term.name: term for term in self.trainer.distiller.terms}
        self.found.append((terms["soft"].options["temperature"], terms["soft"].weight, args.temperature, args.alpha))


def test_a_trial_of_optuna_trains_with_its_own_temperature(make_trainer):
    seen = PairBatch()
    trainer = make_trainer(model_init=lambda: build("llama", 0), callbacks=[seen], max_steps=2, eval_strategy="no")
    seen.trainer = trainer
    best = trainer.hyperparameter_search(
        hp_space=hp_space, compute_objective=compute_objective, n_trials=3, direction="minimize", backend="optuna"
    )
    assert len({t for t, *_ in seen.found}) == 3
    for trained, weight, asked, alpha in seen.found:
        assert trained == asked
        assert weight == pytest.approx(alpha)
    assert set(best.hyperparameters) == {"temperature", "alpha"}


def test_the_best_values_set_by_hand_are_trained_with(make_trainer):
    """As the documentation of transformers sets them, after a search: on the trainer's arguments."""
    seen = PairBatch()
    trainer = make_trainer(callbacks=[seen], max_steps=1)
    seen.trainer = trainer
    trainer.args.temperature, trainer.args.alpha = 5.0, 0.25
    trainer.train()
    assert seen.found == [(5.0, 0.25, 5.0, 0.25)]


def test_an_objective_given_otherwise_stays_when_the_arguments_do_not_change(make_trainer):
    seen = PairBatch()
    trainer = make_trainer(callbacks=[seen], max_steps=1)
    seen.trainer = trainer
    trainer.setup_distillation(trainer.teacher, DistillArguments(temperature=7.0, alpha=0.1))
    trainer.train()
    assert seen.found == [(7.0, 0.1, 2.0, 0.5)]


def test_a_trial_that_asks_for_a_teacher_that_is_not_there_is_told(make_trainer):
    trainer = make_trainer(alpha=0.0)
    trainer.args.alpha = 0.5
    with pytest.raises(DistillError, match=r"\['alpha'\] changed, and there is no teacher"):
        trainer.train()


def test_an_objective_that_t_changes_decides_nothing():
    assert compute_objective({"eval_loss": 1.0, "eval_perplexity": math.e}) == pytest.approx(1.0)
    assert compute_objective({"eval_loss": 9.0, "eval_perplexity": math.e}) == pytest.approx(1.0)
