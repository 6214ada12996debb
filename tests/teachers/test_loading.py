"""Ways to hold a teacher that one process can go; those over several are in tests/distributed."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from tiny import build, collate, rows
from transformers import LlamaForCausalLM

from hf_distill import DistillError, FrozenTeacher
from hf_distill.core.deepspeed_config import fill_teacher_config, read_deepspeed
from hf_distill.core.signals import FeatureKey
from hf_distill.core.targets import Targets
from hf_distill.recipe import load_recipe
from hf_distill.recipe.smoke import byte_tokenizer
from hf_distill.runner.model_factory import ModelFactory
from hf_distill.runner.tasks import task_of


@pytest.fixture
def saved(tmp_path):
    """The folder of a tiny teacher with an untied head."""
    build("llama", 1, layers=3, width=64, vocab=101).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def prepared(model, **options):
    teacher = FrozenTeacher(model, **options)
    teacher.prepare(build("llama", 0), torch.device("cpu"))
    return teacher


def check_signals_equal_the_model_outputs(teacher: FrozenTeacher) -> None:
    """Logits and a hidden state, against a plain forward of the same model."""
    inputs = collate(rows("llama", 4))
    targets = Targets.from_batch(inputs, shift=True)
    tap = FeatureKey("hidden", 1)
    signals = teacher(inputs, targets, {tap: targets})
    with torch.no_grad():
        plain = {k: v for k, v in inputs.items() if k != "labels"}
        outputs = teacher.model(**plain, use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(signals.logits.project(), targets.gather(outputs.logits).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(signals.features[tap], targets.gather(outputs.hidden_states[2]))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_teacher_has_quantized_blocks_and_an_unquantized_head(make_trainer, saved, quantization):
    trainer = make_trainer(teacher=saved, teacher_init_kwargs={"quantization": quantization, "dtype": "float32"})
    model = trainer.teacher.model
    linear = model.model.layers[0].mlp.up_proj
    assert linear.weight.dtype == (torch.uint8 if quantization == "nf4" else torch.int8)
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight.dtype == torch.float32
    check_signals_equal_the_model_outputs(trainer.teacher)
    trainer.train()
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    unquantized = make_trainer(teacher=saved, folder="whole").evaluate()
    assert trainer.evaluate()["eval_teacher_perplexity"] == pytest.approx(
        unquantized["eval_teacher_perplexity"], rel=0.5
    )


def test_nf4_uses_double_quantization_and_the_requested_compute_dtype(saved):
    model = prepared(saved, quantization="nf4", dtype="bfloat16").model
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    assert model.config.quantization_config.bnb_4bit_compute_dtype == torch.bfloat16


def test_a_quantized_checkpoint_is_loaded_as_it_is_and_not_quantized_again(saved, tmp_path, monkeypatch):
    quantised = str(tmp_path / "quantised")
    prepared(saved, quantization="nf4").model.save_pretrained(quantised)
    teacher = prepared(quantised)
    assert teacher.model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    check_signals_equal_the_model_outputs(teacher)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for way in ({"quantization": "int8"}, {"deepspeed": "zero3-teacher.json"}, {"fsdp": True}):
        with pytest.raises(DistillError, match="is already a quantized checkpoint"):
            prepared(quantised, **way)


def test_a_teacher_with_an_offloaded_head_gives_the_same_logits(saved, tmp_path):
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb")
    device_map = dict.fromkeys(parts, "cpu") | dict.fromkeys(("model.layers.1", "model.layers.2", "lm_head"), "disk")
    teacher = prepared(saved, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert teacher.model.lm_head.weight.device.type == "meta"
    check_signals_equal_the_model_outputs(teacher)
    inputs = collate(rows("llama", 4))
    targets = Targets.from_batch(inputs, shift=True)
    unquantized = prepared(saved)(inputs, targets, {})
    torch.testing.assert_close(teacher(inputs, targets, {}).logits.project(), unquantized.logits.project())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "nf3"}, "quantization is 'nf3'; known: nf4, int8"),
        ({"quantization": "nf4", "deepspeed": "zero3-teacher.json"}, "quantization and deepspeed at once, because"),
        ({"quantization": "nf4", "fsdp": True}, "quantization and fsdp at once"),
        ({"device_map": "auto", "fsdp": True}, "device_map spreads a teacher over the devices of one process"),
        ({"deepspeed": "zero3-teacher.json"}, "2 or more; this run has no launcher. Start it with"),
        ({"deepspeed": "zero3-teacher-offload.json"}, "processes of a launcher, and needs 1 or more; this"),
        ({"fsdp": True}, "Start it with `torchrun --nproc_per_node 2"),
        ({"deepspeed": "zero3-techer.json"}, "did you mean 'zero3-teacher.json'"),
        ({"deepspeed": "zero2-student.json"}, "zero_optimization.stage is 2; a teacher has no gradients"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}, "optimizer": {}}}, "no 'optimizer' section: remove it"),
    ],
)  # fmt: skip
def test_impossible_placements_are_refused_with_the_possible_ones(saved, options, message):
    with pytest.raises(DistillError, match=message.replace("(", r"\(")):
        prepared(saved, **options)


def test_a_device_map_over_devices_is_refused_with_several_processes(saved, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for device_map in ("auto", {"model": 0, "lm_head": 1}):
        with pytest.raises(DistillError, match="each of the 2 processes of this launch"):
            FrozenTeacher(saved, device_map=device_map)
    model = build("llama", 1)
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(DistillError, match="each of the 2 processes of this launch"):
        prepared(model)
    assert prepared(saved, device_map={"": "cpu"}).model.device.type == "cpu"


@pytest.mark.parametrize(
    ("package", "options"), [("bitsandbytes", {"quantization": "int8"}), ("deepspeed", {"deepspeed": "any.json"})]
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(saved, monkeypatch, package, options):
    monkeypatch.setattr("hf_distill.errors.find_spec", lambda name: None if name == package else find_spec(name))
    extra = {"bitsandbytes": "quant"}.get(package, package)
    with pytest.raises(DistillError, match=rf'needs {package}.*pip install "hf-distill\[{extra}\]"'):
        FrozenTeacher(saved, **options)


def test_loading_options_are_refused_for_a_loaded_model(make_trainer):
    with pytest.raises(DistillError, match=r"'quantization'.* a model that is already loaded"):
        FrozenTeacher(build("llama"), quantization="nf4")
    with pytest.raises(DistillError, match=r"'deepspeed'.* but `teacher` is a Teacher object"):
        make_trainer(teacher=FrozenTeacher(build("llama")), teacher_deepspeed="zero3-teacher.json")


def test_auto_values_of_a_teachers_config_are_filled_from_its_width_and_dtype(tmp_path):
    filled = fill_teacher_config(read_deepspeed("zero3-teacher.json"), 100, "bfloat16")
    assert filled["bf16"] == {"enabled": True}
    assert filled["zero_optimization"]["stage3_prefetch_bucket_size"] == 9000
    assert filled["zero_optimization"]["stage3_param_persistence_threshold"] == 1000
    assert '"auto"' not in json.dumps(filled)
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}')
    assert fill_teacher_config(read_deepspeed("own.json", tmp_path), 100, "float32") == {
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": 1,
    }
    for text, message in (("{", "is not JSON"), ("[]", "holds a list; a DeepSpeed config must be a JSON mapping")):
        (tmp_path / "own.json").write_text(text)
        with pytest.raises(DistillError, match=message):
            read_deepspeed("own.json", tmp_path)


CUDA = torch.device("cuda", 0)


@pytest.fixture
def loads(monkeypatch):
    """Lets `from_pretrained` of llamas load to the CPU, and records the arguments that it was called with."""
    calls, load = [], LlamaForCausalLM.from_pretrained.__func__

    def from_pretrained(cls, path, **kwargs):
        calls.append(kwargs)
        result = load(cls, path, **{k: v for k, v in kwargs.items() if k != "device_map"})
        model = result[0] if isinstance(result, tuple) else result
        if "device_map" in kwargs:
            model.hf_device_map = kwargs["device_map"]
        return result

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(from_pretrained))
    return calls


def test_a_teacher_is_loaded_to_the_device_without_a_copy_in_host_memory(saved, loads, monkeypatch):
    student = build("llama", 0)
    FrozenTeacher(saved).prepare(student, CUDA)
    FrozenTeacher(saved, device_map={"": 1}).prepare(student, CUDA)
    assert [call["device_map"] for call in loads] == [{"": CUDA}, {"": 1}]
    loads.clear()
    FrozenTeacher(saved).prepare(student, torch.device("cpu"))
    monkeypatch.setattr(LlamaForCausalLM, "to", lambda self, device: self)
    FrozenTeacher(saved).prepare(student, torch.device("mps"))
    monkeypatch.setattr("hf_distill.teachers.loading.is_fsdp_enabled", lambda: True)
    FrozenTeacher(saved).prepare(student, CUDA)  # cpu_ram_efficient_loading
    assert [call.get("device_map") for call in loads] == [None, None, None]


@pytest.mark.parametrize("strategy", [{}, {"fsdp": True}, {"deepspeed": {"zero_optimization": {"stage": 2}}}])
def test_the_models_of_a_recipe_are_loaded_to_the_device_where_the_strategy_allows_it(
    saved, loads, monkeypatch, strategy, tmp_path
):
    recipe = load_recipe(
        "quickstart", [f"teacher.model={saved}", f"student.model={saved}", "student.from_teacher=null", "control=null"]
    )
    args = SimpleNamespace(device=CUDA, seed=0, **({"fsdp": False, "deepspeed": None} | strategy))
    factory = ModelFactory(recipe, task_of(recipe), args, saved, byte_tokenizer())
    assert factory.teacher.model.hf_device_map == {"": CUDA}
    student = factory.student([])
    assert [call.get("device_map") for call in loads] == [{"": CUDA}, None if strategy else {"": CUDA}]
    student.save_pretrained(tmp_path / "adapters")
    factory._base_student([], None, unsharded=True)  # the adapters are merged on the CPU
    assert loads[-1].get("device_map") is None
