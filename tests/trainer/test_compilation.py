"""`torch_compile`: the transformer blocks are compiled, the results stay, and what cannot work is refused."""

import copy
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import build
from torch._dynamo import OptimizedModule
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, set_seed

from hf_distill import DistillError, FrozenTeacher
from hf_distill.cache.fingerprints import weights_fingerprint
from hf_distill.models import compilation as models_compilation
from hf_distill.models.compilation import compiled_modules, transformer_blocks
from hf_distill.teachers import EMATeacher
from hf_distill.trainer.compilation import compile_frozen_teachers, incompatible_compilation

EAGER = {"torch_compile_backend": "eager"}  # sets torch_compile; PyTorch runs the graphs that it traced


@pytest.fixture(autouse=True)
def _empty_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def results(trainer):
    """The losses, norms and metrics of training and evaluation."""
    trainer.train()
    logs = [*trainer.state.log_history, trainer.evaluate()]
    return [{k: v for k, v in log.items() if "per_second" not in k and "runtime" not in k} for log in logs]


def mixtral():
    set_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=97)
    config = MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=4, output_router_logits=True)
    return MixtralForCausalLM(config)


def with_adapters():
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return get_peft_model(build("llama"), lora)


@pytest.mark.parametrize(
    ("kind", "make", "options"),
    [
        ("llama", None, {}),
        ("llama", None, {"bf16": True, "use_cpu": True}),
        ("llama", None, {"gradient_accumulation_steps": 2, "activation_checkpointing": True}),
        ("llama", with_adapters, {}),
        ("llama", mixtral, {}),
        ("gpt2", None, {}),
        ("bert", None, {}),
        ("t5", None, {}),
        ("sequence", None, {}),
        ("token", None, {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}),
    ],
)
def test_compiled_blocks_train_as_uncompiled_ones_do(make_trainer, kind, make, options):
    plain, compiled = (
        make_trainer(kind, model=make() if make else build(kind), **options, **compilation)
        for compilation in ({}, {**EAGER, "compile_teacher": True})
    )
    blocks = [*transformer_blocks(compiled.model), *transformer_blocks(compiled.teacher.model)]
    assert {id(module) for model in (compiled.model, compiled.teacher.model) for module in
            compiled_modules(model).values()} == {id(block) for block in blocks}  # fmt: skip
    assert results(compiled) == results(plain)
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0
    assert not compiled_modules(plain.model)


def test_blocks_of_one_class_share_one_graph_which_is_traced_once(make_trainer):
    for both in (False, True):  # the graph of the first student is that of the second one, so the teacher's is new
        trainer = make_trainer(model=build("llama", layers=4), compile_teacher=both, folder=f"{both}", **EAGER)
        counters.clear()
        trainer.train()
        assert (counters["frames"]["total"], len(counters["graph_break"])) == (1, 0)


def test_more_graphs_are_kept_than_pytorch_keeps_by_default(make_trainer):
    """Beyond 8 graphs, for lengths, modes and models, PyTorch would run all blocks without compilation."""
    for width in range(8, 52, 4):
        trainer = make_trainer(model=build("llama", width=width), max_steps=1, folder=str(width), **EAGER)
        counters.clear()
        trainer.train()
        assert counters["frames"]["ok"] == counters["frames"]["total"] == 1


@pytest.mark.parametrize("teacher", [EMATeacher(), None])
def test_the_whole_student_is_not_compiled_by_accelerate(make_trainer, teacher):
    """Also if evaluation prepares it, or if the settings are those of `accelerate launch`."""
    trainer = make_trainer(teacher=teacher or build("llama", 1), **EAGER)
    trainer.evaluate()
    assert not isinstance(trainer.model_wrapped, OptimizedModule)
    trainer.train()
    assert not isinstance(trainer.model_wrapped, OptimizedModule)
    assert trainer.accelerator.state.dynamo_plugin.backend.value == "EAGER"


def test_the_settings_of_accelerate_launch_compile_the_blocks(make_trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert not isinstance(trainer.model_wrapped, OptimizedModule)
    assert [*compiled_modules(trainer.model).values()] == transformer_blocks(trainer.model)


def test_without_a_teacher_the_trainer_compiles_as_transformers_does_and_a_teacher_can_follow(make_trainer):
    trainer = make_trainer(teacher=None, max_steps=1, **EAGER)
    trainer.train()
    assert isinstance(trainer.model_wrapped, OptimizedModule)
    trainer.setup_distillation(FrozenTeacher(build("llama", 1)), trainer.args)
    expected = make_trainer(model=copy.deepcopy(trainer.model), teacher=build("llama", 1), folder="plain").evaluate()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)


def test_checkpoints_have_plain_names_and_training_resumes_exactly(make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, **EAGER, "compile_teacher": True}
    straight = make_trainer(folder="straight", **options)
    straight.train()
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "straight" / "checkpoint-4", output_loading_info=True
    )
    assert not any(info.values())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, straight.model.state_dict()[name])
    for compilation in (options, {}):
        resumed = make_trainer(folder="resumed", **compilation)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
        for name, value in resumed.model.state_dict().items():
            assert torch.equal(value, straight.model.state_dict()[name])


