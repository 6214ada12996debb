"""Sources with `generate: true`: a run generates their completions first, and trains on them."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_distill.analysis import open_run
from hf_distill.core.row_values import ORIGINS
from hf_distill.core.targets import IGNORE_INDEX
from hf_distill.data import load_examples
from hf_distill.errors import DistillError
from hf_distill.generation.backends import local
from hf_distill.model_card import build_card
from hf_distill.publishing.card_data import run_card_data
from hf_distill.recipe import run_recipe
from hf_distill.recipe.generation import Generation
from hf_distill.recipe.load import load_recipe, recipes_by_stage, validate
from hf_distill.runner import generation_phase, progressive, single_run
from hf_distill.runner.datasets import prepare_data
from hf_distill.runner.generate import generate_data
from hf_distill.runner.generation_phase import generate_sources
from hf_distill.runner.run_results import Run
from hf_distill.runner.tasks import task_of
from hf_distill.runner.teacher_only import load_teacher_and_data, static_teacher_spec, with_teacher

ROWS = [{"prompt": f"text {i}", "completion": f" reference {i}"} for i in range(10)]


@pytest.fixture
def recipe_of(tmp_path):
    """`recipe_of("train.max_steps=2", rows=ROWS)`: a recipe whose source is generated, with overrides."""

    def make(*changes, rows=ROWS, name="data", **sections):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "student": {"model": "smoke:llama/student"},
            "teacher": {"model": "smoke:llama/teacher"},
            "data": {"task": {"path": str(file), "generate": True}, "eval": {"holdout": 0.2}, "max_length": 64},
            "generate": {"max_new_tokens": 6, "prompts_per_part": 2, "batching": "padded", "samples": 2},
            "train": {
                **{"output_dir": str(tmp_path / "run"), "max_steps": 2, "save_steps": 1, "use_cpu": True},
                "per_device_train_batch_size": 2,
            },
            **sections,
        }
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(values))
        return load_recipe(str(recipe), list(changes))

    return make


def completions_of(rows, tokenizer) -> list[str]:
    ids = ([i for i in row["labels"] if i != IGNORE_INDEX] for row in rows)
    return [tokenizer.decode(each, skip_special_tokens=True) for each in ids]


def weights(folder) -> dict:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def reference_split() -> tuple[list[int], list[int]]:
    """Numbers of the training and of the held-out rows."""
    parts = Dataset.from_dict({"row": [*range(len(ROWS))]}).train_test_split(test_size=0.2, seed=42)
    return sorted(parts["train"]["row"]), sorted(parts["test"]["row"])


def test_the_student_trains_on_the_teacher_s_completions_and_the_control_on_those_of_the_data(recipe_of, tmp_path):
    recipe = recipe_of("generate.max_prompts=6", control="sft_on_data")
    (data,) = generate_sources(recipe)
    assert data.folder == tmp_path / "run" / "generated" / "task"
    training, held_out = reference_split()
    generated = [*load_examples(str(data.folder))]
    assert [(row["row"], row["sample"]) for row in generated] == [(i, j) for i in training[:6] for j in range(2)]
    assert [row["prompt"] for row in generated[::2]] == [f"text {i}" for i in training[:6]]
    tokenizer = task_of(recipe).load_processor()
    prepared = prepare_data(recipe, tokenizer, 42, 1)
    assert completions_of(prepared.train, tokenizer) == [row["completion"] for row in generated]
    assert sorted(completions_of(prepared.held_out, tokenizer)) == [f" reference {i}" for i in held_out]
    control = prepare_data(recipe, tokenizer, 42, 1, of_data=True)
    assert completions_of(control.train, tokenizer) == [f" reference {i}" for i in training[:6]]
    assert control.held_out["input_ids"] == prepared.held_out["input_ids"]


def test_the_data_is_logged_once_for_each_training(recipe_of, caplog):
    recipe = recipe_of("generate.max_prompts=6", control="sft_on_data")
    generate_sources(recipe)
    caplog.clear()
    tokenizer = task_of(recipe).load_processor()
    for of_data in (False, True):
        prepare_data(recipe, tokenizer, 42, 1, of_data=of_data)
    lines = [line.split(":")[0] for line in caplog.messages if "are target tokens" in line]
    assert lines == ["data.task", "data.task, completions of the data"]


def test_on_policy_prompts_are_those_of_the_generated_rows(recipe_of):
    recipe = recipe_of(
        "train.use_cpu=true", on_policy={"fraction": 0.5, "max_completion_length": 4}, distill={"alpha": 1.0}
    )
    generate_sources(recipe)
    from hf_distill.runner.on_policy import prepare_prompts

    rows = prepare_prompts(recipe, task_of(recipe).load_processor(), 42, 1)
    assert sorted({row["prompt"] for row in rows}) == sorted(f"text {i}" for i in reference_split()[0])


class StopAt(TrainerCallback):
    def __init__(self, run_folder: Path):
        self.run_folder = run_folder

    def on_step_end(self, args, state, control, **kwargs):
        if Path(args.output_dir) == self.run_folder and state.global_step == 2:
            raise KeyboardInterrupt


def test_a_run_that_is_killed_in_each_phase_resumes_to_the_same_models(recipe_of, tmp_path, monkeypatch):
    changes = ("train.max_steps=3", "generate.filters=[{name: length, max_tokens: 6}]")
    whole = run_recipe(recipe_of(*changes, f"train.output_dir={tmp_path / 'whole'}", control="sft_on_data"))
    recipe, parts = recipe_of(*changes, control="sft_on_data"), []
    complete = local.TransformersBackend.complete

    def counted(self, missing, on_tokens):
        for part, completions in complete(self, missing, on_tokens):
            if len(parts) == 2:
                parts.append(None)
                raise KeyboardInterrupt
            parts.append(part.number)
            yield part, completions

    monkeypatch.setattr(local.TransformersBackend, "complete", counted)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe)
    assert not (tmp_path / "run" / "generated" / "task" / "data").exists()
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, resume=True, callbacks=[StopAt(tmp_path / "run")])
    assert parts == [0, 1, None, 2, 3]
    evaluation = json.loads((tmp_path / "whole" / "generated_data.json").read_text())["task"]
    assert [each["filter"] for each in evaluation["filters"]] == ["length"]
    assert evaluation["measures"]["generated"]["rows"] == 16
    monkeypatch.setattr(generation_phase, "generate_data", None)  # the complete data set is not opened again
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, resume=True, callbacks=[StopAt(tmp_path / "run" / "control")])
    resumed = run_recipe(recipe, resume=True)
    for metrics in (whole.models, resumed.models):
        for values in metrics.values():
            values.pop("train_seconds", None)
    assert resumed.models == whole.models
    for name in ("student", "control"):
        expected, actual = weights(tmp_path / "whole" / name), weights(tmp_path / "run" / name)
        assert all(torch.equal(expected[key], actual[key]) for key in expected)
    assert not torch.equal(*(weights(tmp_path / "run" / name)["lm_head.weight"] for name in ("student", "control")))
    with pytest.raises(DistillError, match=r"generate.temperature: 1.0 -> 0.5"):
        run_recipe(recipe_of(*changes, "generate.temperature=0.5", control="sft_on_data"), resume=True)


def test_runs_share_a_data_set_and_one_of_another_recipe_is_refused(recipe_of, tmp_path, caplog):
    shared = f"generate.output_dir={tmp_path / 'shared'}"
    assert len(generate_sources(recipe_of(shared))) == 1
    assert (
        generate_sources(recipe_of(shared, "train.output_dir=other", "distill.alpha=0", "generate.batch_size=3")) == []
    )
    with pytest.raises(DistillError, match=r"another recipe or data: generate.temperature is 0.5 here and 1.0 there"):
        generate_sources(recipe_of(shared, "generate.temperature=0.5"))
    with pytest.raises(DistillError, match=r"another recipe or data: digest"):
        generate_sources(recipe_of(shared, rows=[*ROWS[1:], ROWS[0]]))
    assert "was replaced" not in caplog.text
    (data,) = generate_sources(recipe_of(shared, "generate.filters=[{name: length, max_tokens: 6}]"))
    assert "shared/task held a data set that was written from these completions" in caplog.text
    assert [count.label for count in data.counts] == ["length"]
    assert generate_sources(recipe_of(shared, "generate.filters=[{name: length, max_tokens: 6}]")) == []


def test_a_changed_function_filters_the_completions_of_a_run_again(recipe_of, tmp_path, monkeypatch):
    file = tmp_path / "judge_of_runs.py"
    file.write_text("def judge(row):\n    return True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = recipe_of("generate.filters=[{name: function, function: 'judge_of_runs:judge'}]")
    (data,) = generate_sources(recipe)
    assert (data.rows, generate_sources(recipe)) == (16, [])
    file.write_text("def judge(row):\n    return row['sample'] == 0\n")
    monkeypatch.delitem(sys.modules, "judge_of_runs")
    (data,) = generate_sources(recipe)
    assert data.rows == 8


def test_other_weights_in_the_folder_of_the_teacher_are_noticed(recipe_of, tmp_path):
    model = AutoModelForCausalLM.from_config(_config_of_smoke_teacher())
    folder = tmp_path / "teacher"
    _save(model, folder)
    recipe = recipe_of(f"teacher.model={folder}")
    assert len(generate_sources(recipe)) == 1
    assert generate_sources(recipe) == []
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(folder)
    with pytest.raises(DistillError, match=r"another recipe or data: weights is"):
        generate_sources(recipe)


def _config_of_smoke_teacher():
    from hf_distill.runner.model_loading import resolve_model

    return AutoModelForCausalLM.from_pretrained(resolve_model("smoke:llama/teacher")).config


def _save(model, folder):
    from hf_distill.recipe.smoke import byte_tokenizer

    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def test_all_stages_of_a_chain_train_on_the_completions_of_the_first_teacher(recipe_of, tmp_path, monkeypatch):
    stages = [{"student": {"from_teacher": {"keep_layers": 3}}}, {"student": {"from_teacher": {"keep_layers": 2}}}]
    recipe = recipe_of(stages=stages, student=stages[-1]["student"], control="direct")
    folder = str(tmp_path / "run" / "generated" / "task")
    assert {part.generated_folder("task") for part in recipes_by_stage(recipe).values()} == {folder}
    rows = []

    def run_stage(part, *args):
        rows.append([*load_examples(part.generated_folder("task"))])
        if len(rows) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(progressive, "run_single", run_stage)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe)
    assert len(rows[0]) == 16
    assert rows == [rows[0]] * 3


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ([], [{"text": "x"}] * 10, r"data.task has the columns \['text'\], and no prompts"),
        ([], [{"prompt": "x"}] * 10, r"data.task, row \d .* without a completion, and data.eval.holdout evaluates on"),
        (["generate.max_new_tokens=509"], ROWS, "do not fit into the context"),
        (["generate.filters=[{name: length, min_tokens: 100}]"], ROWS, "The filters leave none of 16 rows: length"),
    ],
)
def test_prompts_that_cannot_be_used_are_an_error_before_the_training(changes, rows, message, recipe_of, tmp_path):
    with pytest.raises(DistillError, match=message):
        run_recipe(recipe_of(*changes, rows=rows))
    left = {path.name for path in (tmp_path / "run").rglob("*")}
    kept = left & {".completions"}  # other filters need no new generation
    assert kept or not (tmp_path / "run").exists()
    assert not left & {"recipe.yaml", "data", "student"}


def test_completions_that_are_missing_are_named_where_they_are_needed(recipe_of, tmp_path, monkeypatch):
    recipe = recipe_of()
    with pytest.raises(DistillError, match=r"data.task has generate: true, and its completions are not in .*generated"):
        task_of(recipe).preview(42, 1)
    monkeypatch.setattr(generation_phase, "env_world_size", lambda: 2)
    with pytest.raises(DistillError, match=r"prompts of data.task yet.*run `hf-distill generate RECIPE`"):
        generate_sources(recipe)
    monkeypatch.undo()
    generate_sources(recipe)
    (tmp_path / "run" / "generated" / "task" / "data").rename(tmp_path / "gone")
    with pytest.raises(DistillError, match="unfinished data set"):
        task_of(recipe).preview(42, 1)


@pytest.mark.parametrize(
    ("sections", "changes", "message"),
    [
        (
            {},
            ["data.task.streaming=true", "data.eval={path: package:builtins}"],
            "data.task.generate: a generation from a stream cannot be resumed",
        ),
        ({}, ["data.task.origin=data"], "data.task.origin is data, and the teacher writes the completions"),
        (
            {},
            ["distill.by_origin={student: {alpha: 1.0}}"],
            "by_origin.student: no tokens have this origin; .* teacher",
        ),
        ({}, ["data.task.column=prompt"], "data.task.generate: held-out rows have the completions of the data"),
        ({}, ["teacher.kind=ema", "teacher.model=null"], "data.task.generate: with generate.backend transformers"),
        ({"control": "sft_on_data"}, ["data.task.generate=false"], "control: sft_on_data is for recipes in which"),
        ({"control": "sft_on_data"}, ["train.max_steps=-1"], "control: sft_on_data .* set train.max_steps"),
        ({}, ["generate.cache=top_k"], "generate.cache: a run that generates the completions of data.task trains"),
        ({}, ["data.task.generate=false", "generate.output_dir=x"], "generate.output_dir is the folder of sources"),
        ({"task": "text-classification"}, [], "data.task.generate has no meaning for the task text-classification"),
    ],
)
def test_contradictions_are_reported(sections, changes, message, recipe_of):
    with pytest.raises(DistillError, match=message):
        recipe_of(*changes, **sections)


def test_the_teacher_is_the_author_of_generated_rows(recipe_of, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    by_origin = ("distill.by_origin={teacher: {alpha: 0.9}}",)
    with pytest.raises(DistillError, match=r"data.chats has no origin, and other sources do"):
        recipe_of(*by_origin, f"data.chats={{path: {other}}}")
    recipe = recipe_of(*by_origin, f"data.chats={{path: {other}, origin: data}}")
    generate_sources(recipe)
    rows = prepare_data(recipe, task_of(recipe).load_processor(), 42, 1).train
    assert {(row["source"], row["origin"]) for row in rows} == {(0, 0), (1, 2)}
    plain = recipe_of(f"data.chats={{path: {other}}}")
    for recipe in (plain, recipe_of()):
        assert "origin" not in prepare_data(recipe, task_of(recipe).load_processor(), 42, 1).train.column_names


def test_the_settings_of_an_unused_section_do_not_bind_a_run(recipe_of):
    plain = recipe_of("data.task.generate=false")
    other = recipe_of("data.task.generate=false", "generate.temperature=0.5")
    assert single_run.result_values(plain) == single_run.result_values(other)
    assert single_run.result_values(recipe_of()) == single_run.result_values(recipe_of("generate.batch_size=3"))
    assert single_run.result_values(recipe_of()) != single_run.result_values(recipe_of("generate.temperature=0.5"))


def test_the_commands_generate_and_run_do_the_same_in_a_smoke_run(run_cli, recipe_of, tmp_path):
    recipe_of("train.max_steps=1", control="sft_on_data")
    file, folder = str(tmp_path / "data.yaml"), tmp_path / "run-smoke"
    result = run_cli("generate", file, "--smoke")
    assert result.returncode == 0, result.stderr
    assert "16 rows of 16 completions" in result.stdout
    assert f"Train on the data: hf-distill run {file} --smoke\n" in result.stdout
    result = run_cli("run", file, "--smoke")
    assert result.returncode == 0, result.stderr
    assert "Generating" not in result.stdout
    assert (folder / "results.json").is_file()
    assert (folder / "control" / "config.json").is_file()
    folder.rename(tmp_path / "moved")
    run = open_run(tmp_path / "moved")
    assert run.recipe.generated_folder("task") == str(tmp_path / "moved" / "generated" / "task")
    assert len(prepare_data(run.recipe, task_of(run.recipe).load_processor(), 42, 1).train) == 16
    card = run_card_data(run, "org/student", "apache-2.0", lookup=lambda model, revision: None)
    facts = {"model": "smoke:llama/teacher", "completions": 16, "kept": 16}
    assert card.data["sources"]["task"]["generated"] == facts
    assert "package:builtins`, with 16 completions by `smoke:llama/teacher`." in build_card(card).content
    shared = run.recipe.model_copy(update={"generate": Generation(output_dir="/home/me/secret", url=None)})
    assert (
        "output_dir"
        not in run_card_data(Run(run.folder, shared), "org/s", "mit", lookup=lambda *_: None).recipe["generate"]
    )
    recipe_of(name="plain")
    result = run_cli("generate", str(tmp_path / "plain.yaml"), "data.task.generate=false")
    assert result.returncode == 2
    assert "pass -o FOLDER" in result.stderr


def test_generate_with_a_folder_completes_the_prompts_of_all_sources(recipe_of, tmp_path):
    assert generate_data(recipe_of("data.task.generate=false"), str(tmp_path / "out")).rows == 20


def test_a_teacher_alone_reads_the_generated_data_of_its_recipe(recipe_of, tmp_path):
    """Analyses and caches read the data of a run whose recipe names another folder or a server for the generation."""
    recipe = recipe_of(f"generate.output_dir={tmp_path / 'shared'}", "generate.max_prompts=2")
    generate_sources(recipe)
    _, data, _, _ = load_teacher_and_data(recipe, static_teacher_spec(recipe), lambda text: None)
    assert len(data.train) == 4
    server = {"backend": "server", "url": "http://127.0.0.1:9", "model": "x"}
    remote = {"kind": "remote", "url": "http://127.0.0.1:9", "model": "x", "top_k": 4}
    recipe = recipe_of("distill.temperature=1", generate=server, teacher=remote)
    values = with_teacher(recipe, recipe.all_teachers[0])
    assert validate(values).data.generated == ["task"]
    assert "127.0.0.1" not in str(values["generate"])


def test_rows_with_the_completions_of_the_data_are_of_the_data_s_origin(recipe_of):
    recipe = recipe_of("distill.by_origin={teacher: {alpha: 0.9}}", control="sft_on_data")
    generate_sources(recipe)
    processor = task_of(recipe).load_processor()
    student = prepare_data(recipe, processor, 42, 1)
    assert {row["origin"] for row in student.train} == {ORIGINS.index("teacher")}
    assert {row["origin"] for row in student.held_out} == {ORIGINS.index("data")}
    control = prepare_data(recipe, processor, 42, 1, of_data=True)
    assert {row["origin"] for row in control.train} == {ORIGINS.index("data")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.task.loss_weight=scor"], r"data.task: loss_weight names the column 'scor'.*score"),
        (["data.task.loss_weight=score"], r"data.task, row 0 .*, column score: -2.0 cannot be the factor of a loss"),
        (["data.task.loss_weight=vote_share"], "loss_weight names the column 'vote_share', which the source does not"),
        (["data.task.loss_weight=logprob"], "the values of logprob are negative.* temperature: 1.0"),
        (["data.task.loss_weight={column: logprob, temperature: 1.0}", "generate.log_probs=false"], "column 'logprob'"),
    ],
)
def test_weights_that_cannot_be_used_are_an_error_before_the_generation(changes, message, recipe_of, tmp_path):
    rows = [{**row, "score": i - 2} for i, row in enumerate(ROWS)]
    with pytest.raises(DistillError, match=message):
        generate_sources(recipe_of(*changes, "data.eval={path: package:builtins}", rows=rows))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        ["data.task.loss_weight={column: score, temperature: 1.0}"],
        ["data.task.loss_weight=vote_share", "generate.select={name: majority_vote, compare: exact}"],
        ["data.task.loss_weight=tokens"],
    ],
)
def test_weights_by_columns_of_the_source_of_a_selection_and_of_the_generation_are_possible(changes, recipe_of):
    rows = [{**row, "score": i - 2} for i, row in enumerate(ROWS)]
    recipe = recipe_of(*changes, "data.eval={path: package:builtins}", "generate.max_prompts=2", rows=rows)
    generate_sources(recipe)
    weights_of_rows = prepare_data(recipe, task_of(recipe).load_processor(), 42, 1).train["weight"]
    assert all(weight > 0 for weight in weights_of_rows)
