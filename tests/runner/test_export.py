"""Recipes with non-frozen teachers: what they export, and that they resume exactly."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_distill import DistillError
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.recipe.load import validate
from hf_distill.runner.teacher_only import with_teacher
from hf_distill.teachers.mtp.heads import load_heads

EXPORTED = {"online": "peer", "mutual": "peer", "ema": "ema", "snapshot": None, "multi-view": None, "mtp": None}


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", EXPORTED)
def test_a_recipe_with_a_non_frozen_teacher_exports_its_models_and_resumes_exactly(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name, ["train.output_dir=straight", "train.learning_rate=0.01"], smoke=True)
    models = run_recipe(recipe).models
    other = load_recipe(name, ["train.output_dir=stopped", "train.learning_rate=0.01"], smoke=True)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(other, callbacks=[StopAt()])
    again = run_recipe(other, resume=True).models
    for folder in ("student", *([EXPORTED[name]] if EXPORTED[name] else [])):
        first, second = (
            AutoModelForCausalLM.from_pretrained(tmp_path / run / folder) for run in ("straight", "stopped")
        )
        assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
        assert AutoTokenizer.from_pretrained(tmp_path / "straight" / folder).eos_token == "<|end|>"
    untimed = [
        {key: value for key, value in metrics["student"].items() if key != "train_seconds"}
        for metrics in (models, again)
    ]
    assert untimed[0] == untimed[1]
    assert ("kl" in models["control"]) is False
    assert models["control"]["perplexity"] > 1
    if EXPORTED[name]:
        assert models[EXPORTED[name]]["perplexity"] == models["student"]["teacher_perplexity"]
    logs = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    logs = [log for log in logs if log["run"] == "student" and "loss" in log]
    if name != "multi-view":
        assert logs[-1]["teacher_weight_drift"] > 0
    if name == "mtp":
        student = AutoModelForCausalLM.from_pretrained(tmp_path / "straight" / "student")
        assert len(load_heads(student, tmp_path / "straight" / "student")) == 2


SEVERAL = """
student: {from_teacher: {keep_layers: 3}}
teachers:
  - {name: whole, model: some/model, weight: 3}
  - {name: past, kind: ema, decay: 0.5}
losses: [{name: reverse_kl, weight: 0.1, teacher: past}]
data: {task: {path: "package:pydoc_data.topics"}, eval: {holdout: 0.1, max_rows: 4}}
train: {output_dir: runs/several, learning_rate: 0.01}
control: sft
export: ema
"""


def test_a_recipe_with_several_teachers_weights_their_losses_and_is_planned(tmp_path, monkeypatch):
    from hf_distill.planning import plan

    monkeypatch.chdir(tmp_path)
    (tmp_path / "several.yaml").write_text(SEVERAL)
    recipe = load_recipe("several.yaml", smoke=True)
    models = run_recipe(recipe).models
    logs = [json.loads(line) for line in (tmp_path / "runs/several-smoke/metrics.jsonl").read_text().splitlines()]
    log = next(log for log in logs if log["run"] == "student" and "loss" in log)
    soft = 0.75 * log["soft_whole_loss"] + 0.25 * log["soft_past_loss"]
    total = 0.5 * soft + 0.5 * log["hard_loss"] + 0.1 * log["reverse_kl_past_loss"]
    assert log["loss"] == pytest.approx(total, rel=1e-3)
    assert models["student"]["perplexity"] < models["before"]["perplexity"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "runs/several-smoke/ema").num_parameters() > 0
    assert "the averaged weights, 4 bytes per trained parameter" in plan(recipe, gpus=1, gpu_memory=80.0).advice


ROUTED = """
student: {from_teacher: {keep_layers: 3}}
teachers:
  - {name: whole, model: some/model, sources: [task]}
  - {name: past, kind: ema, decay: 0.5, sources: [general]}
data:
  task: {path: "package:pydoc_data.topics"}
  general: {path: "package:pydoc_data.topics"}
  web: {path: "package:pydoc_data.topics"}
  eval: {holdout: 0.1, max_rows: 4}
  packing: PACKING
