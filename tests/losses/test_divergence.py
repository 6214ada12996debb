import math

import pytest
import torch

from hf_distill.losses import forward_kl


def naive_forward_kl(student, teacher, temperature):
    total = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        shared = min(len(s), len(t))
        ps = [math.exp(x / temperature) for x in s[:shared]]
        pt = [math.exp(x / temperature) for x in t[:shared]]
        ps, pt = [x / sum(ps) for x in ps], [x / sum(pt) for x in pt]
        total.append(sum(b * math.log(b / a) for a, b in zip(ps, pt, strict=True)))
    return total


def logits(n=6, v=11, seed=0, dtype=torch.float64):
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(3).to(dtype)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize(("v_student", "v_teacher"), [(11, 11), (9, 11), (11, 9)])
def test_forward_kl_is_the_textbook_sum_over_shared_ids(temperature, v_student, v_teacher):
    s, t = logits(v=v_student), logits(v=v_teacher, seed=1)
    got = forward_kl(s, t, temperature=temperature)
    assert got.tolist() == pytest.approx(naive_forward_kl(s, t, temperature), rel=1e-12)


def test_the_worked_example_of_the_mission_holds_within_its_rounding():
    """The mission prints 0.1136, from probabilities rounded to four places."""
    value = 4 * forward_kl(torch.tensor([[4.0, 2.5, 1.5]]), torch.tensor([[5.0, 3.0, 1.0]]), temperature=2.0)
    assert value.item() == pytest.approx(0.1136, abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_identical_models_have_no_divergence(dtype):
    same = logits(dtype=dtype)
    assert forward_kl(same, same.clone(), temperature=2.0).abs().max() < 1e-6


def test_a_certain_teacher_makes_it_cross_entropy():
    s, labels = logits(), torch.tensor([3, 1, 4, 1, 5, 9])
    t = torch.full_like(s, -200.0).scatter_(1, labels[:, None], 200.0)
    expected = torch.nn.functional.cross_entropy(s, labels, reduction="none")
    torch.testing.assert_close(forward_kl(s, t), expected)


def test_a_padding_row_of_one_vocabulary_carries_no_mass():
    s, t = logits(v=11), logits(v=11, seed=1)
    padded = torch.cat([t, torch.full((6, 3), 50.0, dtype=t.dtype)], dim=1)
    torch.testing.assert_close(forward_kl(s, padded), forward_kl(s, t))


def test_gradient_is_right_and_does_not_reach_the_teacher():
    s, t = logits(n=3, v=5).requires_grad_(), logits(n=3, v=5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: forward_kl(x, t, temperature=2.0), (s,))
    forward_kl(s, t).sum().backward()
    assert t.grad is None


def test_gradient_at_temperature_one_is_the_difference_of_probabilities():
    s, t = logits().requires_grad_(), logits(seed=1)
    forward_kl(s, t).sum().backward()
    torch.testing.assert_close(s.grad, s.detach().softmax(-1) - t.softmax(-1))
