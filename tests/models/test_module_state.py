"""Measurements leave a model's modules as they were."""

import torch
from tiny import build
from torch import nn

from hf_distill.models.module_state import eval_mode


class Capacity(nn.Module):
    """As routers and rotary embeddings do, it keeps numbers and buffers of the last forward."""

    def __init__(self):
        super().__init__()
        self.capacity, self.longest, self.offset = 64, None, None
        self.register_buffer("table", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.capacity = self.longest = len(x)
        self.offset, self.table = x, torch.ones(len(x))
        return x


def test_a_measurement_changes_no_number_tensor_or_buffer_of_a_module():
    model, x = Capacity().train(), torch.ones(3)
    with eval_mode(model):
        model(x)
        assert model.capacity == 3
    assert (model.capacity, model.longest, model.offset, model.training) == (64, None, None, True)
    assert model.table.tolist() == [0.0, 0.0]


def test_each_module_returns_to_the_mode_that_it_was_in():
    model = build("llama").train()
    model.model.layers[0].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].mlp.training
