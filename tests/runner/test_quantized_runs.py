"""Recipes with a quantized student: what a run exports and compares, that it resumes exactly, and what is refused."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_distill import DistillError, QuantizationScheme, prepare_quantized_student
from hf_distill.analysis import open_run
from hf_distill.analysis.run_models import RunModels
from hf_distill.planning.planner import plan
from hf_distill.publishing.card_data import run_card_data
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.recipe.load import validate
from hf_distill.runner.model_factory import check_launch

INT4 = {"scheme": "int4_weight_only", "group_size": 32}


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def recipe(folder, *overrides):
    return load_recipe("quantized-student", [f"train.output_dir={folder}", *overrides], smoke=True)


def values(**changes):
    return {
        "student": {"model": "org/student", "quantize": INT4},
        "teacher": {"model": "org/teacher"},
        "data": {"task": {"path": "package:builtins"}, "eval": {"holdout": 0.1}},
        "train": {"output_dir": "run"},
    } | changes


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "run"
    return folder, run_recipe(recipe(folder, "train.learning_rate=0.01")).models


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("student={{model: {}}}", "student.model: .* is a quantized checkpoint"),
        ("student={{model: {}, lora: {{r: 4}}}}", "student.model: .* is a quantized checkpoint"),
        ("teacher={{model: {}}}", "LlamaForCausalLM is quantized, .* cannot be copied into a student"),
    ],
)
def test_a_quantized_student_is_not_trained_or_pruned_further(finished, tmp_path, override, problem):
    changes = [override.format(finished[0] / "student"), "control=null"]
    if override.startswith("teacher"):
        changes.append("student={from_teacher: {keep_layers: 1}}")
    with pytest.raises(DistillError, match=problem):
        run_recipe(recipe(tmp_path / "further", *changes))


def test_a_quantized_student_teaches_the_next_student(finished, tmp_path):
    changes = [f"teacher={{model: {finished[0] / 'student'}}}", f"student={{model: {finished[0] / 'full_precision'}}}"]
    models = run_recipe(recipe(tmp_path / "taught", *changes, "control=null")).models
    assert models["student"]["teacher_perplexity"] == pytest.approx(finished[1]["student"]["perplexity"], rel=1e-5)


def test_a_plan_refuses_groups_that_do_not_divide_the_widths():
    with pytest.raises(DistillError, match="groups of 24 weights, which do not divide the width"):
        plan(load_recipe("quantized-student", ["student.quantize.group_size=24"], smoke=True), 1, 80)


def test_a_run_exports_the_student_quantized_and_in_full_precision(finished):
    folder, _ = finished
    plain = AutoModelForCausalLM.from_pretrained(folder / "student-unquantized")
    served = AutoModelForCausalLM.from_pretrained(folder / "student")
    assert not hasattr(plain.config, "quantization_config")
    assert served.config.quantization_config.quant_method == "torchao"
    assert not torch.equal(logits_of(plain), logits_of(served))
    fake_quantized = prepare_quantized_student(plain, QuantizationScheme("int4_weight_only", group_size=16))
    assert torch.equal(logits_of(fake_quantized), logits_of(served))
    for name in ("student", "student-unquantized"):
        assert AutoTokenizer.from_pretrained(folder / name).eos_token == "<|end|>"


def test_full_precision_and_both_quantizations_are_evaluated(finished):
    folder, models = finished
    assert list(models) == ["before", "student", "full_precision", "quantized_after"]
    assert len({metrics["kl"] for metrics in models.values()}) == 4
    full_precision = AutoModelForCausalLM.from_pretrained(folder / "full_precision")
    assert not hasattr(full_precision.config, "quantization_config")
    facts = json.loads((folder / "results.json").read_text())
    assert facts["student"]["quantization"] == "int4_weight_only (4-bit weights, groups of 16)"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["run"] for line in lines} == {"student", "full_precision"}
    trained = [
        [line["loss"] for line in lines if line["run"] == run and "loss" in line]
        for run in ("student", "full_precision")
    ]
    assert len(trained[0]) == len(trained[1]) == 4
    assert trained[0] != trained[1]


def test_analyses_load_the_models_as_they_are_served(finished):
    folder, _ = finished
    models = RunModels.of_run(open_run(folder))
    student, before = models.load("student"), models.load("before")
    assert "IntxUnpackedToInt8Tensor" in str(type(student.model.layers[0].mlp.up_proj.weight))
    assert "FakeQuantizedLinear" in str(type(before.model.layers[0].mlp.up_proj))


def test_report_and_card_show_the_comparison(finished, run_cli):
    folder, models = finished
    page = run_cli("report", str(folder), "--samples", "1")
    assert page.returncode == 0, page.stderr
    text = (folder / "report.html").read_text()
    for title in ("student after training, quantized", "same student in full precision", "quantized after training"):
        assert title in text
    card = run_card_data(open_run(folder), "org/student", license="apache-2.0")
    assert card.student["quantization"].startswith("int4_weight_only")
    assert card.held_out["quantized_after"]["kl"] == models["quantized_after"]["kl"]
    from hf_distill.model_card import build_card

    content = build_card(card, []).content
    assert "| same student, quantized after training |" in content
    assert "loading it needs torchao" in content


def test_an_interrupted_run_resumes_exactly(finished, tmp_path):
    folder, models = finished
    other = recipe(tmp_path / "run", "train.learning_rate=0.01")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(other, callbacks=[StopAt()])
    again = run_recipe(other, resume=True).models
    timing = "train_seconds"
    assert [{k: v for k, v in m.items() if k != timing} for m in again.values()] == [
        {k: v for k, v in m.items() if k != timing} for m in models.values()
    ]
    first, second = (AutoModelForCausalLM.from_pretrained(at / "student") for at in (folder, tmp_path / "run"))
    assert torch.equal(logits_of(first), logits_of(second))


def test_the_last_student_of_a_chain_may_be_quantized(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chain = load_recipe("progressive", ["train.output_dir=run"], smoke=True)
    changed = chain.model_dump(exclude_none=True, exclude_unset=True)
    changed["stages"] = changed["stages"][-2:]
    changed["stages"][-1]["student"]["quantize"] = INT4
    changed.pop("student")
    models = run_recipe(validate(changed)).models
    assert {"stage-1", "student", "control"} == {*models}
    for name in ("student", "control"):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name).config.quantization_config
        assert (tmp_path / "run" / f"{name}-unquantized" / "model.safetensors").is_file()
    assert not hasattr(AutoModelForCausalLM.from_pretrained("run/stage-1/student").config, "quantization_config")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"model": "a/b", "quantize": INT4, "lora": {}}}, "lora adds its adapters to them unrounded"),
        ({"student": {"model": "a/b", "quantize": "float8"}}, "scheme"),
        ({"student": {"model": "a/b", "quantize": {**INT4, "weight_bits": 4}}}, "remove weight_bits"),
        ({"student": {"model": "a/b"}, "control": "full_precision"}, "add student.quantize"),
        ({"teacher": {"kind": "ema"}, "control": "full_precision"}, "kind ema changes"),
        ({"teacher": {"kind": "mtp"}}, "exported in full precision"),
        ({"teacher": {"kind": "ema"}, "export": "ema"}, "remove export"),
        ({"train": {"output_dir": "run", "fsdp": True}, "control": "full_precision"}, "which FSDP shards"),
        ({"on_policy": {"vllm": "colocate"}}, "remove on_policy.vllm"),
        ({"stages": [{"student": {"model": name, "quantize": INT4}} for name in ("a/b", "a/c")]}, "only the last"),
    ],
    ids=["lora", "scheme", "bits", "no quantize", "ema control", "mtp", "export ema", "fsdp", "vllm", "stages"],
)  # fmt: skip
def test_what_does_not_go_with_a_quantized_student_is_refused(changes, message):
    with pytest.raises(DistillError, match=message):
        validate(values(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"model": "a/b", "quantize": "nvfp4"}}, "needs a GPU of compute capability 10.0"),
        ({"train": {"output_dir": "run", "fsdp": True}}, "for a student that is quantized"),
    ],
    ids=["machine", "fsdp"],
)
def test_a_launch_that_cannot_train_a_quantized_student_is_refused(changes, message):
    with pytest.raises(DistillError, match=message):
        check_launch(validate(values(**changes)))


def test_a_scheme_alone_is_a_string():
    loaded = validate(values(student={"model": "a/b", "quantize": "int8_dynamic_activation"}))
    assert loaded.student.quantize.resolved == QuantizationScheme("int8_dynamic_activation", None, 8)


def test_a_group_size_that_does_not_divide_a_layer_leaves_nothing_behind(tmp_path):
    changed = recipe(tmp_path / "run").model_dump(exclude_none=True, exclude_unset=True)
    changed["student"]["quantize"]["group_size"] = 24
    with pytest.raises(DistillError, match=r"groups of 24 .*q_proj \(64\), .*Sizes that divide all of them: 8, 16"):
        run_recipe(validate(yaml.safe_load(yaml.safe_dump(changed))))
    assert not (tmp_path / "run").exists()
