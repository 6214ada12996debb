"""Measurements do not change a model's modules."""

import torch
from tiny import build
from torch import nn

from hf_distill.models.module_state import eval_mode


class Capacity(nn.Module):
    """Stores numbers and buffers of the last forward, as routers and rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.capacity, self.longest, self.offset = 64, None, None
        self.register_buffer("table", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.capacity = self.longest = len(x)
        self.offset, self.table = x, torch.ones(len(x))
        return x


def test_numbers_tensors_and_buffers_of_modules_are_restored():
    model, x = Capacity().train(), torch.ones(3)
    with eval_mode(model):
        model(x)
        assert model.capacity == 3
    assert (model.capacity, model.longest, model.offset, model.training) == (64, None, None, True)
    assert model.table.tolist() == [0.0, 0.0]


def test_the_mode_of_each_module_is_restored():
    model = build("llama").train()
    model.model.layers[0].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].mlp.training
