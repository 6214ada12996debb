"""Which losses the Triton kernel computes, and what is logged where it computes none."""

import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from gpu_meter import meta_as_cuda

from hf_distill.core.logits import DenseLogits, SparseLogProbs
from hf_distill.core.teacher_logits import MultiTeacherLogits
from hf_distill.losses import LOSSES, kernels, loss
from hf_distill.losses.kernels import selection
from hf_distill.losses.kernels.row_losses import SHARE_OPTIONS, HeadOutput, RowLosses
from hf_distill.losses.kernels.selection import reason_for_eager
from hf_distill.losses.objective import objective

UNPATCHED = selection.triton_problem
LOGITS = DenseLogits(torch.empty(3, 5, device="meta"))


@pytest.fixture(autouse=True)
def gpu_with_triton():
    with meta_as_cuda(), mock.patch.object(selection, "triton_problem", return_value=""):
        yield


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js", "skew_kl", "skew_reverse_kl"])
def test_the_kernel_computes_these_divergences_with_cross_entropy_on_a_gpu(divergence):
    others = [{"name": "js", "weight": 0.1}, {"name": "cross_entropy", "weight": 0.1}]
    terms = objective(0.5, 2.0, divergence, losses=others, label_smoothing=0.1)
    assert reason_for_eager(terms, LOGITS, LOGITS) == ""


@pytest.mark.parametrize("name", ["total_variation", "adaptive_kl", "custom"])
def test_other_losses_are_computed_by_the_analytic_gradients(name, monkeypatch):
    monkeypatch.setattr("hf_distill.losses.registry.LOSSES", dict(LOSSES))
    loss("custom", compares=("logits",))(lambda student, teacher, targets: None)
    terms = objective(0.5, 2.0, losses=[{"name": name, "weight": 0.1}])
    assert reason_for_eager(terms, LOGITS, LOGITS) == f"it does not compute the loss {name}"


def test_a_loss_with_the_name_of_another_is_not_taken_for_it():
    """A registered loss is known by its function."""
    forward_kl = objective(1.0, 1.0)[0]
    other = replace(forward_kl, loss=replace(forward_kl.loss, function=lambda student, teacher, targets: None))
    assert reason_for_eager([other], LOGITS, LOGITS) == "it does not compute the loss forward_kl"


def test_several_teachers_and_sparse_teachers_are_computed_by_the_analytic_gradients():
    terms = objective(0.5, 1.0)
    several = MultiTeacherLogits({"a": LOGITS, "b": LOGITS})
    assert reason_for_eager(terms, LOGITS, several) == "there are several teachers"
    ids = torch.empty(3, 2, dtype=torch.long, device="meta")
    sparse = SparseLogProbs(ids, torch.empty(3, 2, device="meta"), None)
    assert reason_for_eager(terms, LOGITS, sparse) == "the teacher's log-probabilities are sparse"


@pytest.mark.parametrize("name", ["alm", "projected_kl", "uld"])
def test_losses_on_chunks_are_computed_by_the_analytic_gradients(name):
    terms = objective(0.5, 1.0, name)
    assert reason_for_eager(terms, LOGITS, LOGITS) == f"it does not compute the loss {name}"


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_float64_is_not_rounded_to_float32(who):
    double = DenseLogits(torch.empty(3, 5, dtype=torch.float64, device="meta"))
    pair = (double, LOGITS) if who == "student" else (LOGITS, double)
    assert reason_for_eager(objective(0.5, 1.0), *pair) == "the logits are float64"


def test_rocm_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert reason_for_eager(objective(0.5, 1.0), LOGITS, LOGITS) == "it was not tested on ROCm"


@pytest.mark.parametrize(
    ("is_installed", "reason"),
    [
        (False, "Triton is not installed"),
        (True, "a first kernel of Triton failed with RuntimeError: Failed to find C compiler."),
    ],
)
def test_a_triton_that_is_missing_or_does_not_work_is_a_reason_and_no_error(is_installed, reason, monkeypatch):
    """Triton needs a C compiler, which an image for production may lack."""
    broken = mock.MagicMock()
    broken.write_one.__getitem__.return_value.side_effect = RuntimeError("Failed to find C compiler.")
    monkeypatch.setitem(sys.modules, "hf_distill.losses.kernels.row_kernel", broken)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if is_installed else None)
    monkeypatch.setattr(selection, "triton_problem", UNPATCHED.__wrapped__)
    assert reason_for_eager(objective(0.5, 1.0), LOGITS, LOGITS) == reason


def test_a_cpu_needs_no_kernel_and_logs_nothing(caplog, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    on_cpu = DenseLogits(torch.zeros(3, 5))
    assert not selection.uses_row_kernel(objective(0.5, 1.0), on_cpu, on_cpu)
    assert caplog.text == ""


def test_the_eager_path_on_a_gpu_is_logged_once_with_its_reason_and_cost(caplog):
    for _ in range(2):
        assert not selection.uses_row_kernel(objective(0.5, 1.0, "total_variation"), LOGITS, LOGITS)
    (record,) = caplog.records
    assert record.message.startswith(
        "The Triton kernel is not used, because it does not compute the loss total_variation."
    )
    assert "once for each operation on them, which takes longer; `python benchmarks/gpu.py" in record.message


def test_only_labels_and_statistics_of_the_student_need_no_teacher():
    terms = [term for term in objective(0.0, 1.0) if term.weight]
    assert reason_for_eager(terms, LOGITS, None) == ""
    assert RowLosses(terms, False, 4).names == ["hard", "measured", "student_ce", "student_entropy", "accuracy"]


def test_the_kernel_gets_contiguous_labels_of_every_nth_token(monkeypatch):
    """It reads label i at `labels_ptr + i`; the self-check samples every n-th token, which is a view with a stride."""
    kinds = SimpleNamespace(**{each.__name__.upper(): SimpleNamespace(value=0) for each in SHARE_OPTIONS})
    monkeypatch.setitem(sys.modules, "hf_distill.losses.kernels.row_kernel", kinds)
    monkeypatch.setattr(kernels, "row_kernel", kinds, raising=False)
    labels, mask = torch.arange(12)[::3], (torch.arange(12) % 2 == 0)[::3]
    outputs = [HeadOutput(torch.randn(4, 32)), HeadOutput(torch.randn(4, 32))]
    losses = RowLosses(objective(0.5, 2.0), has_teacher=True)
    arguments = losses.arguments(outputs, labels, mask, torch.zeros(2, 4), torch.zeros(4, 32))
    for name, value in (("labels_ptr", labels), ("has_label_ptr", mask)):
        assert arguments[name].is_contiguous()
        assert torch.equal(arguments[name], value)
