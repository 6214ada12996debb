"""A search trains all candidates alike, judges them by metrics independent of T, and reports its true cost."""

import json
import math
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny import build
from transformers import TrainerCallback
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.analysis import temperature_search
from hf_distill.analysis.successive_halving import Candidate, Rung, cost, pareto_front, ranked, rungs
from hf_distill.analysis.temperature_search import compute_objective, find_temperature, hp_space
from hf_distill.cli import app
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.report import plots
from hf_distill.runner.cache_writer import write_recipe_cache
from hf_distill.trainer.config import DistillArguments

SMALL_GRID = {"temperatures": [1.0, 2.0], "alphas": [0.5, 1.0]}


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
def test_rungs_and_cost_follow_successive_halving(candidates, steps, eta, plan, runs):
    assert rungs(candidates, steps, eta) == plan
    assert cost(plan) == pytest.approx(runs * steps)


def test_up_to_eleven_candidates_cost_at_most_three_full_runs():
    for candidates in range(1, 12):
        for steps in range(16, 400):
            plan = rungs(candidates, steps)
            assert cost(plan) <= 3 * steps
            assert plan[-1] == (1, steps)


def test_too_few_steps_give_an_error():
    with pytest.raises(DistillError, match=r"15 steps are too few for 8 candidates.*train.max_steps to 16"):
        rungs(8, 15)


def candidate(name: str, *metrics: tuple[int, float, float | None]) -> Candidate:
    t, alpha = name.split("-")
    return Candidate(float(t), float(alpha), False, [Rung(*values, None) for values in metrics])


def test_a_diverged_candidate_ranks_last_and_ties_are_broken_by_the_other_metric():
    result = [
        candidate("1-0.5", (2, math.nan, 0.1)),
        candidate("2-0.5", (2, 3.0, 0.3)),
        candidate("4-0.5", (2, 3.0, 0.2)),
        candidate("8-0.5", (2, 9.0, 0.1), (4, 8.0, 0.9)),
    ]
    assert [c.temperature for c in ranked(result, "nll")] == [8, 4, 2, 1]
    assert [c.temperature for c in ranked(result, "kl")] == [8, 1, 4, 2]


def test_the_front_compares_candidates_at_the_step_where_they_stopped():
    result = [
        candidate("1-0.5", (2, 3.0, 0.5), (4, 2.0, 0.4)),
        candidate("2-0.5", (2, 4.0, 0.1)),  # lowest KL at step 2
        candidate("4-0.5", (2, 4.0, 0.6)),  # dominated by the first
        candidate("8-0.5", (2, 3.5, 0.1)),  # dominates the second
    ]
    assert [c.temperature for c in pareto_front(result)] == [1, 8]
    assert [c.temperature for c in pareto_front(result[:3])] == [1, 2]
    assert [
        c.temperature for c in pareto_front([candidate("1-1", (2, 3.0, None)), candidate("2-1", (2, 4.0, None))])
    ] == [1]


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "s"
    stages = []
    result = find_temperature(recipe(folder / "run"), **SMALL_GRID, folder=str(folder), on_stage=stages.append)
    return result, stages


def test_the_winner_equals_an_uninterrupted_run_with_the_same_values(search, tmp_path):
    """Stopping and resuming at each rung does not change the held-out metrics."""
    result, _ = search
    run = run_recipe(recipe(tmp_path / "run", "control=null", *result.overrides))
    last, after = result.candidates[0].rungs[-1], run.models["student"]
    assert last.step == 8
    assert last.kl == after["kl"]
    assert math.exp(last.nll) == pytest.approx(after["perplexity"], rel=1e-12)


