import pytest
import torch

from hf_distill.core.logits import DenseLogits
from hf_distill.core.signals import Signals
from hf_distill.core.targets import Targets
from hf_distill.losses import cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_minus_log_probability_of_each_label(smoothing):
    logits = torch.randn(4, 7, dtype=torch.float64)
    targets = Targets.from_batch({"labels": torch.tensor([1, 6, 0, 3])}, shift=False)
    log_p = torch.log(torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True))
    hard = torch.stack([-log_p[i, label] for i, label in enumerate(targets.labels)])
    expected = (1 - smoothing) * hard + smoothing * -log_p.mean(-1)
    got = cross_entropy(Signals(DenseLogits(logits)), None, targets, label_smoothing=smoothing)
    torch.testing.assert_close(got, expected)