train: {output_dir: runs/routed, learning_rate: 0.01, max_steps: 6}
control: sft
"""


def test_teachers_with_sources_are_evaluated_on_rows_of_these_sources(tmp_path):
    text = ROUTED.replace("PACKING", "false").replace("{holdout: 0.1, max_rows: 4}", '{path: "package:builtins"}')
    (tmp_path / "routed.yaml").write_text(text)
    with pytest.raises(DistillError, match=r"the rows of data.eval.path are of no source.*set data.eval.holdout"):
        load_recipe(str(tmp_path / "routed.yaml"))


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_recipe_with_a_teacher_for_each_source_trains_every_source_with_its_teacher(tmp_path, monkeypatch, packing):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "routed.yaml").write_text(ROUTED.replace("PACKING", packing))
    run_recipe(load_recipe("routed.yaml", smoke=True))
    logs = [json.loads(line) for line in (tmp_path / "runs/routed-smoke/metrics.jsonl").read_text().splitlines()]
    logs = [log for log in logs if log["run"] == "student" and "loss" in log]
    for source, teacher in (("task", "whole"), ("general", "past")):
        pairs = {(log.get(f"soft_loss_{source}"), log.get(f"soft_loss_teacher_{teacher}")) for log in logs}
        assert pairs - {(None, None)}
        assert all(one == pytest.approx(two) for one, two in pairs)
    assert not any(log.get("soft_loss_web") for log in logs)
    assert sum(log["tokens_without_teacher"] for log in logs) > 0


def test_one_of_several_teachers_with_sources_is_a_valid_teacher_alone(tmp_path):
    (tmp_path / "routed.yaml").write_text(ROUTED.replace("PACKING", "false"))
    recipe = load_recipe(str(tmp_path / "routed.yaml"), smoke=True)
    assert validate(with_teacher(recipe, recipe.all_teachers[0])).teacher.kind == "frozen"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("sources: [general]", "past has no sources and whole has"),
        ("sources: [task]}\n  - {name: x, model: a/b, sources: [task]", "the source 'task' has two teachers"),
        ("sources: [genral]", "did you mean 'general'"),
        ("view: {token_dropout: 0.1}, sources: [general]", "past has the kind multi_view, which teaches all rows"),
        ("weight: 2, sources: [general]", "past has a weight, which teachers with sources do not use"),
    ],
)
def test_wrong_sources_of_teachers_are_refused(change, why):
    import yaml

    text = ROUTED.replace("PACKING", "true")
    if "multi_view" in why:
        text = text.replace("kind: ema, decay: 0.5", "kind: multi_view")
    text = (
        text.replace(", sources: [general]", "") if "no sources" in why else text.replace("sources: [general]", change)
    )
    with pytest.raises(DistillError, match=why):
        validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"teachers": [{"name": "a", "model": "x/y", "kind": "mutual"}, {"name": "b", "model": "x/z"}]}, "symmetric"),
        (
            {"teachers": [{"name": "a", "model": "x/y", "kind": "online"}, {"name": "b", "kind": "mtp"}]},
            "only one teacher can be",
        ),
        ({"teachers": [{"name": "a", "model": "x/y"}, {"name": "a", "model": "x/z"}]}, "with different names"),
        ({"teachers": [{"name": "a", "model": "x/y"}]}, "give two or more teachers"),
        ({"teacher": {"model": "x/y"}}, "either teacher, or teachers"),
        ({"losses": [{"name": "js", "teacher": "pasta"}]}, "did you mean 'past'"),
        (
            {"teachers": [{"name": "a", "kind": "mtp", "weight": 2}, {"name": "b", "model": "x/z"}]},
            "weight has no effect",
        ),
    ],
)
def test_incompatible_teachers_are_refused_before_anything_is_loaded(change, why):
    with pytest.raises(DistillError, match=why):
        validate(yaml.safe_load(SEVERAL) | change)
