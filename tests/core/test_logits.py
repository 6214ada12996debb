import pytest
import torch

from hf_distill.core.logits import DenseLogits, sum_at_doubling_distances


def test_logits_are_projected_in_float32_at_least():
    assert DenseLogits(torch.zeros(2, 3, dtype=torch.bfloat16)).project().dtype == torch.float32
    assert DenseLogits(torch.zeros(2, 3, dtype=torch.float64)).project().dtype == torch.float64


@pytest.mark.parametrize("length", [1, 2, 7, 64, 100])
def test_the_deterministic_cumulative_sum_is_the_cumulative_sum(length):
    values = torch.rand(3, length, dtype=torch.float64)
    torch.testing.assert_close(sum_at_doubling_distances(values), values.cumsum(-1))
