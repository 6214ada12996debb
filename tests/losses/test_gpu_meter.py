"""The fused loss at full size on a GPU, as `GpuMeter` counts it, and the meter itself."""

from dataclasses import replace

import pytest
import torch
from gpu_meter import GIB, H100, SHAPES, GpuMeter, Problem, meta_as_cuda

from hf_distill.cache.sampling import sample_by_inverse_cdf
from hf_distill.core import matmul


def test_the_meter_counts_kernels_products_bytes_and_peak_memory():
    with meta_as_cuda(), GpuMeter() as meter:
        a = torch.empty(64, 32, dtype=torch.bfloat16, device="meta")
        b = torch.empty(32, 16, dtype=torch.bfloat16, device="meta")
        out = torch.zeros(64, 16, device="meta")  # writes 4 KiB
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        half = out.to(torch.bfloat16)  # reads 4 KiB, writes 2 KiB
        del half, a
        torch.softmax(out, -1)  # reads 4 KiB three times, writes it
    assert dict(meter.launches) == {"zeros": 1, "addmm": 1, "_to_copy": 1, "_softmax": 1}
    (signature,) = meter.products
    assert signature == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert meter.products[signature].flop == 2 * 64 * 32 * 16
    assert meter.elementwise_bytes == (4 + 6 + 16) * 1024
    assert meter.peak_bytes == (4 + 1 + 4 + 2) * 1024  # a, b, out, half
    assert meter.elementwise_seconds == meter.elementwise_bytes / H100.bandwidth


def test_a_number_that_is_read_from_the_device_is_an_error_under_the_meter():
    with meta_as_cuda(), GpuMeter(), pytest.raises(RuntimeError, match="meta"):
        bool(torch.zeros((), device="meta") > 0)


def test_meta_tensors_are_no_cuda_tensors_afterwards():
    before = torch.cuda.mem_get_info, torch.autocast
    with meta_as_cuda(free_gib=2) as calls:
        assert torch.empty(1, device="meta").is_cuda
        assert torch.cuda.mem_get_info()[0] == 2 * 2**30
    assert calls["mem_get_info"] == 1
    assert not torch.empty(1, device="meta").is_cuda
    assert (torch.cuda.mem_get_info, torch.autocast) == before