def test_the_better_candidates_continue(search):
    result, _ = search
    steps = [[rung.step for rung in c.rungs] for c in result.candidates]
    assert sorted(steps, key=len) == [[2], [2], [2, 4], [2, 4, 8]]
    by_step = {step: sorted((c.rungs[i].nll, c.name) for c in result.candidates if len(c.rungs) > i)
          for i, step in enumerate((2, 4, 8))}  # fmt: skip
    assert {name for _, name in by_step[2][:2]} == {name for _, name in by_step[4]}
    assert by_step[4][0][1] == by_step[8][0][1] == result.candidates[0].name
    assert result.steps == 4 * 2 + 2 * 2 + 4
    assert result.runs == 2.0


def test_a_completed_search_keeps_the_file_and_no_checkpoints(search):
    result, _ = search
    folder = Path(result.folder)
    assert {f.name for f in folder.iterdir()} == {"temperature.json", "metrics.jsonl", ".lock"}
    written = json.loads((folder / "temperature.json").read_text())
    assert {key: written[key] for key in asdict(result)} == asdict(result)
    assert recipe("x", *written["overrides"]).distill.temperature == result.candidates[0].temperature


def test_kl_as_criterion_ranks_by_kl(search, tmp_path):
    result = find_temperature(recipe(tmp_path), **SMALL_GRID, by="kl", folder=str(tmp_path / "s"))
    first = sorted(result.candidates, key=lambda c: c.rungs[0].kl)
    assert {c.name for c in result.candidates[:2]} == {c.name for c in first[:2]}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", [2, 6])
def test_an_interrupted_search_continues_to_the_same_result(search, tmp_path, stage):
    uninterrupted, _ = search
    stages = []

    def on_stage(text):
        stages.append(text)
        if len([t for t in stages if t.startswith("T =")]) == stage:
            raise Killed

    options = {**SMALL_GRID, "folder": str(tmp_path / "s")}
    same = recipe(Path(uninterrupted.folder) / "run")
    with pytest.raises(Killed):
        find_temperature(same, **options, on_stage=on_stage)
    again = []
    result = find_temperature(same, **options, on_stage=again.append)
    assert result.candidates == uninterrupted.candidates
    assert len([t for t in again if t.startswith("T =")]) == 7 - (stage - 1)
    no_stages = []
    assert find_temperature(same, **options, on_stage=no_stages.append).candidates == uninterrupted.candidates
    assert no_stages == []


def test_a_crash_between_checkpoint_and_file_trains_no_step_twice(search, tmp_path, monkeypatch):
    """The checkpoint of step 4 exists, and the file contains only step 2."""
    uninterrupted, _ = search
    folder, write = tmp_path / "s", temperature_search.save_search

    def crash(folder, settings, candidates):
        if any(len(c.rungs) == 2 for c in candidates):
            raise Killed
        write(folder, settings, candidates)

    same = recipe(Path(uninterrupted.folder) / "run")
    monkeypatch.setattr(temperature_search, "save_search", crash)
    with pytest.raises(Killed):
        find_temperature(same, **SMALL_GRID, folder=str(folder))
    assert [*folder.glob("*/checkpoint-4")]
    monkeypatch.undo()
    assert find_temperature(same, **SMALL_GRID, folder=str(folder)).candidates == uninterrupted.candidates


def test_the_folder_of_another_search_gives_an_error(search, tmp_path):
    result, _ = search
    with pytest.raises(DistillError, match="contains another search: the grid differs"):
        find_temperature(recipe(Path(result.folder) / "run"), [1.0], [0.5], folder=result.folder)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DistillError, match=r"contains files but no temperature\.json"):
        find_temperature(recipe(tmp_path), **SMALL_GRID, folder=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "changes", "options", "message"),
    [
        ("quickstart", [], {"temperatures": [0.0]}, r"temperatures above 0.*got temperatures .0\.0."),
        ("quickstart", [], {"temperatures": [math.nan]}, "temperatures above 0"),
        ("quickstart", [], {"temperatures": []}, r"one or more temperatures.*got temperatures \[\]"),
        ("quickstart", [], {"alphas": [1.5]}, r"at most 1; got .* alphas \[1.5\]"),
        ("quickstart", [], {"alphas": [0.0]}, "would be the control"),
        ("quickstart", ["train.max_steps=15"], {}, "15 steps are too few for 8 candidates"),
        ("quickstart", [], {"alphas": [0.5, 0.5]}, "given twice"),
        ("quickstart", [], {"by": "loss"}, "by is 'loss'; possible values are nll and kl"),
        ("quickstart", ["train.max_steps=-1"], {}, "counts epochs: set train.max_steps"),
        ("mtp", [], {}, "a teacher of kind mtp changes with the student"),
        ("ema", [], {}, "a teacher of kind ema changes with the student"),
        ("on-policy", [], {}, "on-policy"),
        ("progressive", [], {}, "has stages: search for one of its stages"),
    ],
)
def test_a_recipe_that_cannot_be_searched_gives_an_error_before_anything_is_written(
    tmp_path, name, changes, options, message
):
    searched = load_recipe(name, [f"train.output_dir={tmp_path / 'run'}", *changes], smoke=True)
    with pytest.raises(DistillError, match=message):
        find_temperature(searched, **options)
    assert not any(tmp_path.iterdir())


