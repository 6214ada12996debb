"""A chain is its stages run one after another, each student the next one's teacher."""

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
            alive[text.partition(":")[0]] = sum(isinstance(o, LlamaForCausalLM) for o in gc.get_objects())

    before = sum(isinstance(o, LlamaForCausalLM) for o in gc.get_objects())
    result = run_recipe(recipe(folder), on_stage=on_stage)
    return folder, result, alive, before


def test_each_student_is_the_next_one_s_teacher(straight):
    folder, result, _, _ = straight
    for number, blocks in ((1, 3), (2, 2), (3, 1)):
        part = yaml.safe_load((folder / f"stage-{number}" / "recipe.yaml").read_text())
        assert evidence(folder / f"stage-{number}")["student"]["blocks"] == blocks
        if number > 1:
            assert part["teacher"]["model"] == str(folder / f"stage-{number - 1}" / "student")
    assert set(result.models) == {"stage-1", "stage-2", "student", "control"}
    for name, stage in (("student", "stage-3"), ("control", "direct")):
        there, here = weights(folder / stage / "student"), weights(folder / name)
        assert all(torch.equal(there[key], here[key]) for key in there)


def test_stages_see_other_rows_and_the_same_held_out_ones(tmp_path, monkeypatch):
    """Else a chain of short stages has seen a third of the text that its control has seen."""
    seen: dict[str, list] = {}
    step = DistillTrainer.training_step

    def recording(self, model, inputs, *more):
        rows = [tuple(row.tolist()) for row in inputs["input_ids"]]
        seen.setdefault(self.args.output_dir.rpartition("/")[2], []).extend(rows)
        return step(self, model, inputs, *more)

    monkeypatch.setattr(DistillTrainer, "training_step", recording)
    run_recipe(recipe(tmp_path / "run"))
    stages = [{*seen[f"stage-{number}"]} for number in (1, 2, 3)]
    assert len(set.union(*stages)) == sum(map(len, stages)) == 3 * 8
    held_out = {evidence(tmp_path / "run" / f"stage-{number}")["data"]["eval_fingerprint"] for number in (1, 2, 3)}
    assert len(held_out) == 1


def test_a_stage_s_models_are_gone_before_the_next_begins(straight):
    _, _, alive, before = straight
    places = {"stage-1", "stage-2", "stage-3", "direct", "Comparing all students with the first teacher"}
    assert alive.keys() == places
    assert max(alive.values()) <= before  # models of other tests may go, too


def test_all_students_are_judged_by_the_first_teacher(straight):
    folder, result, _, _ = straight
    kl = count = 0.0
    for seen in ModelPair.of_run(open_run(folder)).batches(None):
        p, q = (source.project().double().log_softmax(-1) for source in (seen.teacher, seen.student))
        kl, count = kl + (p.exp() * (p - q)).sum().item(), count + len(p)
    assert result.models["student"]["kl"] == pytest.approx(kl / count, rel=1e-4)
    perplexities = {m["teacher_perplexity"] for m in result.models.values()}
    assert max(perplexities) == pytest.approx(min(perplexities), rel=1e-6)
    own = evidence(folder)["chain"][2]["after"]["teacher_perplexity"]
    assert own == pytest.approx(result.models["stage-2"]["perplexity"], rel=1e-5)


def test_direct_distillation_takes_as_many_steps_as_the_chain(straight):
    folder, _, _, _ = straight
    part = yaml.safe_load((folder / "direct" / "recipe.yaml").read_text())
    assert part["train"]["max_steps"] == 12
    assert part["student"] == {**part["student"], "from_teacher": {"keep_layers": 1, "by": "block_influence"}}
    assert [p["steps"] for p in evidence(folder)["chain"]] == [4, 4, 4, 12]


def test_blocks_are_counted_by_the_first_teacher(straight):
    folder, _, _, _ = straight
    left = [*range(4)]
    for number in (1, 2, 3):
        left = [left[i] for i in evidence(folder / f"stage-{number}")["student"]["layers_kept"]]
    assert evidence(folder)["student"]["layers_kept"] == left


def test_killed_in_a_stage_it_goes_on_there_to_the_same_students(straight, tmp_path):
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
        there, here = weights(folder / name), weights(tmp_path / "run" / name)
        assert all(torch.equal(there[key], here[key]) for key in there)
        assert resumed.models[name]["kl"] == result.models[name]["kl"]
    again = run_recipe(recipe(tmp_path / "run"), resume=True)
    assert again.models == resumed.models


def test_a_chain_is_reported_and_diagnosed_as_a_run_is(straight):
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


def test_the_70b_chain_runs_small(tmp_path):
    small = load_recipe(
        "qwen-72b-chain", [f"train.output_dir={tmp_path}", "train.fsdp=null", "teacher.fsdp=false"], smoke=True
    )
    result = run_recipe(small)
    assert set(result.models) == {"stage-1", "stage-2", "student"}


def test_stages_are_planned_as_far_as_they_are_known():
    parts = recipes_by_stage(load_recipe("qwen-72b-chain"))
    names = [part.base.removeprefix("Qwen/Qwen2.5-") for part in parts.values()]
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
    ("changes", "said"),
    [
        ({"stages": CUT[:1]}, "two or more"),
        ({"student": {"model": "org/y"}}, "a chain's student is that of its last stage"),
        ({"control": "sft"}, "of a chain it is direct"),
        ({"stages": None, "student": {"model": "org/y"}, "control": "direct"}, "there are no stages"),
        ({"teacher": {"kind": "ema"}}, "the first stage has one teacher"),
        ({"losses": [{"name": "hidden_cosine"}]}, "run each stage from a recipe of its own"),
        (third(student={"model": "org/y", "lora": {}}), "adapters are no teacher"),
        (third(train={"seed": 3}), "seed is the whole chain's"),
        (third(train={"max_step": 3}), "did you mean 'max_steps'"),
        (third(distill={"alpha": 3}), "distill.alpha"),
        ({"control": "direct"} | third(train={"per_device_train_batch_size": 1}), "all steps have as many tokens"),
        ({"control": "direct"} | third(student={"from_teacher": {"layers": [0]}}), "give keep_layers"),
    ],
)
def test_what_makes_no_chain_is_told(changes, said):
    values = {k: v for k, v in (VALUES | changes).items() if v is not None}
    with pytest.raises(DistillError, match=said):
        validate(values)


def test_steps_of_stages_are_added_up():
    stages = [{**CUT[0], "train": {"max_steps": 10}}, CUT[1]]
    values = VALUES | {"stages": stages, "student": stages[-1]["student"], "control": "direct"}
    assert direct_values(values)["train"] == {"output_dir": "runs/x/direct", "max_steps": 13}
