"""Losses on features against naive loops over tokens, heads and positions."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_distill import DistillError
from hf_distill.core.targets import Targets
from hf_distill.losses import LOSSES

B, S = 3, 7
MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
HIDDEN = ["hidden_mse", "hidden_cosine", "hidden_normalized_mse", "hidden_relation"]


def tokens(causal=True, position_ids=None):
    """Some tokens of padded rows are target tokens."""
    labels = torch.where(MASK == 1, 5, -100)
    labels[:, 3] = -100
    inputs = {"labels": labels, "input_ids": labels, "attention_mask": MASK, "position_ids": position_ids}
    return Targets.from_batch(inputs, shift=False).feature_tokens(inputs, causal)


def states(width, dtype=torch.float64, seed=0):
    return torch.randn(len(tokens()), width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def naive_hidden(name, s, t, where):
    values = []
    for n in range(len(s)):
        if name == "hidden_mse":
            values.append(((s[n] - t[n]) ** 2).mean())
        elif name == "hidden_relation":
            same = [u for u in range(len(s)) if where.batch_rows[u] == where.batch_rows[n]]
            cos_s, cos_t = (F.cosine_similarity(x[n], x[same], dim=1) for x in (s, t))
            values.append((cos_s - cos_t).square().mean())
        else:
            cos = F.cosine_similarity(s[n], t[n], dim=0)
            values.append(1 - cos if name == "hidden_cosine" else 2 * (1 - cos) / s.shape[1])
    return torch.stack(values)


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_losses_are_the_formula_of_each_token(name):
    s, t = states(8), states(8 if name != "hidden_relation" else 12, seed=1)
    torch.testing.assert_close(LOSSES[name].function(s, t, tokens()), naive_hidden(name, s, t, tokens()))


@pytest.mark.parametrize("name", HIDDEN)
def test_equal_states_have_loss_exactly_zero(name):
    s = states(8, torch.float32)
    assert LOSSES[name].function(s, s.clone(), tokens()).eq(0).all()


@pytest.mark.parametrize("name", ["hidden_mse", "hidden_cosine", "hidden_normalized_mse"])
def test_states_of_different_widths_are_not_broadcast(name):
    with pytest.raises(DistillError, match=r"shape \(14, 1\) and the teacher's \(14, 8\)"):
        LOSSES[name].function(states(1), states(8), tokens())


def test_hidden_normalized_mse_is_the_mse_of_unit_vectors():
    """The published form is mse_loss of unit vectors, averaged over tokens and width."""
    s, t = states(8), states(8, seed=1)
    expected = F.mse_loss(F.normalize(s, dim=-1), F.normalize(t, dim=-1))
    torch.testing.assert_close(LOSSES["hidden_normalized_mse"].function(s, t, tokens()).mean(), expected)


def test_half_precision_states_are_compared_in_float32():
    s, t = states(8, torch.bfloat16), states(8, torch.bfloat16, seed=1)
    for name in HIDDEN:
        values = LOSSES[name].function(s, t, tokens())
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, LOSSES[name].function(s.float(), t.float(), tokens()))


def maps(heads, causal=True, seed=0):
    """Rows of attention maps of the target tokens, with probability 0 at masked positions."""
    where = tokens(causal)
    scores = torch.randn(len(where), heads, S, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(~where.visible()[:, None], -math.inf).softmax(-1)


@pytest.mark.parametrize(("h_s", "h_t"), [(4, 4), (2, 6), (6, 2), (1, 3), (3, 4), (5, 3)])
def test_attention_kl_is_the_mean_over_heads_of_groups(h_s, h_t):
    s, t, heads = maps(h_s), maps(h_t, seed=1), min(h_s, h_t)

    def window(x, i):
        n = x.shape[1]
        return x[:, i * n // heads : math.ceil((i + 1) * n / heads)].mean(1)

    expected = torch.zeros(len(s), dtype=torch.float64)
    for i in range(heads):
        a, b = window(t, i), window(s, i)
        expected += torch.where(a > 0, a * (a / b.clamp(min=1e-300)).log(), 0).sum(-1) / heads
    values = LOSSES["attention_kl"].function(s, t, tokens())
    torch.testing.assert_close(values, expected)
    assert values.mean() > 0.1


def test_equal_maps_have_loss_exactly_zero_and_masked_positions_no_nan_gradient():
    s = maps(3).float().requires_grad_()
    values = LOSSES["attention_kl"].function(s, s.detach().clone(), tokens())
    assert values.eq(0).all()
    values.sum().backward()
    assert s.grad.isfinite().all()


def naive_relation(v_s, v_t, where, heads):
    values = []
    for n in range(len(where)):
        row, column, kl = where.batch_rows[n], where.positions[n] % S, 0.0
        visible = where.visible()[n]
        for h in range(heads):
            logs = []
            for v in (v_s, v_t):
                joined = v[row].transpose(0, 1).flatten(1)  # [S, width]
                d = joined.shape[1] // heads
                part = joined[:, h * d : (h + 1) * d]
                logs.append(torch.log_softmax((part[visible] @ part[column]) / math.sqrt(d), -1))
            kl += F.kl_div(logs[0], logs[1], log_target=True, reduction="sum") / heads
        values.append(kl)
    return torch.stack(values)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("h_s", "h_t", "heads"), [(2, 2, 2), (2, 4, 2), (3, 2, 1)])
def test_value_relation_is_the_kl_of_each_token_and_head(causal, h_s, h_t, heads):
    g = torch.Generator().manual_seed(0)
    v_s = torch.randn(B, h_s, S, 4, dtype=torch.float64, generator=g)
    v_t = torch.randn(B, h_t, S, 6, dtype=torch.float64, generator=g)
    values = LOSSES["value_relation"].function(v_s, v_t, tokens(causal))
    torch.testing.assert_close(values, naive_relation(v_s, v_t, tokens(causal), heads))
    assert LOSSES["value_relation"].function(v_s, v_s.clone(), tokens(causal)).eq(0).all()


def test_value_relation_refuses_heads_that_do_not_divide():
    v = torch.randn(B, 2, S, 4)
    with pytest.raises(DistillError, match="heads 3, which does not divide the widths of the values, 8 and 8"):
        LOSSES["value_relation"].function(v, v, tokens(), heads=3)


def test_a_token_attends_to_earlier_tokens_of_its_document_and_not_to_padding():
    packed = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [1, 1, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 0, 1]])
    where = tokens(position_ids=packed)
    for n in range(len(where)):
        row, column = int(where.batch_rows[n]), int(where.positions[n]) % S
        start = max(i for i in range(column + 1) if packed[row, i] == 0)
        expected = [start <= i <= column and bool(MASK[row, i]) for i in range(S)]
        assert where.visible()[n].tolist() == expected
    relation = LOSSES["hidden_relation"].function(states(8), states(8, seed=1), where)
    assert not torch.allclose(relation, LOSSES["hidden_relation"].function(states(8), states(8, seed=1), tokens()))


def test_features_of_a_row_are_averaged_over_its_tokens():
    """For a sequence classifier all tokens of a row with a label have the same weight; padding has none."""
    inputs = {"labels": torch.tensor([1, -100, 0]), "input_ids": MASK, "attention_mask": MASK}
    targets = Targets.from_batch(inputs, shift=False)
    where = targets.feature_tokens(inputs, causal=False)
    assert where.batch_rows.tolist() == [0] * 5 + [2] * 7
    values = torch.arange(12.0)
    assert where.to_target_tokens(values, targets).tolist() == [values[:5].mean(), values[5:].mean()]


@pytest.mark.parametrize("name", [*HIDDEN, "attention_kl", "value_relation"])
def test_gradients_are_those_of_finite_differences(name):
    feature = LOSSES[name].feature
    g = torch.Generator().manual_seed(0)
    if feature == "values":
        s, t = (torch.randn(B, 2, S, 2, dtype=torch.float64, generator=g) for _ in range(2))
    elif feature == "attention":
        where = tokens()
        scores, t = torch.randn(len(where), 2, S, dtype=torch.float64, generator=g), maps(2, seed=1)
        masked = ~where.visible()[:, None]
        call = lambda x: LOSSES[name].function(x.masked_fill(masked, -1e4).softmax(-1), t, where).sum()  # noqa: E731
        assert torch.autograd.gradcheck(call, scores.requires_grad_())
        return
    else:
        s, t = states(4), states(4, seed=1)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name].function(x, t, tokens()).sum(), s.requires_grad_())
