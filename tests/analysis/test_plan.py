"""`plan` against what torch, peft, bitsandbytes and real tiny models say."""

from dataclasses import replace

import pytest
import torch
from tiny import build
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from hf_distill.analysis import Anatomy, Job, Strategy, memory, model_config, plan, rule_of_thumb
from hf_distill.analysis.compute import Flops, counted_forward, training_rule
from hf_distill.analysis.job import job_of
from hf_distill.analysis.parts import weights
from hf_distill.analysis.rows import GiB, deepspeed_estimate, fewest_gpus, min_gpus
from hf_distill.analysis.shapes import known_shapes
from hf_distill.analysis.strategy import STUDENTS, alternatives
from hf_distill.analysis.working import activations, head_gradients, workspace
from hf_distill.errors import DistillError
from hf_distill.recipe import load_recipe
from hf_distill.recipe.schema import Lora

NAMES = sorted({entry["ids"][0] for entry in known_shapes().values()})
SMALL = "HuggingFaceTB/SmolLM2-135M"


def shrunk(family: str, width: int = 128, layers: int = 2, **changes):
    fields = dict(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=width // 8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return AutoConfig.for_model(family, **(fields | changes))


def job(config, **fields) -> Job:
    anatomy = Anatomy.of(config)
    return Job(**(dict(student=anatomy, teacher=anatomy, batch=2, length=64) | fields))


def recipe(*overrides: str, name: str = "llama-70b-to-8b-nf4"):
    return load_recipe(name, overrides)


def held(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# The table


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_has_as_many_parameters_as_published(name):
    assert Anatomy.of(model_config(name)).parameters == pytest.approx(known_shapes()[name]["parameters"], rel=0.005)


def test_a_known_model_asks_nothing_of_the_network(monkeypatch):
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *a, **k: pytest.fail("the Hub was asked"))
    assert model_config("meta-llama/Llama-3.1-8B-Instruct").num_hidden_layers == 32


def test_a_folder_needs_a_config_and_no_weights(tmp_path):
    shrunk("qwen2").save_pretrained(tmp_path)
    assert model_config(str(tmp_path)).hidden_size == 128


# Operations


@pytest.mark.parametrize(
    "name", [SMALL, "Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-0.6B", "google/gemma-2-2b", "mistralai/Mistral-7B-v0.3"]
)
def test_the_formula_is_what_torch_counts(name):
    config = model_config(name)
    assert 2048 * Flops.of(Anatomy.of(config), 2048).forward == pytest.approx(counted_forward(config, 2048), rel=0.02)


def test_the_formula_of_a_llama_by_hand():
    flops = Flops.of(Anatomy.of(model_config("meta-llama/Llama-3.1-8B")), 2048)
    assert flops.blocks == 2 * 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert flops.attention == 4 * 2048 * 32 * 128 * 32
    assert flops.head == 2 * 4096 * 128256


def test_of_experts_only_those_that_a_token_passes_count():
    config = model_config("Qwen/Qwen3-30B-A3B")
    attention, router, experts = 2 * 2048 * (32 + 4) * 128, 2048 * 128, 8 * 3 * 2048 * 768
    assert Flops.of(Anatomy.of(config), 2048).blocks == pytest.approx(2 * 48 * (attention + router + experts), rel=0.01)
    assert counted_forward(config, 16) is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [None, 8])
def test_training_is_what_torch_counts_in_a_forward_and_a_backward(rank, checkpointing):
    config = shrunk("llama", layers=4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if rank:
        from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(2, 64, dtype=torch.long), use_cache=False).logits.sum().backward()
    anatomy = Anatomy.of(config)
    adapters = anatomy.adapters(rank, "all-linear") if rank else None
    formula = 128 * Flops.of(anatomy, 64).training(adapters, checkpointing)
    if checkpointing and not rank:  # torch computes a block again up to its last product
        formula -= 128 * 4 * 2 * 3 * 128 * 128
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_rule_of_thumb_gives_the_classical_example():
    rule = rule_of_thumb(70e9, 8e9, 20e9)
    assert rule.total == pytest.approx(3.76e21)
    assert rule_of_thumb(70e9, 8e9, 2048).teacher == pytest.approx(287e12, rel=0.002)
    assert rule.total / training_rule(8e9, 2e12) == pytest.approx(0.039, abs=0.0005)


