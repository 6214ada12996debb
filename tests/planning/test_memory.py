"""Memory, part by part, against real tiny models, peft, bitsandbytes and autograd."""

from dataclasses import replace

import pytest
import torch
from shrunk import SMALL, held, job, recipe, shrunk
from tiny import build
from transformers import AutoModelForCausalLM

from hf_distill.planning import ModelStats, Strategy, Workload, memory, model_config
from hf_distill.planning.activations import activations, head_gradients, workspace
from hf_distill.planning.estimates import GiB
from hf_distill.planning.memory import weights
from hf_distill.planning.workload import make_workload
from hf_distill.recipe.models import Lora


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
    assert weights(ModelStats.of(config), 2, kind) == pytest.approx(total, rel=0.02)


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
    spread = Strategy("device_map", "ddp").for_gpus(4)
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
    from hf_distill.core.logits import LazyLogits
    from hf_distill.core.signals import Targets
    from hf_distill.losses.fused import ChunkedLoss
    from hf_distill.losses.objective import objective

    config = shrunk("llama")
    hidden = torch.randn(128, 128, dtype=dtype, requires_grad=True)
    weight = torch.randn(300, 128, dtype=dtype, requires_grad=True)
    labels = torch.randint(300, (1, 128))
    targets = Targets.from_batch({"input_ids": labels, "labels": labels}, shift=False)
    loss = ChunkedLoss(LazyLogits(hidden.detach(), weight.detach()), targets, objective(0.5, 1.0)).from_hidden(
        LazyLogits(hidden, weight)
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
    assert workspace(asked, None) == rows * 8 * 49152 + 10 * 5 * 2**19 * torch.get_num_threads()
    assert workspace(replace(asked, batch=1, length=8), None) == (8 + 10 * 4) * 8 * 49152


def test_no_divergence_takes_more_temporaries_than_the_sweep_counts_with():
    from hf_distill.core.logits import LazyLogits
    from hf_distill.core.signals import Targets
    from hf_distill.losses import LOSSES
    from hf_distill.losses import fused as run_chunks
    from hf_distill.losses.objective import objective

    labels = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = Targets.from_batch({"labels": labels}, shift=True)
    hidden, weight = torch.randn(len(targets), 8, requires_grad=True), torch.randn(97, 8, requires_grad=True)
    most = 0
    for name in (name for name, loss in LOSSES.items() if loss.needs and not loss.feature and loss.gradient):
        told = LazyLogits(torch.randn(len(targets), 8), torch.randn(97, 8))
        head = run_chunks.ChunkedLoss(told, targets, objective(0.5, 2.0, name, ()), statistics=1)
        head.from_hidden(LazyLogits(hidden, weight))
        most = max(most, len(head._scratch._kept))
    assert most == run_chunks.MAX_TEMPORARIES


def test_the_workspace_on_a_gpu_is_an_eighth_of_what_is_left_and_16_rows_at_least():
    asked = replace(job(model_config(SMALL)), batch=64, length=2048)
    assert workspace(asked, 8 * GiB) == pytest.approx(GiB, rel=0.01)
    assert workspace(asked, -GiB) == workspace(asked, None) == 16 * (8 + 10 * 4) * 49152


def test_features_are_those_that_are_captured():
    from hf_distill.core.signals import FeatureKey, Targets
    from hf_distill.models.feature_capture import capture_features

    student, teacher = build("llama", 0), build("llama", 1, layers=3, width=48)
    ids = torch.ones(2, 16, dtype=torch.long)
    targets = Targets.from_batch({"input_ids": ids, "labels": ids}, shift=False)
    total = 0
    for model, layers in ((student, (0, 1)), (teacher, (0, 2))):
        with capture_features(model, {FeatureKey("hidden", i): targets for i in layers}) as found:
            model(input_ids=ids)
        total += held(found.values())
    captured = 2 * 32 + 2 * 48
    asked = Workload(ModelStats.of(student.config), ModelStats.of(teacher.config), 2, 16, captured=captured)
    assert memory(asked, Strategy("whole", "single"), 1).features == total


def test_losses_on_features_and_only_those_are_captured():
    loss = "{name: hidden_cosine, layers: 'last:4'}"
    configs = [model_config(f"meta-llama/Llama-3.1-{size}") for size in ("8B", "70B")]
    with_it, without = (make_workload(recipe(*losses), *configs) for losses in ([f"losses=[{loss}]"], []))
    assert memory(with_it, Strategy("nf4", "single"), 1).features == 2 * 2048 * 2 * 4 * (4096 + 8192)
    assert without.captured == 0
