"""Progressive distillation: stages run one after another, and each student is the next teacher."""

import errno
import gc
import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

from hf_distill import DistillError, DistillTrainer
from hf_distill.analysis import ModelPair, open_run
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.recipe.load import recipes_by_stage, validate
from hf_distill.recipe.stages import direct_values
from hf_distill.runner.progressive import _copy_with_hard_links


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def recipe(folder, *overrides):
    return load_recipe("progressive", [f"train.output_dir={folder}", *overrides], smoke=True)


def evidence(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain") / "run"
    alive = {}

    def on_stage(text):
        if text.startswith(("stage-", "direct", "Comparing")):
            alive[text.partition(":")[0]] = sum(isinstance(value, LlamaForCausalLM) for value in gc.get_objects())

    before = sum(isinstance(value, LlamaForCausalLM) for value in gc.get_objects())
    result = run_recipe(recipe(folder), on_stage=on_stage)
    return folder, result, alive, before


def test_each_student_is_the_teacher_of_the_next_stage(straight):
    folder, result, _, _ = straight
    for number, layers in ((1, 3), (2, 2), (3, 1)):
        part = yaml.safe_load((folder / f"stage-{number}" / "recipe.yaml").read_text())
        assert evidence(folder / f"stage-{number}")["student"]["layers"] == layers
        if number > 1:
            assert part["teacher"]["model"] == str(folder / f"stage-{number - 1}" / "student")
    assert set(result.models) == {"stage-1", "stage-2", "student", "control"}
    for name, stage in (("student", "stage-3"), ("control", "direct")):
        expected, actual = weights(folder / stage / "student"), weights(folder / name)
        assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_stages_train_on_different_rows_and_share_held_out_rows(tmp_path, monkeypatch):
    """Otherwise a chain of short stages sees only a third of the text that its control sees."""
    rows_by_stage: dict[str, list] = {}
    step = DistillTrainer.training_step

    def recording(self, model, inputs, *more):
        rows = [tuple(row.tolist()) for row in inputs["input_ids"]]
        rows_by_stage.setdefault(self.args.output_dir.rpartition("/")[2], []).extend(rows)
        return step(self, model, inputs, *more)

    monkeypatch.setattr(DistillTrainer, "training_step", recording)
    run_recipe(recipe(tmp_path / "run"))
    stages = [{*rows_by_stage[f"stage-{number}"]} for number in (1, 2, 3)]
    assert len(set.union(*stages)) == sum(map(len, stages)) == 3 * 8
    held_out = {evidence(tmp_path / "run" / f"stage-{number}")["data"]["eval_fingerprint"] for number in (1, 2, 3)}
    assert len(held_out) == 1


def test_the_models_of_a_stage_are_freed_before_the_next_stage(straight):
    _, _, alive, before = straight
    stages = {"stage-1", "stage-2", "stage-3", "direct", "Comparing all students with the first teacher"}
    assert alive.keys() == stages
    assert max(alive.values()) <= before  # models of other tests may go, too


def test_all_students_are_evaluated_against_the_first_teacher(straight):
    folder, result, _, _ = straight
    kl = count = 0.0
    for batch in ModelPair.of_run(open_run(folder)).batches(None):
        p, q = (source.project().double().log_softmax(-1) for source in (batch.teacher, batch.student))
        kl, count = kl + (p.exp() * (p - q)).sum().item(), count + len(p)
    assert result.models["student"]["kl"] == pytest.approx(kl / count, rel=1e-4)
    perplexities = {metrics["teacher_perplexity"] for metrics in result.models.values()}
    assert max(perplexities) == pytest.approx(min(perplexities), rel=1e-6)
    teacher_perplexity = evidence(folder)["chain"][2]["after"]["teacher_perplexity"]
    assert teacher_perplexity == pytest.approx(result.models["stage-2"]["perplexity"], rel=1e-5)


def test_direct_distillation_takes_as_many_steps_as_the_chain(straight):
    folder, _, _, _ = straight
    part = yaml.safe_load((folder / "direct" / "recipe.yaml").read_text())
    assert part["train"]["max_steps"] == 12
    assert part["student"]["from_teacher"]["keep_layers"] == 1
    assert [p["steps"] for p in evidence(folder)["chain"]] == [4, 4, 4, 12]


def test_kept_layers_are_indices_of_the_first_teacher(straight):
    folder, _, _, _ = straight
    left = [*range(4)]
    for number in (1, 2, 3):
        left = [left[i] for i in evidence(folder / f"stage-{number}")["student"]["layers_kept"]]
    assert evidence(folder)["student"]["layers_kept"] == left


def test_a_chain_resumes_within_a_stage_to_the_same_students(straight, tmp_path):
    folder, result, _, _ = straight
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path / "run"), callbacks=[StopAt(3)])
    assert not (tmp_path / "run" / "stage-1" / "student").exists()

    class StopInSecond(StopAt):
        def on_step_end(self, args, state, control, **kwargs):
            if "stage-2" in args.output_dir:
                super().on_step_end(args, state, control)

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path / "run"), resume=True, callbacks=[StopInSecond(3)])
    first = (tmp_path / "run" / "stage-1" / "student" / "model.safetensors").stat().st_mtime_ns
    resumed = run_recipe(recipe(tmp_path / "run"), resume=True)
    assert (tmp_path / "run" / "stage-1" / "student" / "model.safetensors").stat().st_mtime_ns == first
    for name in ("student", "control"):
        expected, actual = weights(folder / name), weights(tmp_path / "run" / name)
        assert all(torch.equal(expected[key], actual[key]) for key in expected)
        assert resumed.models[name]["kl"] == result.models[name]["kl"]
    again = run_recipe(recipe(tmp_path / "run"), resume=True)
    assert again.models == resumed.models


