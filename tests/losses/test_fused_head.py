"""The fused loss against autograd on materialized logits."""

import pytest
import torch
import torch.nn.functional as F

from hf_distill import DistillError
from hf_distill.core.logits import DenseLogits, LazyLogits, LogitScaling, SparseLogProbs
from hf_distill.core.targets import Targets
from hf_distill.head import fused_distillation_loss
from hf_distill.losses import LOSSES, loss
from hf_distill.losses.alignment import align
from hf_distill.losses.fused import ChunkedLoss
from hf_distill.losses.objective import objective
from hf_distill.losses.token_metrics import PAIR_METRICS, STUDENT_METRICS

DIVERGENCES = [name for name, item in LOSSES.items() if "logits" in item.compares and item.fits("distribution")]
N = 37


def inputs(v_student=50, v_teacher=50, dtype=torch.float64, bias=False, seed=0):
    """Student hidden states, weight and bias; teacher hidden states and weight; labels, every third one -100."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, grad=False):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)

    labels = torch.randint(0, min(v_student, v_teacher), (N,), generator=g)
    labels[::3] = -100
    student = randn(N, 8, grad=True), randn(v_student, 8, grad=True), randn(v_student, grad=True) if bias else None
    return (*student, randn(N, 12), randn(v_teacher, 12), labels)


def naive_loss(
    hs, ws, bs, ht, wt, labels, divergence="forward_kl", temperature=1.0, alpha=1.0, scalings=(None, None), **o
):
    s, t = hs @ ws.t(), ht @ wt.t()
    s = s if bs is None else s + bs
    s, t = (x if f is None else f(x) for x, f in zip((s, t), scalings, strict=True))
    m = labels != -100
    soft = LOSSES[divergence].function(s[m], t[m], temperature=temperature, **o)
    return (alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(s[m], labels[m], reduction="none")).mean()


def gradients(value, tensors):
    return torch.autograd.grad(value, [t for t in tensors if t is not None])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocabularies", [(50, 50), (50, 53), (53, 50)])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (2.0, 0.3)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_loss_and_gradients_are_those_of_autograd_on_materialized_logits(
    divergence, vocabularies, temperature, alpha, dtype, close
):
    hs, ws, bs, ht, wt, labels = inputs(*vocabularies, dtype=dtype, bias=True)
    options = dict(divergence=divergence, temperature=temperature, alpha=alpha)
    got = fused_distillation_loss(hs, ws, ht, wt, labels, **options, student_bias=bs, chunk_tokens=7)
    expected = naive_loss(hs, ws, bs, ht, wt, labels, **options)
    torch.testing.assert_close(got, expected, rtol=close, atol=close)
    for a, b in zip(gradients(got, (hs, ws, bs)), gradients(expected, (hs, ws, bs)), strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close)


class RerunInBackward(torch.autograd.Function):
    """Runs the function again in each backward: gradcheck needs several, and the fused loss allows one."""

    @staticmethod
    def forward(ctx, function, *tensors):
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors).detach()

    @staticmethod
    def backward(ctx, grad_value):
        tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            return None, *torch.autograd.grad(ctx.function(*tensors), tensors, grad_value)


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "adaptive_kl"])
def test_gradcheck(divergence):
    hs, ws, bs, ht, wt, labels = inputs(9, 9, bias=True)
    first = slice(0, 4)

    def value(h, w, b):
        return fused_distillation_loss(
            h[first], w, ht[first], wt, labels[first], divergence=divergence, temperature=2.0, alpha=0.5, student_bias=b
        )

    assert torch.autograd.gradcheck(lambda *tensors: RerunInBackward.apply(value, *tensors), (hs, ws, bs))


@pytest.mark.parametrize("chunk", [1, 7, 64, N, None])
def test_the_chunk_size_does_not_change_loss_and_gradients(chunk):
    hs, ws, _, ht, wt, labels = inputs(dtype=torch.float32)
    got = fused_distillation_loss(hs, ws, ht, wt, labels, alpha=0.5, chunk_tokens=chunk)
    unchunked = fused_distillation_loss(hs, ws, ht, wt, labels, alpha=0.5, chunk_tokens=1000)
    torch.testing.assert_close(got, unchunked, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients(got, (hs, ws)), gradients(unchunked, (hs, ws)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_tied_weights_get_the_gradients_of_embedding_and_head():
    _hs, ws, _, ht, wt, labels = inputs()
    ids = torch.arange(N) % 50
    got = fused_distillation_loss(ws[ids], ws, ht, wt, labels)
    expected = naive_loss(ws[ids], ws, None, ht, wt, labels)
    torch.testing.assert_close(gradients(got, (ws,))[0], gradients(expected, (ws,))[0])


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_do():
    hs, ws, _, ht, wt, labels = inputs()
    ws = ws.detach()
    got = fused_distillation_loss(hs, ws, ht, wt, labels)
    expected = naive_loss(hs, ws, None, ht, wt, labels)
    torch.testing.assert_close(gradients(got, (hs,))[0], gradients(expected, (hs,))[0])
    assert ws.grad is None


@pytest.mark.parametrize(
    ("scaling", "function"),
    [
        (LogitScaling(scale=0.25), lambda z: 0.25 * z),
        (LogitScaling(softcap=3.0), lambda z: 3 * torch.tanh(z / 3)),
        (LogitScaling(scale=2.0, softcap=5.0), lambda z: 5 * torch.tanh(2 * z / 5)),
    ],
)
def test_scale_and_softcap_of_both_models_are_applied(scaling, function):
    hs, ws, bs, ht, wt, labels = inputs(bias=True)
    got = fused_distillation_loss(
        hs, ws, ht, wt, labels, alpha=0.5, student_bias=bs, student_scaling=scaling, teacher_scaling=scaling
    )
    expected = naive_loss(hs, ws, bs, ht, wt, labels, alpha=0.5, scalings=(function, function))
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(got, (hs, ws, bs)), gradients(expected, (hs, ws, bs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js", "skew_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("chunk", [1, 64, None])
def test_bf16_models_have_the_exact_loss_and_gradients_up_to_rounding(divergence, chunk):
    hs, ws, _, ht, wt, labels = inputs(dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (hs, ws, ht, wt)]
    got = fused_distillation_loss(hs, ws, ht, wt, labels, divergence=divergence, chunk_tokens=chunk)
    expected = fused_distillation_loss(*exact, labels, divergence=divergence)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(gradients(got, (hs, ws)), gradients(expected, exact[:2]), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() / b.norm() < 0.0024


def sum_loss(terms, teacher, labels, **options):
    """A ChunkedLoss that returns the sum over target tokens."""
    targets = Targets.from_batch({"labels": labels}, shift=False)
    return ChunkedLoss(teacher, targets, terms, num_items=1, **options)


def student_logits(hs, ws, labels):
    return LazyLogits(hs[labels != -100], ws)


def test_a_custom_loss_needs_no_analytic_gradient():
    @loss("squared", compares=("logits",))
    def squared(student, teacher, targets=None, *, temperature: float = 1.0):
        s, t = align(student, teacher, temperature)
        return (s.exp() - t.exp()).pow(2).sum(-1)

    hs, ws, _, ht, wt, labels = inputs()
    got = fused_distillation_loss(hs, ws, ht, wt, labels, divergence="squared", temperature=2.0, chunk_tokens=5)
    expected = naive_loss(hs, ws, None, ht, wt, labels, divergence="squared", temperature=2.0)
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(got, (hs, ws)), gradients(expected, (hs, ws)), strict=True):
        torch.testing.assert_close(a, b)


def test_several_terms_are_summed_with_their_weights():
    hs, ws, _, ht, wt, labels = inputs()
    terms = objective(
        0.3, 2.0, "js", [{"name": "reverse_kl", "weight": 0.7}, {"name": "forward_kl", "temperature": 1.0}]
    )
    student, teacher = student_logits(hs, ws, labels), LazyLogits(ht[labels != -100], wt)
    got = sum_loss(terms, teacher, labels, chunk_tokens=6).from_hidden(student)
    count = (labels != -100).sum()
    expected = count * (
        naive_loss(hs, ws, None, ht, wt, labels, "js", 2.0, 0.3)
        + 0.7 * naive_loss(hs, ws, None, ht, wt, labels, "reverse_kl", 2.0)
        + naive_loss(hs, ws, None, ht, wt, labels, "forward_kl", 1.0)
    )
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(got, (hs, ws)), gradients(expected, (hs, ws)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_sparse_teacher_with_all_ids_has_the_loss_of_a_dense_teacher(divergence):
    hs, ws, _, ht, wt, labels = inputs()
    log_probs, ids = (ht @ wt.t())[labels != -100].log_softmax(-1).sort(-1, descending=True)
    teacher = SparseLogProbs(ids, log_probs, torch.full((len(ids),), -torch.inf, dtype=torch.float64))
    terms = objective(0.5, 1.0, divergence)
    got = sum_loss(terms, teacher, labels, chunk_tokens=6, statistics_every=1).from_hidden(
        student_logits(hs, ws, labels)
    )
    expected = (labels != -100).sum() * naive_loss(hs, ws, None, ht, wt, labels, divergence, 1.0, 0.5)
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(got, (hs, ws)), gradients(expected, (hs, ws)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk", [1, 5, 7, N, None])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocabularies", [(50, 50), (50, 53), (53, 50)])
def test_statistics_are_those_of_every_fourth_target_token_for_any_chunk_size(
    chunk, temperature, vocabularies, monkeypatch
):
    monkeypatch.setattr("hf_distill.losses.fused_buffers.CPU_CACHE_BYTES", 3 * 8 * vocabularies[0])  # blocks of 3 rows
    hs, ws, _, ht, wt, labels = inputs(*vocabularies)
    teacher, terms = LazyLogits(ht[labels != -100], wt), objective(0.5, temperature)
    all_tokens = sum_loss(terms, teacher, labels, statistics_every=1)
    all_tokens.from_hidden(student_logits(hs, ws, labels))
    every_fourth = sum_loss(terms, teacher, labels, statistics_every=4, chunk_tokens=chunk)
    every_fourth.from_hidden(student_logits(hs, ws, labels))
    is_measured = torch.arange(len(every_fourth.targets)) % 4 == 0
    assert torch.equal(every_fourth.per_token["measured"] != 0, is_measured)
    for name in (*STUDENT_METRICS, *PAIR_METRICS):
        expected = all_tokens.per_token[name].where(is_measured, 0)
        torch.testing.assert_close(every_fourth.per_token[name], expected)


def test_materialized_logits_give_the_same_loss_and_are_not_modified():
    hs, ws, _, ht, wt, labels = inputs()
    teacher, is_target = LazyLogits(ht[labels != -100], wt), labels != -100
    logits = (hs @ ws.t())[is_target].detach().requires_grad_()
    before = logits.detach().clone()
    got = sum_loss(objective(0.5, 2.0), teacher, labels).from_logits(DenseLogits(logits))
    expected = is_target.sum() * naive_loss(hs, ws, None, ht, wt, labels, temperature=2.0, alpha=0.5)
    torch.testing.assert_close(got, expected)
    grad_logits = gradients(got, (logits,))[0]
    torch.testing.assert_close(grad_logits.t() @ hs[is_target], gradients(expected, (ws,))[0])
    assert torch.equal(logits.detach(), before)


def test_no_gradient_is_computed_under_no_grad(monkeypatch):
    hs, ws, _, ht, wt, labels = inputs()
    monkeypatch.setattr("hf_distill.losses.fused._write_gradient", lambda *a: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        value = fused_distillation_loss(hs, ws, ht, wt, labels)
    assert not value.requires_grad


def test_a_loss_used_twice_is_two_terms():
    hs, ws, _, ht, wt, labels = inputs()
    twice = [{"name": "js", "weight": 0.5, "beta": 0.2}, {"name": "js", "weight": 2.0, "beta": 0.7}]
    teacher = LazyLogits(ht[labels != -100], wt)
    pair = sum_loss(objective(0.0, 1.0, losses=twice), teacher, labels)
    got = pair.from_hidden(student_logits(hs, ws, labels))
    options = {"divergence": "js"}
    expected = (labels != -100).sum() * (
        naive_loss(hs, ws, None, ht, wt, labels, alpha=0.0)
        + 0.5 * naive_loss(hs, ws, None, ht, wt, labels, **options, beta=0.2)
        + 2.0 * naive_loss(hs, ws, None, ht, wt, labels, **options, beta=0.7)
    )
    torch.testing.assert_close(got, expected)
    assert set(pair.per_token) == {"soft", "hard", "js", "js_2"}


def test_a_batch_without_target_tokens_has_loss_zero_with_a_graph():
    hs, ws, _, ht, wt, labels = inputs()
    value = fused_distillation_loss(hs, ws, ht, wt, torch.full_like(labels, -100))
    assert value.item() == 0
    assert not any(g.any() for g in gradients(value, (hs, ws)))


def test_num_items_is_the_divisor():
    hs, ws, _, ht, wt, labels = inputs()
    mean = fused_distillation_loss(hs, ws, ht, wt, labels)
    num_targets = int((labels != -100).sum())
    torch.testing.assert_close(fused_distillation_loss(hs, ws, ht, wt, labels, num_items=2 * num_targets), mean / 2)


def test_a_second_backward_is_an_error():
    hs, ws, _, ht, wt, labels = inputs()
    value = fused_distillation_loss(hs, ws, ht, wt, labels)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already used by an earlier backward"):
        value.backward()


def test_dense_and_lazy_logits_are_equal():
    _hs, _ws, _, ht, wt, _labels = inputs()
    head = LazyLogits(ht, wt)
    torch.testing.assert_close(head.project(slice(3, 9)), DenseLogits(ht @ wt.t()).project(slice(3, 9)))
    assert head.vocab_size == 50


def change(at, value):
    def make():
        values = list(inputs(dtype=torch.float32))
        values[at] = value(values[at])
        hs, ws, _, ht, wt, labels = values
        return hs, ws, ht, wt, labels

    return make


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (change(0, lambda x: x[:, :4]), {}, r"student_hidden \(37, 4\) and student_weight \(50, 8\) do not fit"),
        (change(3, lambda x: x[None]), {}, "teacher_hidden .* do not fit"),
        (change(5, lambda x: x[:5]), {}, "give one label for each row"),
        (change(5, lambda x: x.clamp(min=60)), {}, r"outside the student's 50 ids \(first: 60\)"),
        (change(4, lambda x: x.to("meta")), {}, "move them to one device"),
        (
            change(0, lambda x: x.detach().index_fill(0, torch.tensor([4]), torch.nan)),
            {},
            "student's .* token 4 is not",
        ),
        (change(3, lambda x: x.index_fill(0, torch.tensor([5]), torch.inf)), {}, "teacher's hidden state of token 5"),
        (change(5, lambda x: x), {"temperature": 0.0}, "temperature is 0.0"),
        (change(5, lambda x: x), {"alpha": 2.0}, "alpha is 2.0"),
        (change(5, lambda x: x), {"divergence": "forward"}, "Unknown loss 'forward'"),
        (change(5, lambda x: x), {"chunk_tokens": 0}, "chunk_tokens is 0"),
        (change(5, lambda x: x), {"student_bias": torch.zeros(3)}, "student_bias"),
    ],
)
def test_inputs_that_do_not_fit_are_named(make, options, message):
    with pytest.raises(DistillError, match=message):
        fused_distillation_loss(*make(), **options)
