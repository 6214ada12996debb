"""How the student of on-policy distillation generates."""

import pytest
import torch
from tiny import VOCAB, build
from transformers import GenerationConfig

from hf_distill.generation.backends import row_dropping
from hf_distill.trl.decoding import generating, sampling_on_cpu


@pytest.mark.parametrize(
    ("options", "is_ours"), [({"do_sample": True}, True), ({"do_sample": False}, True), ({"num_beams": 2}, False)]
)
def test_other_methods_than_sampling_are_those_of_transformers(options, is_ours, monkeypatch):
    calls, of_module = [], row_dropping.read_prompts
    monkeypatch.setattr(row_dropping, "read_prompts", lambda *args: calls.append(1) or of_module(*args))
    model, ids = build("llama").eval(), torch.randint(3, VOCAB, (2, 6))
    config = GenerationConfig(max_new_tokens=4, pad_token_id=0, **options)
    with sampling_on_cpu(model, config):
        results = model.generate(input_ids=ids, generation_config=config)
    assert bool(calls) == is_ours
    assert "generate" not in vars(model)
    if not config.do_sample:
        assert torch.equal(results, model.generate(input_ids=ids, generation_config=config))


def test_modules_train_again_after_generation_even_if_it_fails():
    model = build("llama", dropout=0.5).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    inside = []

    def fail():
        with generating(model):
            inside.extend(module.training for module in model.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not any(inside)
    assert [module.training for module in model.modules()] == before