def test_the_values_of_the_recipe_are_a_candidate(tmp_path):
    searched = recipe(tmp_path / "run", "distill.temperature=3", "distill.alpha=0.7")
    result = find_temperature(searched, [1.0], [0.5], folder=str(tmp_path / "s"))
    assert {(c.temperature, c.alpha, c.from_recipe) for c in result.candidates} == {(1.0, 0.5, False), (3.0, 0.7, True)}


LORA = "student={model: 'smoke:llama/teacher', lora: {r: 2, target_modules: [q_proj]}}"


def test_with_an_adapter_base_teacher_each_candidate_starts_from_the_base(tmp_path):
    overrides = ["teacher={kind: adapter_base}", LORA, "train.learning_rate=0.01", "control=null"]
    result = find_temperature(recipe(tmp_path / "run", *overrides), [1.0, 8.0], [0.9], folder=str(tmp_path / "s"))
    run = run_recipe(recipe(tmp_path / "run", *overrides, *result.overrides))
    assert result.candidates[0].rungs[-1].kl == pytest.approx(run.models["student"]["kl"], rel=1e-6)
    assert result.candidates[0].rungs[-1].kl > 0


def test_a_cache_without_full_distributions_can_only_be_judged_by_nll(tmp_path):
    texts = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"{i} times {i} is {i * i}, and no other number. " * 3}) for i in range(40)]
    texts.write_text("\n".join(lines))
    changes = [f"train.output_dir={tmp_path / 'run'}", f"teacher.path={tmp_path / 'c'}", f"data.task.path={texts}"]
    cached = load_recipe("cached", [*changes, "train.max_steps=4"], smoke=True)
    write_recipe_cache(cached, kind="top_k", k=8)
    options = {"temperatures": [2.0], "alphas": [0.9], "folder": str(tmp_path / "s")}
    with pytest.raises(DistillError, match="the KL cannot be computed: judge by nll"):
        find_temperature(cached, **options, by="kl")
    result = find_temperature(cached, **options)
    assert {c.rungs[-1].kl for c in result.candidates} == {None}
    assert result.pareto_front == [result.candidates[0].name]
    assert len(plots.search(result).axes[1].lines) == 0


def test_the_plot_shows_the_measured_values(search):
    result, _ = search
    nll, kl, over_t = plots.search(result).axes
    for axes, key in ((nll, "nll"), (kl, "kl")):
        shown = sorted([*map(float, line.get_ydata())] for line in axes.lines)
        assert shown == sorted([getattr(rung, key) for rung in c.rungs] for c in result.candidates)
    assert sorted(y for line in over_t.lines for y in line.get_ydata()) == sorted(
        c.rungs[0].nll for c in result.candidates
    )