# Memory, part by part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_gradients_and_optimizer_are_those_of_a_real_step(dtype):
    config = shrunk("qwen3", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 8, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    parts = memory(job(config, student_dtype=dtype), Strategy("whole", "single"), 1)
    state = [t for values in optimizer.state.values() for t in values.values() if t.dim()]
    assert parts.student == held(model.parameters())
    assert parts.gradients == held(p.grad for p in model.parameters())
    assert parts.optimizer == held(state)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.1\..*up_proj"])
def test_adapters_are_as_many_as_peft_trains(targets):
    from peft import LoraConfig, get_peft_model

    config = shrunk("llama")
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules=targets))
    asked = job(config, lora=Lora(r=4, target_modules=targets), student_dtype=torch.bfloat16)
    assert asked.adapters == model.get_nb_trainable_parameters()[0]
    parts = memory(asked, Strategy("whole", "single"), 1)
    assert (parts.gradients, parts.optimizer) == (4 * asked.adapters, 8 * asked.adapters)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_are_as_large_as_those_of_bitsandbytes(kind, tmp_path):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers import BitsAndBytesConfig

    config = shrunk("llama", width=256)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    settings = BitsAndBytesConfig(**(four if kind == "nf4" else dict(load_in_8bit=True)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=settings)
    total = held(model.parameters())
    for module in model.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            total += held([state.absmax, state.state2.absmax])
        elif isinstance(module, Linear8bitLt):
            total += held([module.weight.SCB])
    assert weights(Anatomy.of(config), 2, kind) == pytest.approx(total, rel=0.02)


def test_more_processes_halve_what_a_strategy_shards():
    asked = job(model_config(SMALL), mixed=True)
    for student, sharded in (
        ("zero1", {"optimizer"}),
        ("zero2", {"optimizer", "gradients"}),
        ("zero3", {"optimizer", "gradients", "student"}),
        ("fsdp2", {"optimizer", "gradients", "student"}),
    ):
        two, four = (memory(asked, Strategy("whole", student), n) for n in (2, 4))
        for part in ("student", "gradients", "optimizer", "teacher"):
            share = 0.5 if part in sharded else 1
            assert getattr(four, part) == pytest.approx(share * getattr(two, part), abs=1), (student, part)
    two, four = (memory(asked, Strategy("zero3", "zero3"), n) for n in (2, 4))
    assert four.teacher == pytest.approx(two.teacher / 2, abs=1)


def test_a_device_map_spreads_the_teacher_of_one_process():
    asked = job(model_config(SMALL))
    spread = Strategy("device_map", "ddp").on(4)
    parts = memory(asked, spread, 4)
    assert spread.processes(4) == 1
    assert spread.student == "single"
    assert (4 * parts.teacher, parts.student) == (2 * 134515008, 4 * 134515008)


def test_under_autocast_trained_linear_layers_are_there_twice():
    asked = job(model_config(SMALL), mixed=True)
    once, twice = (memory(asked, Strategy("whole", s), 2).gathered for s in ("single", "ddp"))
    assert once == 2 * asked.student.linear_weights
    assert twice == once + 4 * asked.student.parameters


def test_deepspeed_in_bf16_holds_16_bytes_a_parameter():
    asked = job(model_config(SMALL), mixed=True)
    parts = memory(asked, Strategy("whole", "zero1"), 1)
    assert parts.student + parts.gradients + parts.optimizer == 16 * asked.student.parameters


def test_what_is_offloaded_is_in_host_memory():
    asked = job(model_config(SMALL), mixed=True)
    here = memory(asked, Strategy("zero3", "zero3"), 2)
    there = memory(asked, Strategy("zero3", "zero3", True, True, True), 2)
    assert there.teacher == there.student == there.gradients == there.optimizer == 0
    assert there.host == here.teacher + here.student + here.gradients + here.optimizer
    assert here.host == 0


@pytest.mark.parametrize(
    ("family", "dtype", "mixed", "tolerance"),
    [
        ("llama", torch.float32, False, 0.01),
        ("llama", torch.bfloat16, False, 0.01),
        ("llama", torch.float32, True, 0.01),
        ("qwen3", torch.bfloat16, False, 0.01),
        ("gemma2", torch.bfloat16, False, 0.15),
    ],
)
def test_activations_are_what_autograd_keeps(family, dtype, mixed, tolerance):
    kept = []
    for layers in (2, 4):  # the difference is two blocks, whatever the ends keep
        config = shrunk(family, layers=layers)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
        seen = {}

        def keep(tensor, own=own, seen=seen):
            storage = tensor.untyped_storage()
            of_tokens = tensor.dim() > 2 or tensor.shape[:1] == (
                96,
            )  # else a cast of a weight, which `gathered` counts
            if storage.data_ptr() not in own and of_tokens:
                seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its place
            return tensor

        ids = torch.ones(2, 48, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", enabled=mixed):
            hidden = model.model(input_ids=ids, use_cache=False)[0]
        kept.append(sum(size for size, _ in seen.values()))
        del hidden
    asked = job(config, length=48, student_dtype=dtype, mixed=mixed)
    shallow = replace(asked, student=replace(asked.student, depth=2))
    single = Strategy("whole", "single")
    assert activations(asked, single) - activations(shallow, single) == pytest.approx(kept[1] - kept[0], rel=tolerance)


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block():
    asked = job(shrunk("llama", layers=12), mixed=True)
    all_kept, some = (activations(replace(asked, checkpointing=c), Strategy("whole", "zero2")) for c in (False, True))
    ends = 128 * 8 * 128
    block = (all_kept - ends) // 12
    assert some == 12 * 128 * 128 * 2 + block + ends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_keeps_what_the_fused_head_keeps(dtype):
    from hf_distill.objective import objective
    from hf_distill.signals import Targets
    from hf_distill.sources import Head
    from hf_distill.sweep import HeadJob

    config = shrunk("llama")
    hidden = torch.randn(128, 128, dtype=dtype, requires_grad=True)
    weight = torch.randn(300, 128, dtype=dtype, requires_grad=True)
    labels = torch.randint(300, (1, 128))
    targets = Targets.from_batch({"input_ids": labels, "labels": labels}, shift=False)
    loss = HeadJob(Head(hidden.detach(), weight.detach()), targets, objective(0.5, 1.0)).from_hidden(
        Head(hidden, weight)
    )
    (fused,) = (f for f, _ in loss.grad_fn.next_functions if hasattr(f, "gradients"))
    first = held(g for g in fused.gradients if g is not None)
    loss.backward()
    second = held([hidden.grad, weight.grad]) if dtype != torch.float32 else 0
    asked = job(config, student_dtype=dtype, teacher_dtype=dtype)
    assert head_gradients(asked, Strategy("whole", "single")) == first + second + 2 * held([hidden])


def test_the_workspace_on_a_cpu_is_what_the_sweep_takes():
    asked = replace(job(model_config(SMALL), device="cpu"), batch=16, length=1024)
    rows = 150 * 2**20 // (8 * 49152)
    assert workspace(asked, None) == rows * 8 * 49152
    assert workspace(replace(asked, batch=1, length=8), None) == 8 * 8 * 49152


def test_the_workspace_on_a_gpu_is_an_eighth_of_what_is_left_and_16_rows_at_least():
    asked = replace(job(model_config(SMALL)), batch=64, length=2048)
    assert workspace(asked, 8 * GiB) == pytest.approx(GiB, rel=0.01)
    assert workspace(asked, -GiB) == workspace(asked, None) == 16 * 3 * 8 * 49152


def test_features_are_those_that_are_captured():
    from hf_distill.capture import capture
    from hf_distill.signals import Tap, Targets

    student, teacher = build("llama", 0), build("llama", 1, layers=3, width=48)
    ids = torch.ones(2, 16, dtype=torch.long)
    targets = Targets.from_batch({"input_ids": ids, "labels": ids}, shift=False)
    total = 0
    for model, layers in ((student, (0, 1)), (teacher, (0, 2))):
        with capture(model, {Tap("hidden", i): targets for i in layers}) as found:
            model(input_ids=ids)
        total += held(found.values())
    captured = 2 * 32 + 2 * 48
    asked = Job(Anatomy.of(student.config), Anatomy.of(teacher.config), 2, 16, captured=captured)
    assert memory(asked, Strategy("whole", "single"), 1).features == total


def test_losses_on_features_and_only_those_are_captured():
    loss = "{name: hidden_cosine, layers: 'last:4'}"
    configs = [model_config(f"meta-llama/Llama-3.1-{size}") for size in ("8B", "70B")]
    with_it, without = (job_of(recipe(*losses), *configs) for losses in ([f"losses=[{loss}]"], []))
    assert memory(with_it, Strategy("nf4", "single"), 1).features == 2 * 2048 * 2 * 4 * (4096 + 8192)
    assert without.captured == 0


# Strategies


@pytest.mark.parametrize("name", ["llama-70b-to-8b-zero3", "qwen-72b-to-7b-fsdp2"])
def test_every_strategy_is_what_its_overrides_make_of_a_recipe(name):
    models = (f"student.model={SMALL}", f"teacher.model={SMALL}")
    found = plan(recipe(*models, name=name), 8, 80)
    assert {row.strategy.student for row in found.rows} == set(STUDENTS) - {"single"}
    for row in found.rows:
        again = recipe(*models, *row.overrides, name=name)
        assert Strategy.of_recipe(again, 8) == row.strategy
        config = model_config(SMALL)
        assert memory(job_of(again, config, config), row.strategy, 8, found.usable) == row.parts


def test_quantised_models_are_not_sharded_and_engines_not_mixed():
    for method in ("full", "lora", "qlora"):
        for strategy in alternatives(method, 8):
            assert {strategy.teacher, strategy.student} not in (
                {"zero3", "fsdp2"},
                {"fsdp2", "zero1"},
                {"fsdp2", "zero2"},
            )
    assert {s.student for s in alternatives("qlora", 8)} == {"ddp"}
    assert all(not s.sharded for s in alternatives("full", 1))


def test_fewer_gpus_than_the_least_do_not_do():
    asked = job(model_config("meta-llama/Llama-3.1-8B"), mixed=True)
    strategy = Strategy("zero3", "zero3")
    least = min_gpus(asked, strategy, 40 * GiB)
    assert (
        memory(asked, strategy, least, 40 * GiB).total <= 40 * GiB < memory(asked, strategy, least - 1, 40 * GiB).total
    )
    assert fewest_gpus(asked, 40 * GiB)[0] <= least
    assert min_gpus(asked, Strategy("whole", "ddp"), 40 * GiB) is None


def test_advice_follows_the_memory_of_a_gpu():
    small = ("teacher.model=Qwen/Qwen2.5-7B", f"student.model={SMALL}", "data.max_length=256")
    roomy, tight, tiny, never = (plan(recipe(*small), 1, gib) for gib in (32, 12, 4.5, 1.5))
    assert roomy.cheapest.strategy.teacher == "whole"
    assert tight.cheapest.strategy.teacher == "int8"
    assert tiny.cheapest is None
    assert "takes the fewest" in tiny.advice
    assert "per_device_train_batch_size" in never.advice


def test_deepspeeds_own_estimate_stands_beside_ours():
    asked = job(model_config("meta-llama/Llama-3.1-8B"), mixed=True)
    for student, each in (("zero2", 20), ("zero3", 18)):
        parts = memory(asked, Strategy("whole", student), 8)
        ours = (parts.student + parts.gradients + parts.optimizer) / GiB
        assert ours < deepspeed_estimate(asked, Strategy("whole", student), 8) < ours * each / 16 + 2.5
    assert deepspeed_estimate(asked, Strategy("whole", "ddp"), 8) is None


# The whole


def test_the_cost_of_a_run():
    found = plan(recipe(name="llama-70b-to-8b-zero3"), 8, 80)
    tokens = 10000 * 2 * 8 * 8 * 2048
    assert found.cost.tokens == tokens
    assert found.cost.rule == pytest.approx(tokens * (2 * 70553706496 + 6 * 8030261248))
    assert found.cost.flop == pytest.approx(tokens * (found.teacher.forward + found.student.training))
    assert found.cost.gpu_hours == pytest.approx(found.cost.flop / (0.4 * 989e12) / 3600)
    assert found.cost.share == pytest.approx(found.cost.flop / (6 * 8030261248 * 2e12))


def test_a_run_of_epochs_has_no_cost_that_can_be_known():
    cost = plan(recipe("train.max_steps=null", "train.num_train_epochs=1"), 1, 80).cost
    assert cost.tokens is cost.flop is cost.gpu_hours is cost.share is None
    assert cost.tokens_per_second > 0


def test_a_student_cut_from_its_teacher_has_fewer_blocks():
    found = plan(recipe("student={from_teacher: {keep_layers: 16}}", f"teacher.model={SMALL}"), 1, 80)
    block = Anatomy.of(model_config(SMALL)).block
    assert found.student.parameters == 134515008 - 14 * block


def test_all_that_is_wrong_is_told_at_once(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    wrong = recipe("student.model=meta-llama/Llama-3.1-8B-Instrct", "teacher.model=me/mine")
    with pytest.raises(DistillError) as caught:
        plan(wrong, 0, -1)
    for words in (
        "gpus is 0; it must be above 0",
        "gpu_memory is -1; it must be above 0",
        "did you mean 'meta-llama/Llama-3.1-8B-Instruct'",
        "'me/mine'",
        "no route to host",
        "a folder with the model's config.json",
    ):
        assert words in str(caught.value)


def test_a_sharded_recipe_on_one_gpu_is_told_what_to_choose():
    for name in ("llama-70b-to-8b-zero3", "qwen-72b-to-7b-fsdp2"):
        with pytest.raises(DistillError, match=r"needs at least 2 processes.*teacher\.quantization=nf4"):
            plan(recipe(name=name), 1, 80)
    offload = ("teacher.deepspeed=zero3-teacher-offload.json", "train.deepspeed=zero3-student-offload.json")
    assert plan(recipe(*offload, name="llama-70b-to-8b-zero3"), 1, 80).rows
