import math

import pytest
import torch

from hf_distill import DistillError
from hf_distill.core.logits import DenseLogits, SparseLogProbs
from hf_distill.core.signals import Signals
from hf_distill.losses import LOSSES, forward_kl, get_loss, js, reverse_kl, skew_kl, skew_reverse_kl, total_variation
from hf_distill.losses.analytic_gradients import BlockLogits, BufferPool
from hf_distill.losses.divergences import adaptive_weight

DIVERGENCES = [name for name, loss in LOSSES.items() if "logits" in loss.compares and loss.fits("distribution")]


def naive(name: str, p: list[float], q: list[float]) -> float:
    """The divergence as a sum over the vocabulary; p is the student's distribution and q the teacher's."""

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    def mix(share):
        return [share * y + (1 - share) * x for x, y in zip(p, q, strict=True)]

    if name == "adaptive_kl":
        order = sorted(range(len(q)), key=lambda i: -q[i])
        head, mass = [], 0.0
        for i in order:
            mass += q[i]
            if mass > 0.5 and head:
                break
            head.append(i)
        gaps = [abs(x - y) for x, y in zip(p, q, strict=True)]
        weight = sum(gaps[i] for i in head) / sum(gaps)
        return weight * kl(q, p) + (1 - weight) * kl(p, q)
    return {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "js": lambda: 0.5 * kl(q, mix(0.5)) + 0.5 * kl(p, mix(0.5)),
        "skew_kl": lambda: kl(q, mix(0.1)),
        "skew_reverse_kl": lambda: kl(p, mix(0.9)),
        "total_variation": lambda: 0.5 * sum(abs(x - y) for x, y in zip(p, q, strict=True)),
    }[name]()


def softmax(logits: list[float], temperature: float) -> list[float]:
    exps = [math.exp(x / temperature) for x in logits]
    return [x / sum(exps) for x in exps]


def logits(n=6, v=11, seed=0, dtype=torch.float64):
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(3).to(dtype)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("v_student", "v_teacher"), [(11, 11), (9, 11), (11, 9)])
def test_each_divergence_is_its_formula_over_shared_ids(name, temperature, v_student, v_teacher):
    s, t = logits(v=v_student), logits(v=v_teacher, seed=1)
    got = LOSSES[name].function(s, t, temperature=temperature)
    shared = min(v_student, v_teacher)
    expected = [
        naive(name, softmax(a[:shared], temperature), softmax(b[:shared], temperature))
        for a, b in zip(s.tolist(), t.tolist(), strict=True)
    ]
    assert got.tolist() == pytest.approx(expected, rel=1e-10)