BF16_TO_FP32 = (torch.bfloat16, torch.bfloat16, torch.float32)
HALF_TO_FP32 = (torch.float16, torch.float16, torch.float32)
FP32 = (torch.float32, torch.float32, torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("divergence", ["forward_kl", "js"])
def test_bf16_models_multiply_no_float32_matrices(shape, divergence):
    problem = replace(SHAPES[shape], divergence=divergence, tokens=2048)
    meter, _ = problem.measure()
    assert set(meter.products) == {BF16_TO_FP32}
    (products,) = meter.products.values()
    assert products.calls == 4 * 2  # four for each chunk of 1024 tokens
    assert products.flop == pytest.approx(problem.floor_seconds() * H100.flops[torch.bfloat16])


def test_a_frozen_head_has_no_product_for_its_weight():
    meter, _ = Problem(tokens=2048, is_frozen=True).measure()
    assert {key: products.calls for key, products in meter.products.items()} == {BF16_TO_FP32: 3 * 2}


def test_a_custom_chunk_and_a_bias_keep_bf16_products():
    meter, _ = Problem(tokens=1000, chunk_tokens=300, vocab=5000, has_bias=True, softcap=30.0).measure()
    assert {key: products.calls for key, products in meter.products.items()} == {BF16_TO_FP32: 4 * 4}


def test_the_gradient_of_fp16_models_stays_in_float32():
    meter, _ = Problem(tokens=2048, vocab=32000, chunk_tokens=2048, dtype=torch.float16).measure()
    assert {key: products.calls for key, products in meter.products.items()} == {HALF_TO_FP32: 2, FP32: 8 + 1}


def test_models_without_products_to_float32_are_converted_and_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    matmul._supports_float32_output.cache_clear()
    try:
        for _ in range(2):
            meter, _ = Problem(tokens=2048, vocab=8192).measure()
    finally:
        matmul._supports_float32_output.cache_clear()
    assert set(meter.products) == {FP32}
    records = [record.message for record in caplog.records if record.name == matmul.__name__]
    assert [message.split(" converts ")[0] for message in records] == ["The fused loss"]
    assert "ROCm" in records[0]


def test_the_free_memory_changes_nothing_and_is_not_read():
    metered = [Problem(tokens=2048).measure(free_gib) for free_gib in (30, 4, 0.5)]
    assert all(calls["mem_get_info"] == 0 for _, calls in metered)
    assert len({(str(meter.launches), str(meter.products), meter.peak_bytes) for meter, _ in metered}) == 1


@pytest.mark.parametrize("vocab", [50257, 151936])
def test_rows_of_logits_and_gradients_are_aligned(vocab, monkeypatch):
    strides = []
    multiply = matmul._half_addmm
    monkeypatch.setattr(matmul, "_half_addmm", lambda a, *rest: strides.append(max(a.stride())) or multiply(a, *rest))
    Problem(tokens=2048, vocab=vocab, hidden=64, teacher_hidden=64).measure()
    assert set(strides) == {-(-vocab // 16) * 16}


@pytest.mark.parametrize("divergence", ["forward_kl", "js"])
def test_the_peak_is_that_of_the_gradients_and_of_one_chunk(divergence):
    problem = Problem(tokens=2048, divergence=divergence)
    assert problem.measure()[0].peak_bytes < 4 * problem.vocab * problem.hidden + 2.5 * GIB


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_no_cumulative_sum_of_floats_runs_with_deterministic_algorithms(is_deterministic):
    """PyTorch has no deterministic one on CUDA, and raises an error."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        adaptive, _ = Problem(tokens=1024, vocab=4096, divergence="adaptive_kl").measure()
        with meta_as_cuda(), GpuMeter() as sampling:
            uniform = torch.empty(8, 16, dtype=torch.float64, device="meta")
            sample_by_inverse_cdf(torch.empty(8, 5000, device="meta"), uniform)
    finally:
        torch.use_deterministic_algorithms(before)
    assert (adaptive.launches["cumsum"] == 0) == (sampling.launches["cumsum"] == 0) == is_deterministic


def trl_products_seconds(problem: Problem) -> float:
    """Lower bound of TRL 1.16's chunked loss: it computes the logits of both models twice for KL, 3 times for JS."""
    flop = 2 * problem.tokens * problem.vocab
    times = 3 if problem.divergence == "js" else 2
    products = times * (problem.hidden + problem.teacher_hidden) + 2 * problem.hidden
    return flop * products / H100.flops[torch.bfloat16]


def liger_seconds(problem: Problem) -> float:
    """Estimate of Liger 0.8.5's chunked losses: four products, and 12 passes over float32 logits of one model."""
    passes = 12 * 4 * problem.tokens * problem.vocab
    return problem.floor_seconds() + passes / H100.bandwidth


# The time that exact gradients need at least is short for a narrow student: 896 hidden dimensions. The passes over the
# logits of 151936 ids then weigh more, and the estimate is 0.01 above the goals of 1.35 and 1.5.
@pytest.mark.parametrize(
    ("shape", "divergence", "most_passes", "most_of_floor"),
    [
        ("8B to 8B", "forward_kl", 7, 1.35),
        ("8B to 8B", "js", 9, 1.5),
        ("70B to 8B", "forward_kl", 7, 1.35),
        ("70B to 8B", "js", 9, 1.5),
        ("7B to 0.5B", "forward_kl", 7, 1.37),
        ("7B to 0.5B", "js", 9, 1.52),
    ],
)
def test_with_the_kernel_the_loss_is_near_the_time_of_its_products(shape, divergence, most_passes, most_of_floor):
    problem = replace(SHAPES[shape], divergence=divergence)
    meter, _ = problem.measure(has_triton=True)
    chunks = meter.launches["row_kernel"]
    assert chunks == problem.tokens // 1024
    assert meter.launches.total() / chunks <= 12
    assert meter.elementwise_bytes / (4 * problem.tokens * problem.vocab) <= most_passes
    assert meter.seconds / problem.floor_seconds() <= most_of_floor
    assert meter.seconds < trl_products_seconds(problem)
    assert meter.seconds < liger_seconds(problem)
    assert meter.peak_bytes < 4 * problem.vocab * problem.hidden + 2.5 * GIB


@pytest.mark.parametrize("divergence", ["forward_kl", "js"])
def test_the_kernel_applies_softcaps_and_a_bias_without_further_passes(divergence):
    plain, _ = Problem(tokens=2048, divergence=divergence).measure(has_triton=True)
    scaled, _ = Problem(tokens=2048, divergence=divergence, has_bias=True, softcap=30.0).measure(has_triton=True)
    gradient_of_bias = 2 * 2048 * 131072  # the sum over tokens reads the bf16 gradient once more
    assert scaled.elementwise_bytes - plain.elementwise_bytes < 1.02 * gradient_of_bias
