"""Run folders: runs remove no files, only one run writes at a time, and checkpoints are bound to their recipe."""

import json
import shutil
from functools import partial

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_distill import DistillError
from hf_distill.core.locks import LOCK_FILE, lock_folder
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.runner import checkpoint_recipe as binding
from hf_distill.runner.cache_writer import write_recipe_cache
from hf_distill.runner.checkpoint_recipe import recorded_values, result_values
from hf_distill.runner.model_loading import resolve_model
from hf_distill.trainer.checkpoints import mark_complete


def recipe(folder, *overrides, smoke=True):
    return load_recipe("quickstart", [f"train.output_dir={folder}", "control=null", *overrides], smoke=smoke)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A run that was interrupted after its checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(folder), callbacks=[Stop()])
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_recipe(recipe(folder))
    return folder


@pytest.fixture
def copy(cut, tmp_path):
    return shutil.copytree(cut, tmp_path / "run")


@pytest.mark.parametrize("smoke", [True, False])
def test_a_run_never_removes_files_of_another_run(finished, smoke):
    before = contents(finished)
    with pytest.raises(DistillError, match=r"holds a run already \(.*--resume"):
        run_recipe(recipe(finished, smoke=smoke))
    assert contents(finished) == before


@pytest.mark.parametrize("name", ["recipe.yaml", "student/notes.md", "checkpoint-7/notes.md", "results.json"])
def test_a_project_folder_is_refused_and_not_emptied(tmp_path, monkeypatch, name):
    """Even if no recipe.yaml marks it as a run folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(DistillError, match="holds a run already"):
        run_recipe(recipe("."))
    assert contents(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_run_is_not_written_into_the_folder_of_a_model(tmp_path, name):
    (tmp_path / name).write_text("{}")
    for resume in (False, True):
        with pytest.raises(DistillError, match=rf"is the folder of a model \(it has a {name}\)"):
            run_recipe(recipe(tmp_path), resume=resume)
    assert contents(tmp_path) == {name: b"{}"}


def test_a_refused_run_leaves_no_files_and_keeps_the_files_of_the_user(tmp_path):
    refused = {"data.task.path": "missing.jsonl", "student": "{from_teacher: {keep_layers: 9}}"}
    for key, value in refused.items():
        with pytest.raises(DistillError):
            run_recipe(recipe(tmp_path / "runs" / "x", f"{key}={value}"))
        assert not any(tmp_path.iterdir()), key
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(DistillError):
        run_recipe(recipe(tmp_path, "data.task.path=missing.jsonl"))
    assert contents(tmp_path) == {"notes.md": b"mine"}


def test_a_refused_chain_leaves_no_files(tmp_path):
    chain = load_recipe(
        "progressive", [f"train.output_dir={tmp_path / 'c'}", "data.task.path=missing.jsonl"], smoke=True
    )
    with pytest.raises(DistillError):
        run_recipe(chain)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_another_process_writes_to_is_refused(copy):
    with lock_folder(copy, "a run"), pytest.raises(DistillError, match=r"Another process writes to .*: a run, process"):
        run_recipe(recipe(copy), resume=True)
    assert not (copy / "student").exists()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.optim=sgd", r"train.optim: \(not set\) -> \"sgd\""),
        ("train.seed=7", "train.seed: 0 -> 7"),
        ("train.max_steps=3", "train.max_steps: 4 -> 3(.|\n)*To train longer, start a new run from its student"),
        ("train.learning_rate=0.5", "train.learning_rate: .* -> 0.5"),
        ("train.dataloader_drop_last=true", "train.dataloader_drop_last"),
        ("data.max_length=32", "data.max_length: 64 -> 32"),
        ("distill.temperature=9", "distill.temperature: .* -> 9"),
        ("student.from_teacher.keep_layers=2", "student.from_teacher.keep_layers: 3 -> 2"),
    ],
)
@pytest.mark.parametrize("bound_by", ["recipe.yaml", "checkpoint"])
def test_values_that_change_the_result_are_listed_and_refused(copy, override, line, bound_by):
    if bound_by == "checkpoint":  # its recipe.yaml was lost or not copied
        (copy / "recipe.yaml").unlink()
    before = contents(copy)
    with pytest.raises(DistillError, match=line):
        run_recipe(recipe(copy, override), resume=True)
    assert contents(copy) == before


def test_another_number_of_processes_is_refused_even_with_the_same_global_batch(copy, monkeypatch):
    monkeypatch.setattr(binding, "launch_values", lambda: {"number of processes": 2})
    before = contents(copy)
    with pytest.raises(DistillError, match=r"number of processes: 1 -> 2(.|\n)*Start as many processes as before"):
        run_recipe(recipe(copy), resume=True)
    assert contents(copy) == before


def test_values_that_do_not_change_the_result_may_change_on_resume(copy, finished):
    written = (copy / "recipe.yaml").read_bytes()
    changes = [
        "train.logging_steps=2",
        "train.save_steps=1",
        "train.save_total_limit=2",
        "train.dataloader_num_workers=1",
    ]
    changes += ["train.report_to=none", "train.per_device_eval_batch_size=1", "train.self_check=false"]
    result = run_recipe(recipe(copy, *changes), resume=True)
    assert (copy / "recipe.yaml").read_bytes() == written
    assert (copy / "student" / "model.safetensors").read_bytes() == (
        finished / "student" / "model.safetensors"
    ).read_bytes()
    assert result.models["student"]


def test_a_run_without_its_recipe_file_resumes_with_the_same_recipe(copy):
    (copy / "recipe.yaml").unlink()
    assert run_recipe(recipe(copy), resume=True).models["student"]
    assert yaml.safe_load((copy / "recipe.yaml").read_text())["train"]["max_steps"] == 4


def test_a_complete_run_is_never_rewritten_and_another_recipe_is_refused(finished):
    before = contents(finished)
    run_recipe(recipe(finished, "train.logging_steps=3"), resume=True)
    with pytest.raises(DistillError, match=r"train\.seed"):
        run_recipe(recipe(finished, "train.seed=7"), resume=True)
    after = contents(finished)
    assert {key: value for key, value in after.items() if key != LOCK_FILE} == {
        key: value for key, value in before.items() if key != LOCK_FILE
    }


@pytest.mark.parametrize("text", ["", "[1]", "{", "train: 5", "\x00"])
def test_a_damaged_recipe_file_is_reported_with_a_remedy(copy, text):
    (copy / "recipe.yaml").write_text(text)
    with pytest.raises(DistillError, match=r"recipe.yaml is damaged(.|\n)*remove it and resume"):
        run_recipe(recipe(copy), resume=True)


def test_a_checkpoint_of_a_script_and_a_folder_without_any_record_are_refused(copy):
    state = copy / "checkpoint-2" / "trainer_state.json"
    values = json.loads(state.read_text())
    recorded = recorded_values(copy / "checkpoint-2")
    content = {key: recorded.pop(key) for key in list(recorded) if key.startswith("content of ")}
    assert recorded == result_values(recipe(copy)) | {"number of processes": 1}
    assert {key.removeprefix("content of ") for key in content} == {
        "training rows",
        "held-out rows",
        "weights of the teacher",
    }
    del values["stateful_callbacks"]["RecipeRecord"]
    state.write_text(json.dumps(values))
    mark_complete(copy / "checkpoint-2")
    with pytest.raises(DistillError, match="checkpoint-2 was not written by a run of a recipe"):
        run_recipe(recipe(copy), resume=True)
    (copy / "recipe.yaml").unlink()
    shutil.rmtree(copy / "checkpoint-2")
    with pytest.raises(DistillError, match=r"no recipe\.yaml, and none of its checkpoints records"):
        run_recipe(recipe(copy), resume=True)


def test_more_values_are_bound_if_the_best_checkpoint_is_exported_or_a_source_is_streamed():
    plain = result_values(recipe("x"))
    assert not {"train.save_steps", "train.output_dir", "train.dataloader_num_workers"} & plain.keys()
    best = recipe("x", "train.load_best_model_at_end=true", "train.dataloader_num_workers=2")
    assert "train.save_steps" in result_values(best)
    best.data.task.streaming = True
    assert result_values(best)["train.dataloader_num_workers"] == 2


def test_every_ignored_key_is_a_key_of_train():
    from hf_distill.recipe.losses import packaged_schema
    from hf_distill.runner import checkpoint_recipe as binding

    free = binding._LOGGING | binding._SAVING | binding._READING | binding._EVALUATION_MEMORY
    known = packaged_schema()["properties"]["train"]["properties"].keys()
    assert known | {"self_check"} >= free


def save_model(reference, folder, factor=1):
    """Save a smoke model with a tokenizer, whose weights of one layer are multiplied by a factor."""
    model = AutoModelForCausalLM.from_pretrained(resolve_model(reference))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(factor)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model(reference)).save_pretrained(folder)


def test_a_model_that_changed_below_adapters_is_refused_on_resume(tmp_path):
    """A checkpoint of adapters does not hold the weights that they were trained on."""
    student = tmp_path / "student"
    save_model("smoke:llama/student", student)
    one = partial(
        recipe, tmp_path / "run", "student={lora: {r: 2}}", f"student.model={student}", "student.from_teacher=null"
    )
    with pytest.raises(KeyboardInterrupt):
        run_recipe(one(), callbacks=[Stop()])
    save_model("smoke:llama/student", student, 5)
    with pytest.raises(DistillError, match=r"because the weights of the student below its adapters changed"):
        run_recipe(one(), resume=True)
    save_model("smoke:llama/student", student)
    run_recipe(one(), resume=True)


def test_a_cache_that_was_written_again_by_another_teacher_is_refused_on_resume(tmp_path):
    teacher, cache = tmp_path / "teacher", tmp_path / "cache"
    one = partial(
        recipe,
        tmp_path / "run",
        f"teacher={{kind: cached, path: {cache}, source: {{model: {teacher}}}}}",
        "student={model: smoke:llama/student}",
        "data.task.path=package:builtins",
    )
    save_model("smoke:llama/teacher", teacher)
    write_recipe_cache(one(), batch_size=64)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(one(), callbacks=[Stop()])
    shutil.move(cache, tmp_path / "first")
    save_model("smoke:llama/teacher", teacher, 5)
    write_recipe_cache(one(), batch_size=64)
    with pytest.raises(DistillError, match=r"because the cache of the teacher changed"):
        run_recipe(one(), resume=True)
    shutil.rmtree(cache)
    shutil.move(tmp_path / "first", cache)
    run_recipe(one(), resume=True)


def test_rows_and_teachers_that_changed_under_the_same_name_are_refused_on_resume(tmp_path):
    """Losses before and after such a change are not comparable, and the run would be neither of the two."""
    rows, teacher = tmp_path / "rows.jsonl", tmp_path / "teacher"
    texts = [f"{i} and {i + 1} are {2 * i + 1}. " * 12 for i in range(80)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    smoke = recipe(tmp_path / "x").teacher.model
    model = AutoModelForCausalLM.from_pretrained(resolve_model(smoke))
    model.save_pretrained(teacher)
    AutoTokenizer.from_pretrained(resolve_model(smoke)).save_pretrained(teacher)
    folder = tmp_path / "run"
    one = partial(recipe, folder, f"data.task.path={rows}", "data.task.column=text", f"teacher.model={teacher}")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(one(), callbacks=[Stop()])
    before = contents(folder)

    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["Other text. " * 20, *texts[1:]]))
    with pytest.raises(DistillError, match=r"checkpoint-2 cannot be resumed, because the .*rows.* changed"):
        run_recipe(one(), resume=True)
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    model.save_pretrained(teacher)
    with pytest.raises(DistillError, match=r"because the weights of the teacher changed.*another train\.output_dir"):
        run_recipe(one(), resume=True)
    assert {name: data for name, data in contents(folder).items() if name != LOCK_FILE} == {
        name: data for name, data in before.items() if name != LOCK_FILE
    }