def test_a_chain_can_be_reported_and_diagnosed(straight):
    from hf_distill.analysis import diagnose
    from hf_distill.report import report

    folder, result, _, _ = straight
    run = open_run(folder)
    text = report(run).path.read_text()
    for name in ("stage-1", "stage-2", "student", "control"):
        assert f"{result.models[name]['kl']:.4f}" in text
    assert diagnose(ModelPair.of_run(run), None, run.logs()).agreement.kl == pytest.approx(
        result.models["student"]["kl"], rel=1e-4
    )


def test_the_72b_chain_runs_with_tiny_models(tmp_path):
    small = load_recipe(
        "qwen-72b-chain", [f"train.output_dir={tmp_path}", "train.fsdp=null", "teacher.fsdp=false"], smoke=True
    )
    result = run_recipe(small)
    assert set(result.models) == {"stage-1", "stage-2", "student"}


def test_recipes_by_stage_use_the_largest_known_teacher():
    parts = recipes_by_stage(load_recipe("qwen-72b-chain"))
    names = [part.tokenizer_model.removeprefix("Qwen/Qwen2.5-") for part in parts.values()]
    assert names == ["72B-Instruct", "32B-Instruct", "14B-Instruct"]
    assert [part.train.learning_rate for part in parts.values()] == [5e-6, 1e-5, 2e-5]
    assert {part.teacher.fsdp for part in parts.values()} == {True}


CUT = [{"student": {"from_teacher": {"keep_layers": 2}}}, {"student": {"from_teacher": {"keep_layers": 1}}}]
VALUES = {
    "stages": CUT,
    "teacher": {"model": "org/x"},
    "data": {"task": {"path": "org/data"}, "eval": {"holdout": 0.1}},
    "train": {"output_dir": "runs/x", "max_steps": 3},
}


def third(**stage):
    return {"stages": [*CUT, {"student": {"model": "org/y"}, **stage}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": CUT[:1]}, "give two or more stages"),
        ({"student": {"model": "org/y"}}, "the student of the last stage is used"),
        ({"control": "sft"}, "cannot be combined with stages; use direct"),
        (
            {"stages": None, "student": {"model": "org/y"}, "control": "direct"},
            "direct is for recipes with stages, and this recipe has none",
        ),
        ({"teacher": {"kind": "ema"}}, "exactly one teacher, of kind frozen or cached, for the first stage"),
        ({"losses": [{"name": "hidden_cosine"}]}, "run each stage as a separate recipe"),
        (third(student={"model": "org/y", "lora": {}}), "a student with adapters cannot be the teacher"),
        (third(train={"seed": 3}), "seed applies to the whole chain"),
        (third(train={"max_step": 3}), "did you mean 'max_steps'"),
        (third(distill={"alpha": 3}), "distill.alpha"),
        (
            {"control": "direct"} | third(train={"per_device_train_batch_size": 1}),
            "all stages need the same batch size",
        ),
        ({"control": "direct"} | third(student={"from_teacher": {"layers": [0]}}), "use keep_layers"),
    ],
)
def test_invalid_stages_are_reported(changes, message):
    values = {k: value for k, value in (VALUES | changes).items() if value is not None}
    with pytest.raises(DistillError, match=message):
        validate(values)


def test_the_direct_control_has_the_total_steps_of_all_stages():
    stages = [{**CUT[0], "train": {"max_steps": 10}}, CUT[1]]
    values = VALUES | {"stages": stages, "student": stages[-1]["student"], "control": "direct"}
    assert direct_values(validate(values))["train"] == {"output_dir": "runs/x/direct", "max_steps": 13}


def test_a_chain_ends_on_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")
    _copy_with_hard_links(tmp_path / "student", tmp_path / "copy")
    assert (tmp_path / "copy" / "config.json").read_text() == "{}"
