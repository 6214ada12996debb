"""The matrix products of the fused loss in bf16, with the products of a GPU emulated on the CPU."""

import pytest
import torch

from hf_distill.core import matmul
from hf_distill.core.logits import LazyLogits, LogitScaling
from hf_distill.head import fused_distillation_loss
from hf_distill.losses import LOSSES

N, V, V_TEACHER, H = 256, 8195, 8200, 128
MAX_HIDDEN_ERROR, MAX_WEIGHT_ERROR = 0.0020, 0.0025  # relative, in norms
DIVERGENCES = [
    name
    for name, item in LOSSES.items()
    if "logits" in item.compares and item.fits("distribution") and name != "adaptive_kl"
]


@pytest.fixture
def half_products(monkeypatch):
    """Emulate a GPU's products: both factors in half precision, the sum in float32. Returns the dtypes of factors."""
    factors = []

    def mm(a, b, out):
        factors.append((a.dtype, b.dtype))
        assert {a.dtype, b.dtype} <= {torch.bfloat16, torch.float16}
        assert out.dtype == torch.float32
        return torch.mm(a.float(), b.float(), out=out)

    def addmm(a, b, out, beta):
        factors.append((a.dtype, b.dtype))
        assert {a.dtype, b.dtype} <= {torch.bfloat16, torch.float16}
        assert out.dtype == torch.float32
        return out.addmm_(a.float(), b.float(), beta=beta)

    monkeypatch.setattr(matmul, "_supports_float32_output", lambda device, dtype: True)
    monkeypatch.setattr(matmul, "_half_mm", mm)
    monkeypatch.setattr(matmul, "_half_addmm", addmm)
    return factors


def inputs(dtype):
    g = torch.Generator().manual_seed(0)

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    labels = torch.randint(0, V, (N,), generator=g)
    labels[::5] = -100
    tensors = randn(N, H), randn(V, H, scale=0.14), randn(V, scale=0.1), randn(N, H), randn(V_TEACHER, H, scale=0.14)
    return [t.requires_grad_(i < 3) for i, t in enumerate(tensors)], labels


def losses_and_gradients(tensors, labels, **options):
    hs, ws, bs, ht, wt = tensors
    for tensor in (hs, ws, bs):
        tensor.grad = None
    loss = fused_distillation_loss(hs, ws, ht, wt, labels, student_bias=bs, **options)
    loss.backward()
    return loss.item(), hs.grad, ws.grad, bs.grad


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (2.0, 0.3)])  # 0.7 is rounded in bf16
def test_gradients_of_bf16_products_are_those_in_float64_up_to_rounding(divergence, temperature, alpha, half_products):
    softcap = 20.0 if (divergence, alpha) == ("js", 0.3) else None
    tensors, labels = inputs(torch.bfloat16)
    options = dict(divergence=divergence, temperature=temperature, alpha=alpha, chunk_tokens=70)
    options |= dict(student_scaling=LogitScaling(softcap=softcap), teacher_scaling=LogitScaling(softcap=softcap))
    loss, hidden, weight, bias = losses_and_gradients(tensors, labels, **options)
    assert set(half_products) == {(torch.bfloat16, torch.bfloat16)}
    assert len(half_products) == 4 * 3  # chunks of the 204 target tokens
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    exact_loss, exact_hidden, exact_weight, exact_bias = losses_and_gradients(exact, labels, **options)
    assert loss == pytest.approx(exact_loss, rel=1e-5)
    assert error(hidden, exact_hidden) <= MAX_HIDDEN_ERROR
    assert error(weight, exact_weight) <= MAX_WEIGHT_ERROR
    assert error(bias, exact_bias) <= MAX_WEIGHT_ERROR


def test_fp16_gradients_with_respect_to_the_logits_stay_in_float32(half_products):
    tensors, labels = inputs(torch.float16)
    _, hidden, weight, _ = losses_and_gradients(tensors, labels, chunk_tokens=70)
    assert len(half_products) == 2 * 3  # the logits of both models
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    _, exact_hidden, exact_weight, _ = losses_and_gradients(exact, labels, chunk_tokens=70)
    assert error(hidden, exact_hidden) <= MAX_HIDDEN_ERROR
    assert error(weight, exact_weight) <= MAX_WEIGHT_ERROR


def test_the_chunk_size_does_not_change_the_gradients_of_bf16_products(half_products):
    tensors, labels = inputs(torch.bfloat16)
    _, *chunked = losses_and_gradients(tensors, labels, chunk_tokens=7)
    _, *unchunked = losses_and_gradients(tensors, labels, chunk_tokens=N)
    for a, b in zip(chunked, unchunked, strict=True):
        torch.testing.assert_close(a, b, rtol=8e-3, atol=1e-9)  # one rounding to bf16


def test_float32_parameters_get_the_gradient_under_autocast_without_rounding_to_bf16():
    (hs, ws, bs, ht, wt), labels = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, hidden, weight, _ = losses_and_gradients((hs, ws, bs, ht, wt), labels)
    rounded = [t.detach().bfloat16().double().requires_grad_(t.requires_grad) for t in (hs, ws, bs, ht, wt)]
    _, exact_hidden, exact_weight, _ = losses_and_gradients(rounded, labels)
    assert hidden.dtype == weight.dtype == torch.float32
    assert error(weight, exact_weight) < 1e-5
    assert 1e-4 < error(hidden, exact_hidden) < MAX_HIDDEN_ERROR  # autocast rounds the gradient of a cast activation


def test_the_head_of_a_float32_model_keeps_its_parameter_under_autocast():
    hidden, weight, bias = torch.randn(3, 8), torch.randn(5, 8, requires_grad=True), torch.randn(5)
    assert LazyLogits.of_head(hidden, weight).master_weight is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lazy = LazyLogits.of_head(hidden, weight, bias)
        half = LazyLogits.of_head(hidden, weight.detach().bfloat16())
        double = LazyLogits.of_head(hidden.double(), weight.detach().double())
    assert lazy.master_weight is weight
    assert {lazy.hidden.dtype, lazy.weight.dtype, lazy.bias.dtype} == {torch.bfloat16}
    assert half.master_weight is None
    assert double.master_weight is None
    assert double.weight.dtype == torch.float64
    assert lazy.detach().master_weight is None
