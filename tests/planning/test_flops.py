"""The packaged configs have the published sizes, and formulas give the FLOP that torch counts."""

import pytest
import torch
from shrunk import SMALL, shrunk
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from hf_distill.planning import ModelStats, model_config, rule_of_thumb
from hf_distill.planning.flops import Flops, counted_forward, six_nd
from hf_distill.planning.shapes import known_shapes

NAMES = sorted({entry["ids"][0] for entry in known_shapes().values()})


# Packaged configs


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_config_has_the_published_number_of_parameters(name):
    assert ModelStats.of(model_config(name)).parameters == pytest.approx(known_shapes()[name]["parameters"], rel=0.005)


def test_a_packaged_config_needs_no_network(monkeypatch):
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *a, **k: pytest.fail("a request was sent to the Hub"))
    assert model_config("meta-llama/Llama-3.1-8B-Instruct").num_hidden_layers == 32


def test_planning_a_local_folder_needs_a_config_and_no_weights(tmp_path):
    shrunk("qwen2").save_pretrained(tmp_path)
    assert model_config(str(tmp_path)).hidden_size == 128


# FLOP


@pytest.mark.parametrize(
    "name", [SMALL, "Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-0.6B", "google/gemma-2-2b", "mistralai/Mistral-7B-v0.3"]
)
def test_the_formula_gives_the_flop_that_torch_counts(name):
    config = model_config(name)
    assert 2048 * Flops.of(ModelStats.of(config), 2048).forward == pytest.approx(
        counted_forward(config, 2048), rel=0.02
    )


def test_the_formula_of_llama_equals_a_calculation_by_hand():
    flops = Flops.of(ModelStats.of(model_config("meta-llama/Llama-3.1-8B")), 2048)
    assert flops.blocks == 2 * 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert flops.attention == 4 * 2048 * 32 * 128 * 32
    assert flops.head == 2 * 4096 * 128256


def test_only_the_experts_that_a_token_passes_count():
    config = model_config("Qwen/Qwen3-30B-A3B")
    attention, router, experts = 2 * 2048 * (32 + 4) * 128, 2048 * 128, 8 * 3 * 2048 * 768
    assert Flops.of(ModelStats.of(config), 2048).blocks == pytest.approx(
        2 * 48 * (attention + router + experts), rel=0.01
    )
    assert counted_forward(config, 16) is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [None, 8])
def test_training_flop_are_what_torch_counts_in_a_forward_and_a_backward(rank, checkpointing):
    config = shrunk("llama", layers=4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if rank:
        from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(2, 64, dtype=torch.long), use_cache=False).logits.sum().backward()
    stats = ModelStats.of(config)
    adapters = stats.adapters(rank, "all-linear") if rank else None
    formula = 128 * Flops.of(stats, 64).training(adapters, checkpointing)
    if checkpointing and not rank:  # torch recomputes a block except for its last product
        formula -= 128 * 4 * 2 * 3 * 128 * 128
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_rule_of_thumb_gives_the_published_example():
    rule = rule_of_thumb(70e9, 8e9, 20e9)
    assert rule.total == pytest.approx(3.76e21)
    assert rule_of_thumb(70e9, 8e9, 2048).teacher == pytest.approx(287e12, rel=0.002)
    assert rule.total / six_nd(8e9, 2e12) == pytest.approx(0.039, abs=0.0005)
