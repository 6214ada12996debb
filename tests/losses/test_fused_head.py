"""The fused head against dense autograd."""

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

DIVERGENCES = [name for name, item in LOSSES.items() if "logits" in item.needs]
N = 37


def inputs(v_student=50, v_teacher=50, dtype=torch.float64, bias=False, seed=0):
    """student hidden, weight, bias; teacher hidden, weight; labels with a third not asked."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, grad=False):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)

    labels = torch.randint(0, min(v_student, v_teacher), (N,), generator=g)
    labels[::3] = -100
    student = randn(N, 8, grad=True), randn(v_student, 8, grad=True), randn(v_student, grad=True) if bias else None
    return (*student, randn(N, 12), randn(v_teacher, 12), labels)


def dense(hs, ws, bs, ht, wt, labels, divergence="forward_kl", temperature=1.0, alpha=1.0, scalings=(None, None), **o):
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
def test_value_and_gradients_are_those_of_dense_autograd(divergence, vocabularies, temperature, alpha, dtype, close):
    hs, ws, bs, ht, wt, labels = inputs(*vocabularies, dtype=dtype, bias=True)
    options = dict(divergence=divergence, temperature=temperature, alpha=alpha)
    got = fused_distillation_loss(hs, ws, ht, wt, labels, **options, student_bias=bs, chunk_tokens=7)
    expected = dense(hs, ws, bs, ht, wt, labels, **options)
    torch.testing.assert_close(got, expected, rtol=close, atol=close)
    for a, b in zip(gradients(got, (hs, ws, bs)), gradients(expected, (hs, ws, bs)), strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close)


class Again(torch.autograd.Function):
    """A function whose every backward runs it anew: gradcheck takes several, the fused head gives one."""

    @staticmethod
    def forward(ctx, function, *tensors):
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors).detach()

    @staticmethod
    def backward(ctx, by_value):
        tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            return None, *torch.autograd.grad(ctx.function(*tensors), tensors, by_value)


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "adaptive_kl"])
def test_gradcheck(divergence):
    hs, ws, bs, ht, wt, labels = inputs(9, 9, bias=True)
    few = slice(0, 4)

    def value(h, w, b):
        return fused_distillation_loss(
            h[few], w, ht[few], wt, labels[few], divergence=divergence, temperature=2.0, alpha=0.5, student_bias=b
        )

    assert torch.autograd.gradcheck(lambda *tensors: Again.apply(value, *tensors), (hs, ws, bs))


@pytest.mark.parametrize("chunk", [1, 7, 64, N, None])
def test_the_chunk_is_a_knob_for_memory_not_for_accuracy(chunk):
    hs, ws, _, ht, wt, labels = inputs(dtype=torch.float32)
    got = fused_distillation_loss(hs, ws, ht, wt, labels, alpha=0.5, chunk_tokens=chunk)
    whole = fused_distillation_loss(hs, ws, ht, wt, labels, alpha=0.5, chunk_tokens=1000)
    torch.testing.assert_close(got, whole, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients(got, (hs, ws)), gradients(whole, (hs, ws)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_tied_weights_get_both_gradients():
    _hs, ws, _, ht, wt, labels = inputs()
    ids = torch.arange(N) % 50
    got = fused_distillation_loss(ws[ids], ws, ht, wt, labels)
    expected = dense(ws[ids], ws, None, ht, wt, labels)
    torch.testing.assert_close(gradients(got, (ws,))[0], gradients(expected, (ws,))[0])


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_theirs():
    hs, ws, _, ht, wt, labels = inputs()
    ws = ws.detach()
    got = fused_distillation_loss(hs, ws, ht, wt, labels)
    expected = dense(hs, ws, None, ht, wt, labels)
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
def test_what_follows_the_heads_is_honoured_for_both_models(scaling, function):
    hs, ws, bs, ht, wt, labels = inputs(bias=True)
    got = fused_distillation_loss(
        hs, ws, ht, wt, labels, alpha=0.5, student_bias=bs, student_scaling=scaling, teacher_scaling=scaling
    )
    expected = dense(hs, ws, bs, ht, wt, labels, alpha=0.5, scalings=(function, function))
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(got, (hs, ws, bs)), gradients(expected, (hs, ws, bs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js", "skew_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("chunk", [1, 64, None])
def test_bf16_models_lose_nothing_but_the_rounding_of_their_gradients(divergence, chunk):
    hs, ws, _, ht, wt, labels = inputs(dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (hs, ws, ht, wt)]
    got = fused_distillation_loss(hs, ws, ht, wt, labels, divergence=divergence, chunk_tokens=chunk)
    expected = fused_distillation_loss(*exact, labels, divergence=divergence)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(gradients(got, (hs, ws)), gradients(expected, exact[:2]), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() / b.norm() < 0.0024


def job(terms, teacher, labels, **options):
    """A job whose result is a sum."""
    targets = Targets.from_batch({"labels": labels}, shift=False)
    return ChunkedLoss(teacher, targets, terms, num_items=1, **options)


def picked(hs, ws, labels):
    return LazyLogits(hs[labels != -100], ws)


def test_a_users_loss_needs_no_closed_form():
    try:

        @loss("squared", needs=("logits",))
        def squared(student, teacher, targets=None, *, temperature: float = 1.0):
            s, t = align(student, teacher, temperature)
            return (s.exp() - t.exp()).pow(2).sum(-1)

        hs, ws, _, ht, wt, labels = inputs()
        got = fused_distillation_loss(hs, ws, ht, wt, labels, divergence="squared", temperature=2.0, chunk_tokens=5)
        expected = dense(hs, ws, None, ht, wt, labels, divergence="squared", temperature=2.0)
        torch.testing.assert_close(got, expected)
        for a, b in zip(gradients(got, (hs, ws)), gradients(expected, (hs, ws)), strict=True):
            torch.testing.assert_close(a, b)
    finally:
        LOSSES.pop("squared", None)


def test_several_terms_share_one_pass():
    hs, ws, _, ht, wt, labels = inputs()
    terms = objective(
        0.3, 2.0, "js", [{"name": "reverse_kl", "weight": 0.7}, {"name": "forward_kl", "temperature": 1.0}]
    )
    head, told = picked(hs, ws, labels), LazyLogits(ht[labels != -100], wt)
    got = job(terms, told, labels, chunk_tokens=6).from_hidden(head)
    count = (labels != -100).sum()
    expected = count * (
        dense(hs, ws, None, ht, wt, labels, "js", 2.0, 0.3)
        + 0.7 * dense(hs, ws, None, ht, wt, labels, "reverse_kl", 2.0)
        + dense(hs, ws, None, ht, wt, labels, "forward_kl", 1.0)
    )
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(got, (hs, ws)), gradients(expected, (hs, ws)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_sparse_teacher_goes_through_the_same_loop(divergence):
    hs, ws, _, ht, wt, labels = inputs()
    log_probs, ids = (ht @ wt.t())[labels != -100].log_softmax(-1).sort(-1, descending=True)
    told = SparseLogProbs(ids, log_probs, torch.full((len(ids),), -torch.inf, dtype=torch.float64))
    terms = objective(0.5, 1.0, divergence)
    got = job(terms, told, labels, chunk_tokens=6, statistics=True).from_hidden(picked(hs, ws, labels))
    expected = (labels != -100).sum() * dense(hs, ws, None, ht, wt, labels, divergence, 1.0, 0.5)
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(got, (hs, ws)), gradients(expected, (hs, ws)), strict=True):
        torch.testing.assert_close(a, b)


def test_logits_that_are_there_already_give_the_same_and_are_left_as_they_are():
    hs, ws, _, ht, wt, labels = inputs()
    told, asked = LazyLogits(ht[labels != -100], wt), labels != -100
    logits = (hs @ ws.t())[asked].detach().requires_grad_()
    before = logits.detach().clone()
    got = job(objective(0.5, 2.0), told, labels).from_logits(logits)
    expected = asked.sum() * dense(hs, ws, None, ht, wt, labels, temperature=2.0, alpha=0.5)
    torch.testing.assert_close(got, expected)
    by_logits = gradients(got, (logits,))[0]
    torch.testing.assert_close(by_logits.t() @ hs[asked], gradients(expected, (ws,))[0])
    assert torch.equal(logits.detach(), before)


def test_without_gradients_there_is_no_backward_work(monkeypatch):
    hs, ws, _, ht, wt, labels = inputs()
    monkeypatch.setattr("hf_distill.losses.fused._write", lambda *a: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        value = fused_distillation_loss(hs, ws, ht, wt, labels)
    assert not value.requires_grad


def test_one_loss_used_twice_counts_twice():
    hs, ws, _, ht, wt, labels = inputs()
    twice = [{"name": "js", "weight": 0.5, "beta": 0.2}, {"name": "js", "weight": 2.0, "beta": 0.7}]
    told = LazyLogits(ht[labels != -100], wt)
    pair = job(objective(0.0, 1.0, losses=twice), told, labels)
    got = pair.from_hidden(picked(hs, ws, labels))
    options = {"divergence": "js"}
    expected = (labels != -100).sum() * (
        dense(hs, ws, None, ht, wt, labels, alpha=0.0)
        + 0.5 * dense(hs, ws, None, ht, wt, labels, **options, beta=0.2)
        + 2.0 * dense(hs, ws, None, ht, wt, labels, **options, beta=0.7)
    )
    torch.testing.assert_close(got, expected)
    assert set(pair.per_token) == {"soft", "hard", "js", "js_2"}


def test_nothing_asked_is_zero_with_a_graph():
    hs, ws, _, ht, wt, labels = inputs()
    value = fused_distillation_loss(hs, ws, ht, wt, torch.full_like(labels, -100))
    assert value.item() == 0
    assert not any(g.any() for g in gradients(value, (hs, ws)))


def test_num_items_is_the_divisor():
    hs, ws, _, ht, wt, labels = inputs()
    mean = fused_distillation_loss(hs, ws, ht, wt, labels)
    asked = int((labels != -100).sum())
    torch.testing.assert_close(fused_distillation_loss(hs, ws, ht, wt, labels, num_items=2 * asked), mean / 2)


def test_a_second_backward_is_refused_not_wrong():
    hs, ws, _, ht, wt, labels = inputs()
    value = fused_distillation_loss(hs, ws, ht, wt, labels)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used already"):
        value.backward()


def test_held_logits_and_heads_say_the_same():
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
        (change(5, lambda x: x[:5]), {}, "give one label a row"),
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
def test_what_does_not_fit_is_told(make, options, message):
    with pytest.raises(DistillError, match=message):
        fused_distillation_loss(*make(), **options)
