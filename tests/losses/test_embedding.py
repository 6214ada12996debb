"""Pooling of hidden states and losses on embeddings, against loops over rows and their definitions."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from hf_distill.core.pooling import pool
from hf_distill.losses import embedding_cosine, embedding_mse

MASKS = {
    "right": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]),
    "left": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]),
    "none": None,
}


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pooled_states_are_those_of_the_tokens_of_a_row(padding, pooling, dtype):
    hidden, mask = torch.randn(3, 5, 4, dtype=torch.float64).to(dtype), MASKS[padding]
    expected = []
    for row in range(3):
        tokens = hidden[row] if mask is None else hidden[row][mask[row] == 1]
        tokens = tokens.double()
        expected.append({"mean": tokens.mean(0), "cls": tokens[0], "last": tokens[-1]}[pooling])
    pooled = pool(hidden, None if mask is None else mask == 1, pooling)
    assert pooled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(pooled.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_a_row_of_padding_has_a_finite_embedding():
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    embeddings = pool(hidden, torch.tensor([[True, True, False], [False, False, False]]), "mean")
    embedding_cosine(embeddings, torch.randn(2, 4), None).sum().backward()
    assert embeddings.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert not hidden.grad[1].any()


def test_losses_are_their_definitions_and_differentiable():
    s, t = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.randn(6, 4, dtype=torch.float64)
    cosine = cosine_similarity(s, t)
    torch.testing.assert_close(embedding_cosine(s, t, None), 1 - cosine)
    torch.testing.assert_close(embedding_mse(s, t, None), ((s - t) ** 2).mean(1))
    normalized = embedding_mse(s, t, None, normalize=True)
    torch.testing.assert_close(normalized, ((normalize(s) - normalize(t)) ** 2).mean(1))
    torch.testing.assert_close(normalized, 2 * (1 - cosine) / 4)
    for loss, options in ((embedding_cosine, {}), (embedding_mse, {}), (embedding_mse, {"normalize": True})):
        assert torch.autograd.gradcheck(lambda x, f=loss, o=options: f(x, t, None, **o), s)
        assert loss(t, t, None, **options).abs().max() == 0
