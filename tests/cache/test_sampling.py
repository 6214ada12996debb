"""Samples follow the distribution for every vocabulary size, and never are ids without mass."""

import pytest
import torch

from hf_distill.cache.sampling import blocks_of, sample_by_inverse_cdf, systematic_points
from hf_distill.core.logits import DenseLogits, LazyLogits


@pytest.mark.parametrize("vocab", [1, 5, 255, 256, 257, 1000])
def test_samples_match_the_cumulative_distribution(vocab):
    """The naive reference: the first id at which the cumulative probability is above the point."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, vocab, generator=g, dtype=torch.float64)
    uniform = torch.rand(20, 12, generator=g, dtype=torch.float64)
    probs = torch.softmax(logits, -1)
    expected = torch.searchsorted(probs.cumsum(-1), uniform, right=True).clamp(max=vocab - 1).sort(-1).values
    ids, log_p = sample_by_inverse_cdf(logits.clone(), uniform)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(log_p, torch.log_softmax(logits, -1).gather(1, ids))


def test_shares_of_many_samples_are_the_probabilities():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 600, generator=g)
    probs, count = torch.softmax(logits.double(), -1)[0], 200_000
    ids, _ = sample_by_inverse_cdf(logits.clone(), torch.rand(1, count, generator=g, dtype=torch.float64))
    shares = torch.bincount(ids[0], minlength=600) / count
    error = (probs * (1 - probs) / count).sqrt()
    assert ((shares - probs) / error).abs().max() < 5


@pytest.mark.parametrize("sharpness", [0.5, 4.0])
def test_systematic_samples_are_unbiased_with_the_documented_variance(sharpness):
    g = torch.Generator().manual_seed(3)
    logits, samples_per_token, tokens = sharpness * torch.randn(40, generator=g), 12, 20_000
    probs = torch.softmax(logits.double(), -1)
    ids, _ = sample_by_inverse_cdf(logits.repeat(tokens, 1), systematic_points(tokens, samples_per_token, g))
    counts = torch.nn.functional.one_hot(ids, 40).sum(1).double()
    floor, part = (samples_per_token * probs).floor(), (samples_per_token * probs) % 1
    assert bool(((counts == floor) | (counts == floor + 1)).all())
    variance = part * (1 - part) / samples_per_token**2
    error = (counts / samples_per_token - probs).mean(0) / (variance / tokens).sqrt()
    assert error.abs().max() < 4
    squares = (counts / samples_per_token - probs).square().mean(0)
    torch.testing.assert_close(squares, variance, rtol=0.1, atol=2e-5)
    independent = probs * (1 - probs) / samples_per_token
    assert bool((variance <= independent + 1e-12).all())


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_points_at_the_ends_of_the_interval_sample_ids_with_mass(number):
    logits = torch.full((3, 700), -200.0)
    logits[0, 300], logits[1, 699], logits[2, 0] = 1.0, 1.0, 1.0
    ids, log_p = sample_by_inverse_cdf(logits, torch.full((3, 4), number, dtype=torch.float64))
    assert ids.unique(dim=1).squeeze(1).tolist() == [300, 699, 0]
    assert log_p.abs().max() < 1e-9


def test_blocks_cover_all_rows_in_order():
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(300, 8, generator=g), torch.randn(30_000, 8, generator=g)
    rows, full_logits = [], hidden @ weight.t()
    for source in (LazyLogits(hidden, weight), DenseLogits(full_logits)):
        made = torch.cat([block.clone() for _, block in blocks_of(source)])
        torch.testing.assert_close(made, full_logits)
        rows.append([r.stop for r, _ in blocks_of(source)])
    assert len(rows[0]) > 3
    assert rows[0][-1] == 300