def test_each_student_of_model_init_is_compiled(make_trainer):
    trainer = make_trainer(model_init=lambda: build("llama"), max_steps=1, **EAGER)
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert [*compiled_modules(trainer.model).values()] == transformer_blocks(trainer.model)


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_layer(model):
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


def compiled_backbone(model):
    model.model.compile(backend="eager")
    return model


def compiled_head(model):
    model.lm_head.compile(backend="eager")
    return model


WHOLE = [
    lambda m: torch.compile(m, backend="eager"),
    compiled_in_place,
    compiled_forward,
    compiled_layer,
    compiled_head,
]


@pytest.mark.parametrize("compile_model", WHOLE)
@pytest.mark.parametrize("options", [{}, EAGER])
def test_a_student_with_a_compiled_output_head_or_changed_names_is_refused(make_trainer, compile_model, options):
    with pytest.raises(DistillError, match=r"^(the student|\S+ of the student) is compiled\. .* set torch_compile="):
        make_trainer(model=compile_model(build("llama")), **options)


def test_a_student_whose_backbone_is_compiled_trains_and_is_not_compiled_twice(make_trainer):
    plain, student = make_trainer(), compiled_backbone(build("llama"))
    assert results(make_trainer(model=student, folder="compiled")) == results(plain)
    with pytest.raises(DistillError, match=r"its model is compiled already\. .* remove torch_compile"):
        make_trainer(model=student, **EAGER)


@pytest.mark.parametrize("compile_model", [*WHOLE, compiled_backbone])
def test_a_compiled_teacher_has_equal_losses_and_the_fingerprint_of_a_plain_one(make_trainer, compile_model):
    plain = make_trainer(teacher=build("llama", 1))
    compiled = make_trainer(teacher=compile_model(build("llama", 1)), folder="compiled")
    assert weights_fingerprint(compile_model(build("llama", 1))) == weights_fingerprint(build("llama", 1))
    assert compiled.teacher.model.state_dict().keys() == plain.teacher.model.state_dict().keys()
    assert results(compiled) == results(plain)


FEATURES = [{"name": "hidden_mse", "weight": 0.1}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EAGER, r"torch_compile does not work with hidden_mse: .*Set torch_compile=False, or remove these losses"),
        ({"model": compiled_backbone(build("llama"))}, r"the student's model is compiled, .* hidden_mse"),
        ({"teacher": compiled_backbone(build("llama", 1))}, r"the teacher's model is compiled, .* hidden_mse"),
    ],
)
def test_losses_on_features_refuse_compilation(make_trainer, options, message):
    with pytest.raises(DistillError, match=message):
        make_trainer(losses=FEATURES, **options)
    if options is EAGER:
        trainer = make_trainer(**options)
        trainer.args.losses = FEATURES
        with pytest.raises(DistillError, match=message):
            trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torch_compile_mode": "fastest"}, r"torch_compile_mode='fastest' fails on cpu \(.*set torch_compile=False"),
        ({"compile_teacher": True}, "compile_teacher=True needs torch_compile=True"),
        ({**EAGER, "compile_teacher": True, "teacher": None}, "compile_teacher is set but there is no teacher"),
        ({**EAGER, "compile_teacher": True, "teacher": EMATeacher()}, "frozen models, and EMATeacher has none"),
    ],
)
def test_arguments_that_cannot_be_applied_are_refused(make_trainer, options, message):
    with pytest.raises(DistillError, match=message):
        make_trainer(**options)


def test_a_backend_without_its_compiler_is_refused_before_training(make_trainer, monkeypatch):
    def compile_nothing(graph, inputs):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "eager", compile_nothing)
    with pytest.raises(DistillError, match=r"torch_compile_backend='eager' .*Failed to find C compiler\.\)"):
        make_trainer(**EAGER)


def test_models_whose_blocks_are_not_found_are_refused(make_trainer, monkeypatch):
    def find(model, which=None):
        raise DistillError("It has 0 lists of 2 layers.")

    monkeypatch.setattr(models_compilation, "get_layer_stack", find)
    with pytest.raises(DistillError, match="those of the student are not found: It has 0 lists of 2 layers"):
        make_trainer(**EAGER)


def test_zero3_is_refused_for_student_and_teacher(make_trainer):
    trainer = make_trainer(**EAGER, compile_teacher=True)
    next(trainer.teacher.model.parameters()).ds_id = 0
    with pytest.raises(DistillError, match=r"the teacher is sharded with ZeRO-3, .* Shard it with FSDP2"):
        compile_frozen_teachers(trainer.teacher, trainer.args)
    next(trainer.model.parameters()).ds_id = 0
    (problem,) = incompatible_compilation(trainer.model, trainer.args)
    assert "torch_compile does not work with ZeRO-3" in problem
    assert problem.endswith("Use ZeRO-2 or FSDP2, or set torch_compile=False")


@pytest.mark.skipif(shutil.which("cc") is None, reason="inductor needs a C compiler")
def test_inductor_trains_as_the_uncompiled_model_does(make_trainer):
    plain, compiled = (make_trainer(max_steps=2, **options) for options in ({}, {"torch_compile": True}))
    for trainer in (plain, compiled):
        trainer.train()
    for log, expected in zip(compiled.state.log_history[:2], plain.state.log_history[:2], strict=True):
        assert log == pytest.approx(expected, rel=1e-4)
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] > 0