def test_forward_kl_of_a_worked_example_is_the_value_computed_by_hand():
    """0.1136, computed from probabilities that are rounded to four places."""
    value = 4 * forward_kl(torch.tensor([[4.0, 2.5, 1.5]]), torch.tensor([[5.0, 3.0, 1.0]]), temperature=2.0)
    assert value.item() == pytest.approx(0.1136, abs=5e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_identical_models_have_divergence_zero(name, dtype):
    same = logits(dtype=dtype)
    assert LOSSES[name].function(same, same.clone(), temperature=2.0).abs().max() < 1e-6


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_pass_gradcheck_and_do_not_reach_the_teacher(name):
    s, t = logits(n=3, v=5).requires_grad_(), logits(n=3, v=5, seed=1).requires_grad_()
    weight = adaptive_weight(s.detach().softmax(-1), t.detach().softmax(-1), 0.5)

    def value(x):
        if name == "adaptive_kl":  # its weight is a constant
            return weight * forward_kl(x, t) + (1 - weight) * reverse_kl(x, t)
        return LOSSES[name].function(x, t, temperature=2.0)

    assert torch.autograd.gradcheck(value, (s,))
    LOSSES[name].function(s, t).sum().backward()
    assert t.grad is None


def test_a_one_hot_teacher_makes_forward_kl_the_cross_entropy():
    s, labels = logits(), torch.tensor([3, 1, 4, 1, 5, 9])
    t = torch.full_like(s, -200.0).scatter_(1, labels[:, None], 200.0)
    expected = torch.nn.functional.cross_entropy(s, labels, reduction="none")
    torch.testing.assert_close(forward_kl(s, t), expected)


def test_skew_and_js_divergences_tend_to_forward_and_reverse_kl():
    s, t, e = logits(), logits(seed=1), 1e-7
    forward, reverse = forward_kl(s, t), reverse_kl(s, t)
    torch.testing.assert_close(skew_kl(s, t, lam=e), forward, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(skew_reverse_kl(s, t, lam=e), reverse, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(js(s, t, beta=e) / e, forward, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(js(s, t, beta=1 - e) / e, reverse, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(js(s, t), js(t, s))


def test_disjoint_distributions_have_the_largest_divergence():
    s, t = torch.tensor([[90.0, 0.0]]).double(), torch.tensor([[0.0, 90.0]]).double()
    assert total_variation(s, t).item() == pytest.approx(1)
    assert js(s, t).item() == pytest.approx(math.log(2))


def test_padding_ids_of_one_vocabulary_do_not_change_the_loss():
    s, t = logits(v=11), logits(v=11, seed=1)
    padded = torch.cat([t, torch.full((6, 3), 50.0, dtype=t.dtype)], dim=1)
    torch.testing.assert_close(forward_kl(s, padded), forward_kl(s, t))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_sparse_teacher_with_all_ids_has_the_loss_of_a_dense_teacher(name):
    s, t = logits(), logits(seed=1)
    log_probs, ids = (t / 2).log_softmax(-1).sort(-1, descending=True)
    sparse = SparseLogProbs(ids, log_probs, torch.full((6,), -torch.inf, dtype=t.dtype), temperature=2.0)
    got = LOSSES[name].function(Signals(DenseLogits(s)), Signals(sparse), temperature=2.0)
    torch.testing.assert_close(got, LOSSES[name].function(s, t, temperature=2.0))


def test_the_tail_of_a_top_k_teacher_is_one_more_id():
    s, t = logits(), logits(seed=1)
    log_probs, ids = t.log_softmax(-1).topk(3)
    tail = (1 - log_probs.exp().sum(-1)).log()
    p, q = s.softmax(-1), t.softmax(-1)
    expected = []
    for i in range(6):
        keep = ids[i].tolist()
        rest = [v for v in range(11) if v not in keep]
        expected.append(
            naive(
                "forward_kl",
                [*p[i, keep].tolist(), p[i, rest].sum().item()],
                [*q[i, keep].tolist(), q[i, rest].sum().item()],
            )
        )
    got = forward_kl(Signals(DenseLogits(s)), Signals(SparseLogProbs(ids, log_probs, tail)))
    assert got.tolist() == pytest.approx(expected, rel=1e-9)


def test_a_sampled_teacher_has_the_gradient_of_forward_kl_and_other_divergences_refuse_it():
    s, t = logits(n=1).requires_grad_(), logits(n=1, seed=1)
    draws = torch.multinomial(t.softmax(-1)[0], 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    ids, counts = draws.unique(return_counts=True)
    sampled = SparseLogProbs(ids[None], (counts / 4000).log()[None].double(), None)
    forward_kl(Signals(DenseLogits(s)), Signals(sampled)).sum().backward()
    torch.testing.assert_close(s.grad, s.detach().softmax(-1) - t.softmax(-1), rtol=0, atol=0.03)
    with pytest.raises(DistillError, match="only forward_kl is unbiased"):
        reverse_kl(Signals(DenseLogits(s)), Signals(sampled))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: forward_kl(s, t, temperature=0.0), "temperature is 0.0"),
        (lambda s, t: js(s, t, beta=1.0), "beta is 1.0; it must be above 0 and below 1"),
        (lambda s, t: skew_kl(s, t, lam=0.0), "lam is 0.0"),
        (lambda s, t: LOSSES["adaptive_kl"].function(s, t, head_mass=2.0), "head_mass is 2.0"),
        (
            lambda s, t: forward_kl(s, Signals(SparseLogProbs(torch.zeros(6, 1).long(), torch.zeros(6, 1), None, 2.0))),
            "stored at temperature 2.0 and the loss has temperature 1.0",
        ),
    ],
)
def test_options_out_of_range_are_refused(call, message):
    with pytest.raises(DistillError, match=message):
        call(logits(), logits(seed=1))


@pytest.mark.parametrize("name", ["js", "skew_kl", "skew_reverse_kl", "reverse_kl", "forward_kl"])
def test_equal_models_with_large_logits_and_a_large_vocabulary_have_divergence_zero(name):
    torch.manual_seed(0)
    logits = 4 * torch.randn(4, 49152) + 20
    values, gradient = get_loss(name).gradient_fn(
        BlockLogits(logits, None, torch.zeros(4, dtype=torch.long), BufferPool()).with_teacher(logits.clone())
    )
    assert values.abs().max() < 1e-5
    assert gradient.abs().max() < 5e-6
