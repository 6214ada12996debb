"""Recipes whose teacher moves: what they leave, and that they resume."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_distill.mtp import load_heads
from hf_distill.recipe import load_recipe, run_recipe

LEFT = {"online": "peer", "mutual": "peer", "ema": "ema", "snapshot": None, "multi-view": None, "mtp": None}


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", LEFT)
def test_a_recipe_leaves_its_models_and_goes_on_where_it_was_stopped(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name, ["train.output_dir=straight", "train.learning_rate=0.01"], smoke=True)
    models = run_recipe(recipe).models
    other = load_recipe(name, ["train.output_dir=stopped", "train.learning_rate=0.01"], smoke=True)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(other, callbacks=[StopAt()])
    again = run_recipe(other, resume=True).models
    for folder in ("student", *([LEFT[name]] if LEFT[name] else [])):
        first, second = (
            AutoModelForCausalLM.from_pretrained(tmp_path / run / folder) for run in ("straight", "stopped")
        )
        assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
        assert AutoTokenizer.from_pretrained(tmp_path / "straight" / folder).eos_token == "<|end|>"
    untimed = [{k: v for k, v in m["student"].items() if k != "train_seconds"} for m in (models, again)]
    assert untimed[0] == untimed[1]
    assert ("kl" in models["control"]) is False
    assert models["control"]["perplexity"] > 1
    if LEFT[name]:
        assert models[LEFT[name]]["perplexity"] == models["student"]["teacher_perplexity"]
    logs = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    logs = [log for log in logs if log["run"] == "student" and "loss" in log]
    if name != "multi-view":
        assert logs[-1]["teacher_distance"] > 0
    if name == "mtp":
        student = AutoModelForCausalLM.from_pretrained(tmp_path / "straight" / "student")
        assert len(load_heads(student, tmp_path / "straight" / "student")) == 2
