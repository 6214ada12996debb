"""Each part of the planned memory equals what real tiny models, peft, bitsandbytes and autograd take."""

from dataclasses import replace
from math import prod

import pytest
import torch
from gpu_meter import Problem
from shrunk import SMALL, bytes_of, recipe, shrunk, workload_of
from tiny import build
from transformers import AutoModelForCausalLM

from hf_distill.planning import ModelStats, Strategy, Workload, estimate_memory, model_config
from hf_distill.planning.activations import activation_bytes, head_gradient_bytes, workspace_bytes
from hf_distill.planning.memory import gathered_bytes, weight_bytes
from hf_distill.planning.workload import make_workload
from hf_distill.recipe.models import Lora


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_gradients_and_optimizer_states_have_the_bytes_of_a_real_step(dtype):
    config = shrunk("qwen3", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 8, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    parts = estimate_memory(workload_of(config, student_dtype=dtype), Strategy("full", "single"), 1)
    state = [t for values in optimizer.state.values() for t in values.values() if t.dim()]
    assert parts.student == bytes_of(model.parameters())
    assert parts.gradients == bytes_of(p.grad for p in model.parameters())
    assert parts.optimizer == bytes_of(state)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.1\..*up_proj"])
def test_adapters_have_as_many_parameters_as_peft_trains(targets):
    from peft import LoraConfig, get_peft_model

    config = shrunk("llama")
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules=targets))
    workload = workload_of(config, lora=Lora(r=4, target_modules=targets), student_dtype=torch.bfloat16)
    assert workload.adapters == model.get_nb_trainable_parameters()[0]
    parts = estimate_memory(workload, Strategy("full", "single"), 1)
    assert (parts.gradients, parts.optimizer) == (4 * workload.adapters, 8 * workload.adapters)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_weights_have_the_bytes_of_bitsandbytes(kind, tmp_path):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers import BitsAndBytesConfig

    config = shrunk("llama", width=256)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    settings = BitsAndBytesConfig(**(four if kind == "nf4" else dict(load_in_8bit=True)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=settings)
    total = bytes_of(model.parameters())
    for module in model.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            total += bytes_of([state.absmax, state.state2.absmax])
        elif isinstance(module, Linear8bitLt):
            total += bytes_of([module.weight.SCB])
    assert weight_bytes(ModelStats.of(config), 2, kind) == pytest.approx(total, rel=0.02)


def test_twice_the_processes_halve_the_sharded_parts():
    workload = workload_of(model_config(SMALL), mixed_precision=True)
    for student, sharded_parts in (
        ("zero1", {"optimizer"}),
        ("zero2", {"optimizer", "gradients"}),
        ("zero3", {"optimizer", "gradients", "student"}),
        ("fsdp2", {"optimizer", "gradients", "student"}),
    ):
        two, four = (estimate_memory(workload, Strategy("full", student), n) for n in (2, 4))
        for part in ("student", "gradients", "optimizer", "teacher"):
            share = 0.5 if part in sharded_parts else 1
            assert getattr(four, part) == pytest.approx(share * getattr(two, part), abs=1), (student, part)
    two, four = (estimate_memory(workload, Strategy("zero3", "zero3"), n) for n in (2, 4))
    assert four.teacher == pytest.approx(two.teacher / 2, abs=1)


def test_a_device_map_spreads_the_teacher_over_the_gpus_of_one_process():
    workload = workload_of(model_config(SMALL))
    spread = Strategy("device_map", "ddp").for_gpus(4)
    parts = estimate_memory(workload, spread, 4)
    assert spread.processes(4) == 1
    assert spread.student == "single"
    assert (4 * parts.teacher, parts.student) == (2 * 134515008, 4 * 134515008)


def test_autocast_adds_casts_of_the_trained_linear_layers():
    workload = workload_of(model_config(SMALL), mixed_precision=True)
    single, ddp = (estimate_memory(workload, Strategy("full", s), 2).gathered for s in ("single", "ddp"))
    assert single == 2 * workload.student.linear_weights
    assert ddp == single + 4 * workload.student.parameters


@pytest.mark.parametrize("kind", ["full", "fsdp2", "zero3", "nf4", "int8", "cache"])
def test_autocast_adds_casts_of_a_float32_teacher_where_it_runs_under_autocast(kind):
    half, single = (
        workload_of(shrunk("llama", width=64), mixed_precision=True, student_dtype=torch.bfloat16, teacher_dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    strategy, is_cast = Strategy(kind, "ddp"), kind in ("full", "fsdp2")
    gathered = [gathered_bytes(workload, Strategy(kind, "single"), 1) for workload in (half, single)]
    head = [head_gradient_bytes(workload, strategy) for workload in (half, single)]
    largest = max(prod(shape) for shape in half.teacher.linear.values())
    if kind in ("full", "nf4", "int8", "cache"):
        assert gathered[1] - gathered[0] == (2 * largest if is_cast else 0)
    hidden_states = 2 * half.tokens * half.teacher.hidden  # of a teacher that computes in float32
    assert head[1] - head[0] == (2 * half.teacher.head if is_cast else hidden_states)


def test_a_teacher_with_a_device_map_has_a_copy_of_its_head_on_the_students_device():
    workload = workload_of(model_config(SMALL), mixed_precision=True)
    spread, full = (head_gradient_bytes(workload, Strategy(kind, "single")) for kind in ("device_map", "full"))
    assert spread - full == 2 * workload.teacher.head


def test_deepspeed_in_bf16_takes_16_bytes_per_parameter():
    workload = workload_of(model_config(SMALL), mixed_precision=True)
    parts = estimate_memory(workload, Strategy("full", "zero1"), 1)
    assert parts.student + parts.gradients + parts.optimizer == 16 * workload.student.parameters


def test_offloaded_parts_are_in_host_memory():
    workload = workload_of(model_config(SMALL), mixed_precision=True)
    on_gpu = estimate_memory(workload, Strategy("zero3", "zero3"), 2)
    offloaded = estimate_memory(workload, Strategy("zero3", "zero3", True, True, True), 2)
    assert offloaded.teacher == offloaded.student == offloaded.gradients == offloaded.optimizer == 0
    assert offloaded.host == on_gpu.teacher + on_gpu.student + on_gpu.gradients + on_gpu.optimizer
    assert on_gpu.host == 0


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
def test_activations_are_what_autograd_saves(family, dtype, mixed, tolerance):
    saved_bytes = []
    for layers in (2, 4):  # the difference is two blocks, independent of embeddings and output head
        config = shrunk(family, layers=layers)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        weight_pointers = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
        saved = {}

        def save(tensor, weight_pointers=weight_pointers, saved=saved):
            storage = tensor.untyped_storage()
            has_tokens = tensor.dim() > 2 or tensor.shape[:1] == (
                96,
            )  # otherwise it is a cast of a weight, which `gathered` counts
            if storage.data_ptr() not in weight_pointers and has_tokens:
                saved[storage.data_ptr()] = (
                    storage.nbytes(),
                    tensor,
                )  # kept alive, so that no other storage gets its address
            return tensor

        ids = torch.ones(2, 48, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t), torch.autocast("cpu", enabled=mixed):
            hidden = model.model(input_ids=ids, use_cache=False)[0]
        saved_bytes.append(sum(size for size, _ in saved.values()))
        del hidden
    workload = workload_of(config, length=48, student_dtype=dtype, mixed_precision=mixed)
    shallow = replace(workload, student=replace(workload.student, depth=2))
    single = Strategy("full", "single")
    assert activation_bytes(workload, single) - activation_bytes(shallow, single) == pytest.approx(
        saved_bytes[1] - saved_bytes[0], rel=tolerance
    )


def test_checkpointing_saves_the_inputs_of_all_blocks_and_the_activations_of_one():
    workload = workload_of(shrunk("llama", layers=12), mixed_precision=True)
    without, checkpointed = (
        activation_bytes(replace(workload, checkpointing=c), Strategy("full", "zero2")) for c in (False, True)
    )
    ends = 128 * 8 * 128
    block = (without - ends) // 12
    assert checkpointed == 12 * 128 * 128 * 2 + block + ends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_gradients_have_the_bytes_that_the_fused_loss_keeps(dtype):
    from hf_distill.core.logits import LazyLogits
    from hf_distill.core.targets import Targets
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
    first = bytes_of(g for g in fused.gradients if g is not None)
    loss.backward()
    second = bytes_of([hidden.grad, weight.grad]) if dtype != torch.float32 else 0
    workload = workload_of(config, student_dtype=dtype, teacher_dtype=dtype)
    assert head_gradient_bytes(workload, Strategy("full", "single")) == first + second + 2 * bytes_of([hidden])


def test_the_workspace_on_a_cpu_is_that_of_the_fused_loss():
    workload = replace(workload_of(model_config(SMALL), device="cpu"), batch=16, length=1024)
    rows = 150 * 2**20 // (8 * 49152)
    rows_in_cache = 5 * 2**19 // (4 * 49152)
    assert workspace_bytes(workload) == rows * 8 * 49152 + 11 * rows_in_cache * 4 * 49152
    assert workspace_bytes(replace(workload, batch=1, length=8)) == (8 + 11 * 4) * 8 * 49152


def test_chunk_tokens_of_a_recipe_sets_the_chunk_that_is_planned():
    config, vocab = model_config(SMALL), 49152
    changed = recipe("train.chunk_tokens=64", "train.per_device_train_batch_size=16")
    workload = make_workload(changed, config, config)
    assert workload.chunk_tokens == 64 < workload.tokens
    on_cpu = replace(workload, device="cpu")
    block = min(64, 5 * 2**19 // (4 * vocab))
    assert workspace_bytes(on_cpu) == 64 * 8 * vocab + 11 * block * 4 * vocab
    assert workspace_bytes(replace(on_cpu, chunk_tokens=None)) > workspace_bytes(on_cpu)


@pytest.mark.parametrize(
    ("options", "bytes_of_gradient"),
    [
        ({"student_dtype": torch.bfloat16}, 2),
        ({"student_dtype": torch.float32, "mixed_precision": True}, 2),
        ({"student_dtype": torch.float32}, 4),
        ({"student_dtype": torch.float16}, 4),
        ({"student_dtype": torch.float32, "mixed_precision": True, "fp16": True}, 4),
    ],
)
def test_the_workspace_on_a_gpu_is_the_larger_one_of_kernel_and_analytic_gradients(options, bytes_of_gradient):
    """The kernel writes the gradient into a separate buffer, also where its dtype is that of the logits."""
    vocab = 49152
    temporaries = 11 * (2**26 // (4 * vocab)) * 4 * vocab
    for tokens in (4096, 2**20):
        workload = replace(workload_of(model_config(SMALL), **options), batch=1, length=2**20, chunk_tokens=tokens)
        gradient = tokens * vocab * bytes_of_gradient
        analytic = temporaries + (gradient if bytes_of_gradient == 2 else 0)
        assert workspace_bytes(workload) == tokens * 8 * vocab + max(gradient, analytic)


def test_no_divergence_takes_more_temporaries_than_the_fused_loss_reserves():
    from hf_distill.core.logits import LazyLogits
    from hf_distill.core.targets import Targets
    from hf_distill.losses import LOSSES, fused, fused_buffers
    from hf_distill.losses.objective import objective

    labels = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = Targets.from_batch({"labels": labels}, shift=True)
    hidden, weight = torch.randn(len(targets), 8, requires_grad=True), torch.randn(97, 8, requires_grad=True)
    max_temporaries = 0
    for name in (name for name, loss in LOSSES.items() if "logits" in loss.compares and loss.gradient_fn):
        teacher_logits = LazyLogits(torch.randn(len(targets), 8), torch.randn(97, 8))
        head = fused.ChunkedLoss(teacher_logits, targets, objective(0.5, 2.0, name, ()), statistics_every=1)
        head.from_hidden(LazyLogits(hidden, weight))
        max_temporaries = max(max_temporaries, len(head._buffer_pool._buffers))
    assert max_temporaries == fused_buffers.MAX_TEMPORARIES


def test_the_head_on_a_gpu_has_the_bytes_that_the_fused_loss_allocates():
    problem = Problem(vocab=128256, hidden=4096, teacher_hidden=8192, divergence="js", statistics_every=1, tokens=2048)
    config = model_config("meta-llama/Llama-3.1-8B")
    teacher = ModelStats.of(model_config("meta-llama/Llama-3.1-70B"))
    workload = replace(workload_of(config, student_dtype=torch.bfloat16), teacher=teacher, batch=1, length=2048)
    planned = head_gradient_bytes(workload, Strategy("full", "single")) + workspace_bytes(workload)
    states = 2 * 2048 * (4096 + 8192)  # hidden states of both models, which are made before the loss
    unused = 2 * 2048 * 4096 + 2 * 128256 * 4096  # gradients in bf16, which are made after the chunks
    measured = problem.measure()[0].peak_bytes
    assert measured == pytest.approx(planned - states - unused, rel=0.02)


def test_features_have_the_bytes_that_are_captured():
    from hf_distill.core.signals import FeatureKey
    from hf_distill.core.targets import Targets
    from hf_distill.models.feature_capture import capture_features

    student, teacher = build("llama", 0), build("llama", 1, layers=3, width=48)
    ids = torch.ones(2, 16, dtype=torch.long)
    targets = Targets.from_batch({"input_ids": ids, "labels": ids}, shift=False)
    total = 0
    for model, layers in ((student, (0, 1)), (teacher, (0, 2))):
        with capture_features(model, {FeatureKey("hidden", i): targets for i in layers}) as features:
            model(input_ids=ids)
        total += bytes_of(features.values())
    captured = 2 * 32 + 2 * 48
    workload = Workload(ModelStats.of(student.config), ModelStats.of(teacher.config), 2, 16, captured=captured)
    assert estimate_memory(workload, Strategy("full", "single"), 1).features == total


def test_only_losses_on_features_capture_features():
    loss = "{name: hidden_cosine, layers: 'last:4'}"
    configs = [model_config(f"meta-llama/Llama-3.1-{size}") for size in ("8B", "70B")]
    with_features, without = (make_workload(recipe(*losses), *configs) for losses in ([f"losses=[{loss}]"], []))
    assert estimate_memory(with_features, Strategy("nf4", "single"), 1).features == 2 * 2048 * 2 * 4 * (4096 + 8192)
    assert without.captured == 0
