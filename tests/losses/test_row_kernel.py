"""The Triton kernel against autograd in float64. `make test-triton` runs it in Triton's interpreter, on a GPU it runs
compiled."""

import importlib.util
import os
import subprocess
import sys
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from hf_distill.core.logits import DenseLogits, LazyLogits, LogitScaling
from hf_distill.core.targets import Targets
from hf_distill.losses import LOSSES
from hf_distill.losses.analytic_gradients import BlockLogits, BufferPool
from hf_distill.losses.fused import ChunkedLoss
from hf_distill.losses.kernels import selection
from hf_distill.losses.kernels.row_losses import HeadOutput, RowLosses
from hf_distill.losses.objective import objective
from hf_distill.losses.token_metrics import token_metrics

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed (run `make test-triton`)"
    ),
    pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
        reason="Triton needs a GPU, or TRITON_INTERPRET=1 (run `make test-triton`)",
    ),
]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DIVERGENCES = ["forward_kl", "reverse_kl", "js", "skew_kl", "skew_reverse_kl"]
ROWS = 3
CLOSE = dict(rtol=5e-6, atol=1e-5)


def logits(v_student=1003, v_teacher=1003, rows=ROWS, seed=0, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    z, y = torch.randn(rows, v_student, generator=g) * scale, torch.randn(rows, v_teacher, generator=g) * scale
    return z.to(DEVICE), y.to(DEVICE), torch.randint(0, min(v_student, v_teacher), (rows,), generator=g).to(DEVICE)


def run(terms, student, teacher, labels, mask=None, dtype=torch.float32, needs_gradient=True, first_token=0, **options):
    """Name -> losses and statistics, and the gradient; NaN wherever the kernel did not write."""
    student = student if isinstance(student, HeadOutput) else HeadOutput(student)
    teacher = HeadOutput(teacher) if isinstance(teacher, torch.Tensor) else teacher
    losses = RowLosses(terms, teacher is not None, **options)
    out = torch.full((len(losses.names), len(labels)), torch.nan, device=DEVICE)
    gradient = torch.full(student.values.shape, torch.nan, dtype=dtype, device=DEVICE) if needs_gradient else None
    outputs = [student] if teacher is None else [student, teacher]
    losses.run(outputs, labels, mask, out, gradient, first_token)
    return dict(zip(losses.names, out, strict=True)), gradient


def expected(terms, student, teacher, labels, mask=None):
    """Name -> losses, and the gradient by the head's output, by autograd in float64."""
    student = student if isinstance(student, HeadOutput) else HeadOutput(student)
    teacher = HeadOutput(teacher) if isinstance(teacher, torch.Tensor) else teacher
    output = student.values.double().requires_grad_()
    z, y = scaled(output, student), None if teacher is None else scaled(teacher.values.double(), teacher)
    losses = {}
    for term in terms:
        temperature = term.options.get("temperature", 1.0)
        if term.loss.compares:
            losses[term.name] = temperature**2 * term.loss.function(z, y, **term.options)
        else:
            losses[term.name] = F.cross_entropy(z, labels, reduction="none", **term.options)
            losses[term.name] = losses[term.name] * (1 if mask is None else mask)
    total = sum(term.weight * losses[term.name].sum() for term in terms if term.weight)
    return losses, torch.autograd.grad(total, output)[0]


def scaled(output, head):
    z = output if head.bias is None else output + head.bias.double()
    z = z * head.scaling.scale
    cap = head.scaling.softcap
    return z if cap is None else cap * torch.tanh(z / cap)


def assert_equals_reference(terms, student, teacher, labels, mask=None, relative_error=1e-5, **options):
    per_token, gradient = run(terms, student, teacher, labels, mask, **options)
    losses, expected_gradient = expected(terms, student, teacher, labels, mask)
    for name, values in losses.items():
        torch.testing.assert_close(per_token[name].double(), values, **CLOSE)
    error = (gradient.double() - expected_gradient).norm(dim=1) / expected_gradient.norm(dim=1)
    assert error.nan_to_num(0).max() < relative_error, error
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocabularies", [(1003, 1003), (1100, 1027), (1027, 1100)])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (2.0, 0.3), (0.5, 0.9)])
def test_losses_and_gradient_are_those_of_autograd(divergence, vocabularies, temperature, alpha):
    assert_equals_reference(objective(alpha, temperature, divergence), *logits(*vocabularies))


@pytest.mark.parametrize("option", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("divergence", ["js", "skew_kl", "skew_reverse_kl"])
def test_the_share_of_the_mixture_is_that_of_the_option(divergence, option):
    spec = {"name": divergence, "beta" if divergence == "js" else "lam": option}
    assert_equals_reference(objective(1.0, 1.5, spec), *logits())


def test_only_cross_entropy_needs_no_teacher():
    z, _, labels = logits()
    terms = [term for term in objective(0.0, 1.0, label_smoothing=0.1) if term.weight]
    assert_equals_reference(terms, z, None, labels)


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_several_terms_with_different_temperatures_and_smoothings_are_added(weight):
    others = [
        {"name": "reverse_kl", "weight": weight, "temperature": 3.0},
        {"name": "js", "weight": 0.25, "beta": 0.3},
        {"name": "cross_entropy", "weight": 0.2},
    ]
    assert_equals_reference(objective(0.4, 2.0, "forward_kl", losses=others, label_smoothing=0.2), *logits(1100, 1027))


@pytest.mark.parametrize("scaling", [LogitScaling(0.25), LogitScaling(softcap=3.0), LogitScaling(2.0, 5.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_scale_and_softcap_of_both_heads_are_applied(scaling, dtype):
    z, y, labels = logits(1100, 1027)
    student = HeadOutput(z, torch.randn(1100, device=DEVICE).to(dtype), scaling)
    teacher = HeadOutput(y, torch.randn(1027, device=DEVICE).to(dtype), LogitScaling(1.5, scaling.softcap))
    assert_equals_reference(objective(0.5, 2.0, "js", label_smoothing=0.1), student, teacher, labels)


def test_large_logits_do_not_overflow_the_softcap():
    z, y, labels = logits(scale=400.0)
    scaling = LogitScaling(softcap=30.0)
    per_token, gradient = run(objective(0.5, 1.0), HeadOutput(z, None, scaling), HeadOutput(y, None, scaling), labels)
    losses, expected_gradient = expected(
        objective(0.5, 1.0), HeadOutput(z, None, scaling), HeadOutput(y, None, scaling), labels
    )
    torch.testing.assert_close(per_token["soft"].double(), losses["soft"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)


def test_tokens_without_a_label_have_no_cross_entropy():
    mask = torch.tensor([True, False, True], device=DEVICE)
    assert_equals_reference(objective(0.3, 2.0, label_smoothing=0.1), *logits(), mask)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("masked_ids", [slice(0, 1030), slice(5, None, 2), slice(1050, None)])
def test_ids_that_both_models_mask_add_nothing(divergence, masked_ids):
    z, y, _ = logits(1100, 1100)
    z[:, masked_ids] = y[:, masked_ids] = -torch.inf
    labels = z.argmax(-1)
    terms = objective(0.3, 2.0, divergence)
    per_token, gradient = run(terms, z, y, labels, may_be_masked=True)
    kept = torch.ones(1100, dtype=torch.bool)
    kept[masked_ids] = False
    renumbered = (torch.cumsum(kept.to(DEVICE), 0) - 1)[labels]
    losses, expected_gradient = expected(terms, z[:, kept], y[:, kept], renumbered)
    for name, values in losses.items():
        torch.testing.assert_close(per_token[name].double(), values, **CLOSE)
    torch.testing.assert_close(gradient[:, kept].double(), expected_gradient, **CLOSE)
    assert (gradient[:, masked_ids] == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_ids_that_one_model_masks_give_the_values_of_the_eager_loss(divergence, who):
    z, y, _ = logits(1100, 1100)
    (z if who == "student" else y)[:, 100:1060] = -torch.inf
    labels = z.argmax(-1)
    terms = objective(1.0, 1.0, divergence)[:1]
    per_token, gradient = run(terms, z, y, labels, statistics_every=1, may_be_masked=True)
    pair = BlockLogits(z.double(), None, labels, BufferPool(), True).with_teacher(y.double())
    values, expected_gradient = LOSSES[divergence].gradient_fn(pair, temperature=1.0)
    torch.testing.assert_close(per_token["soft"].double(), values, **CLOSE)
    if torch.isfinite(values).all():
        torch.testing.assert_close(gradient.double(), expected_gradient, **CLOSE)
    student_only = BlockLogits(z.double(), None, labels, BufferPool(), True)
    for name, values in token_metrics(student_only, student_only.with_teacher(y.double())).items():
        torch.testing.assert_close(per_token[name].double(), values, **CLOSE)


@pytest.mark.parametrize("vocabularies", [(1100, 1100), (1100, 1027), (1027, 1100), (5, 5)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_statistics_of_measured_tokens_are_those_of_the_eager_loss(vocabularies, temperature):
    z, y, labels = logits(*vocabularies, rows=7)
    z[3, labels[3]] = 50.0  # an accurate prediction
    y[3, labels[3]] = 50.0
    if vocabularies == (1027, 1100):
        y[6, 1099] = 50.0  # the teacher's first choice is no id of the student
    if vocabularies == (1100, 1027):
        labels[0] = 1099  # the label is no id of the teacher
    per_token, _ = run(objective(0.5, temperature), z, y, labels, statistics_every=3, first_token=3)
    student_only = BlockLogits(z.double(), None, labels, BufferPool())
    metrics = token_metrics(student_only, student_only.with_teacher(y.double()))
    assert metrics["accuracy"][3] == metrics["agreement"][3] == 1
    measured = torch.tensor([True, False, False, True, False, False, True], device=DEVICE)
    for name, values in metrics.items():
        torch.testing.assert_close(per_token[name][measured].double(), values[measured], **CLOSE)
        assert per_token[name][~measured].isnan().all(), "a token that is not measured keeps its value"


def test_statistics_without_a_teacher():
    z, _, labels = logits()
    terms = [term for term in objective(0.0, 1.0) if term.weight]
    per_token, _ = run(terms, z, None, labels, statistics_every=1)
    metrics = token_metrics(BlockLogits(z.double(), None, labels, BufferPool()), None)
    assert list(per_token) == ["hard", *metrics]
    for name, values in metrics.items():
        torch.testing.assert_close(per_token[name].double(), values, **CLOSE)


@pytest.mark.parametrize(("v_student", "v_teacher"), [(1003, 1003), (1003, 1100), (1100, 1003), (50, 50), (3, 3)])
def test_padded_rows_change_nothing_and_rows_stay_inside_their_padding(v_student, v_teacher):
    z, y, labels = logits(v_student, v_teacher)
    width = 64 * 18
    padded = [torch.full((ROWS, width), torch.nan, device=DEVICE) for _ in range(3)]
    padded[0][:, :v_student], padded[1][:, :v_teacher] = z, y
    terms = objective(0.5, 2.0, "js")
    losses = RowLosses(terms, True, 1)
    out = torch.full((len(losses.names), ROWS), torch.nan, device=DEVICE)
    student, teacher = HeadOutput(padded[0][:, :v_student]), HeadOutput(padded[1][:, :v_teacher])
    losses.run([student, teacher], labels, None, out, padded[2][:, :v_student])
    per_token, gradient = run(terms, z, y, labels, statistics_every=1)
    assert torch.equal(padded[2][:, :v_student], gradient)
    assert torch.equal(out, torch.stack(list(per_token.values())))
    assert padded[2][:, -(-v_student // 16) * 16 :].isnan().all()


@pytest.mark.parametrize("rows", [0, 1])
def test_zero_rows_and_a_single_row(rows):
    z, y, labels = logits(rows=rows)
    per_token, gradient = run(objective(0.5, 2.0), z, y, labels, statistics_every=1)
    assert per_token["soft"].shape == (rows,)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_lower_precision_are_read_as_float32(dtype):
    z, y, labels = logits()
    assert_equals_reference(objective(0.5, 2.0), z.to(dtype), y.to(dtype), labels)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_bfloat16_gradient_is_the_rounded_float32_gradient(divergence):
    inputs = logits()
    _, exact = run(objective(0.5, 2.0, divergence), *inputs)
    _, rounded = run(objective(0.5, 2.0, divergence), *inputs, dtype=torch.bfloat16)
    if DEVICE == "cpu":  # the interpreter cuts the last bits of a float32 off
        torch.testing.assert_close(rounded.float(), exact, rtol=2**-7, atol=1e-30)
    else:
        assert torch.equal(rounded, exact.to(torch.bfloat16))


def test_without_a_gradient_the_losses_are_the_same():
    inputs = logits()
    per_token, _ = run(objective(0.5, 2.0, "js"), *inputs)
    evaluated, gradient = run(objective(0.5, 2.0, "js"), *inputs, needs_gradient=False)
    assert gradient is None
    assert all(torch.equal(evaluated[name], values) for name, values in per_token.items())


def test_the_factor_scales_the_gradient_and_not_the_losses():
    inputs = logits()
    per_token, gradient = run(objective(0.5, 2.0), *inputs)
    same, scaled_gradient = run(objective(0.5, 2.0), *inputs, factor=0.125)
    assert all(torch.equal(same[name], values) for name, values in per_token.items())
    torch.testing.assert_close(scaled_gradient, gradient / 8, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_spoils_its_own_row_only(bad):
    z, y, labels = logits()
    z[1, 500] = bad
    per_token, gradient = run(objective(0.5, 2.0), z, y, labels)
    for values in (per_token["soft"], per_token["hard"], gradient.sum(1)):
        assert torch.isfinite(values).tolist() == [True, False, True]


def test_triton_works_here():
    assert selection.triton_problem(torch.device(DEVICE)) == ""


def test_the_kernel_starts_on_the_device_of_the_logits(monkeypatch):
    """Triton starts kernels on the current device, which may be another one."""
    entered = []

    @contextmanager
    def device_of(tensor):
        entered.append(tensor.device)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    inputs = logits()
    run(objective(0.5, 2.0), *inputs)
    assert entered == [inputs[0].device]


def test_the_inputs_are_not_written():
    z, y, labels = logits()
    copies = z.clone(), y.clone(), labels.clone()
    run(objective(0.5, 2.0, "js"), z, y, labels, statistics_every=1)
    assert all(torch.equal(a, b) for a, b in zip((z, y, labels), copies, strict=True))


COMPILE = """
import re, sys, torch, triton
from triton.backends.compiler import GPUTarget
from hf_distill.core.logits import LogitScaling
from hf_distill.losses.kernels.row_kernel import losses_and_gradient
from hf_distill.losses.kernels.row_losses import HeadOutput, RowLosses
from hf_distill.losses.objective import objective

class NoDevice:
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", CAPABILITY, 32)

triton.runtime.driver.set_active(NoDevice())
for CAPABILITY in (80, 90, 100):
    for divergence, scaling in (("forward_kl", LogitScaling()), ("js", LogitScaling(1.0, 30.0))):
        empty = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="meta")
        output = HeadOutput(empty(8, 50304)[:, :50257], None, scaling)
        gradient = empty(8, 50304, dtype=torch.bfloat16)[:, :50257]
        kernels = set()
        for every, tokens, first in ((4, 16, 0), (1, 17, 1), (3, 1, 3)):
            losses = RowLosses(objective(0.5, 2.0, divergence), True, every)
            out = empty(10, tokens)[:, :8]
            arguments = losses.arguments([output, output], empty(8, dtype=torch.long), None, out, gradient, first)
            kernel = losses_and_gradient.warmup(**arguments, grid=(8,))
            kernels.add(kernel.hash)
        ptx = kernel.asm["ptx"]
        loads = re.findall(r"cp.async.cg.shared.global .*, 0x10", ptx)
        print(len(loads), "cvt.rn.bf16" in ptx, ".f64" in ptx, kernel.metadata.shared, len(kernels))
"""


def test_the_kernel_compiles_for_gpus_without_one_and_loads_16_bytes_of_padded_rows(tmp_path):
    """Triton compiles without a GPU. In its interpreter, types and layouts of the compiled kernel are not seen."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    script = tmp_path / "compile_kernel.py"
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 6
    for loads_of_16_bytes, rounds_to_nearest, has_float64, shared_bytes, number in lines:
        assert number == "1", "the lengths of batches and chunks need no further kernels"
        assert int(loads_of_16_bytes) > 0
        assert rounds_to_nearest == "True"
        assert has_float64 == "False"
        assert int(shared_bytes) < 48 * 2**10


@pytest.mark.parametrize("divergence", ["forward_kl", "js"])
@pytest.mark.parametrize("is_lazy", [True, False])
def test_the_chunked_loss_is_the_same_with_the_kernel_and_without(divergence, is_lazy):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=g).to(DEVICE) for shape in [(37, 8), (50, 8), (50,)])
    teacher = LazyLogits(torch.randn(37, 12, generator=g).to(DEVICE), torch.randn(53, 12, generator=g).to(DEVICE))
    labels, positions = torch.randint(0, 50, (37,), generator=g).to(DEVICE), torch.arange(37, device=DEVICE)
    targets = Targets(labels, positions, positions, torch.Size((37,)), positions % 3 > 0)
    results = []
    for has_triton in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        loss = ChunkedLoss(teacher, targets, objective(0.4, 2.0, divergence), 3, 10, 41)
        with (
            mock.patch.object(selection, "triton_problem", return_value="" if has_triton else "none"),
            mock.patch.object(RowLosses, "run", autospec=True, side_effect=RowLosses.run) as launches,
        ):
            if is_lazy:
                value = loss.from_hidden(LazyLogits(*leaves))
            else:
                value = loss.from_logits(DenseLogits(torch.addmm(leaves[2], leaves[0], leaves[1].t())))
        assert launches.call_count == (4 if has_triton else 0)
        results.append((value, *torch.autograd.grad(value, leaves), *loss.per_token.values()))
        names = list(loss.per_token)
    assert names[:3] == ["soft", "hard", "measured"]
    for with_kernel, without in zip(*results, strict=True):
        torch.testing.assert_close(with_kernel, without, **CLOSE)