def test_the_command_prints_a_run_with_the_best_values(tmp_path):
    arguments = ["quickstart", f"train.output_dir={tmp_path / 'run'}", "train.max_steps=4"]
    options = ["--smoke", "-t", "1", "-t", "2", "-a", "0.5"]
    result = CliRunner().invoke(app, ["temperature", *arguments, *options], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    command = result.output.split("Train with these values: hf-distill run ")[1].split()
    assert command[:3] == arguments
    assert command[-1] == "--smoke"
    best = load_recipe("quickstart", command[1:-1], smoke=True)
    again = CliRunner().invoke(app, ["temperature", *arguments, *options, "--json"])
    printed = json.loads(again.output)
    first = printed["candidates"][0]
    assert (best.distill.temperature, best.distill.alpha) == (first["temperature"], first["alpha"])
    assert (tmp_path / "run-temperature" / "temperature.png").stat().st_size > 10_000


def test_the_printed_command_can_be_pasted_into_a_shell(tmp_path):
    student = "student={model: 'smoke:llama/student'}"
    arguments = ["quickstart", f"train.output_dir={tmp_path / 'the run'}", "train.max_steps=4", student]
    result = CliRunner().invoke(app, ["temperature", *arguments, "--smoke", "-t", "1", "-t", "2", "-a", "0.5"])
    assert result.exit_code == 0, result.output
    command = result.output.partition("Train with these values: ")[2].partition("\n")[0]
    assert shlex.split(command)[: len(arguments) + 2] == ["hf-distill", "run", *arguments]


class ObjectiveRecorder(TrainerCallback):
    """Records the temperature and weight that each step was trained with."""

    def __init__(self):
        self.trainer, self.steps = None, []

    def on_step_begin(self, args, state, control, **kwargs):
        terms = {term.name: term for term in self.trainer.distiller.terms}
        self.steps.append((terms["soft"].options["temperature"], terms["soft"].weight, args.temperature, args.alpha))


def test_each_trial_of_optuna_trains_with_the_temperature_of_the_trial(make_trainer):
    recorder = ObjectiveRecorder()
    trainer = make_trainer(model_init=lambda: build("llama", 0), callbacks=[recorder], max_steps=2, eval_strategy="no")
    recorder.trainer = trainer
    best = trainer.hyperparameter_search(
        hp_space=hp_space, compute_objective=compute_objective, n_trials=3, direction="minimize", backend="optuna"
    )
    assert len({t for t, *_ in recorder.steps}) == 3
    for trained, weight, requested, alpha in recorder.steps:
        assert trained == requested
        assert weight == pytest.approx(alpha)
    assert set(best.hyperparameters) == {"temperature", "alpha"}


def test_values_that_are_set_on_the_arguments_after_a_search_are_used(make_trainer):
    """The documentation of transformers sets the best values on the trainer's arguments."""
    recorder = ObjectiveRecorder()
    trainer = make_trainer(callbacks=[recorder], max_steps=1)
    recorder.trainer = trainer
    trainer.args.temperature, trainer.args.alpha = 5.0, 0.25
    trainer.train()
    assert recorder.steps == [(5.0, 0.25, 5.0, 0.25)]


def test_an_objective_from_setup_distillation_is_not_overwritten_by_unchanged_arguments(make_trainer):
    recorder = ObjectiveRecorder()
    trainer = make_trainer(callbacks=[recorder], max_steps=1)
    recorder.trainer = trainer
    trainer.setup_distillation(trainer.teacher, DistillArguments(temperature=7.0, alpha=0.1))
    trainer.train()
    assert recorder.steps == [(7.0, 0.1, None, 0.5)]


def test_a_trial_that_needs_a_missing_teacher_gives_an_error(make_trainer):
    trainer = make_trainer(alpha=0.0)
    trainer.args.alpha = 0.5
    with pytest.raises(DistillError, match=r"\['alpha'\] changed, and there is no teacher"):
        trainer.train()


def test_the_loss_does_not_influence_the_search_objective():
    assert compute_objective({"eval_loss": 1.0, "eval_perplexity": math.e}) == pytest.approx(1.0)
    assert compute_objective({"eval_loss": 9.0, "eval_perplexity": math.e}) == pytest.approx(1.0)
