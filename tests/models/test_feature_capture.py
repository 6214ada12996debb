"""Captured features equal those that transformers returns, for the requested tokens and layers only."""

import pytest
import torch
from tiny import KINDS, build, collate, rows
from transformers import AutoConfig, AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

from hf_distill import DistillError
from hf_distill.core.signals import FeatureKey
from hf_distill.core.targets import Targets
from hf_distill.models.blocks import get_layer_stack
from hf_distill.models.feature_capture import capture_features
from hf_distill.models.model_types import model_type_of

SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gpt2",
    "opt",
    "gpt_neox",
    "phi3",
    "olmo2",
    "mixtral",
)


def family(name):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL), attn_implementation="eager").eval()


def captured(model, batch, stack=None, layers=(0, 1), kinds=("hidden", "attention", "values"), **more):
    """Return the captured features, their tokens, and the outputs of transformers."""
    targets = Targets.from_batch(batch, model_type_of(model).shifts_labels)
    tokens = targets.feature_tokens(batch, get_layer_stack(model, stack).causal, stack)
    inputs = {k: v for k, v in batch.items() if k != "labels"} | more
    with torch.no_grad():
        with capture_features(
            model, {FeatureKey(kind, i, stack): tokens for kind in kinds for i in layers}
        ) as features:
            model(**inputs)
        return features, tokens, model(**inputs, output_hidden_states=True, output_attentions=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_decoder_families_are_those_of_transformers(name):
    features, tokens, outputs = captured(family(name), collate(rows("llama", 5)))
    for i in (0, 1):
        assert torch.equal(features[FeatureKey("hidden", i)], tokens.gather(outputs.hidden_states[i + 1]))
        assert torch.equal(features[FeatureKey("attention", i)], tokens.gather(outputs.attentions[i].transpose(1, 2)))
        assert features[FeatureKey("values", i)].shape[::2] == (5, 12)


@pytest.mark.parametrize(
    ("kind", "stack"), [("t5", "encoder"), ("t5", "decoder"), *((kind, None) for kind in KINDS if kind != "t5")]
)
def test_features_of_encoders_and_decoders_are_those_of_transformers(kind, stack):
    model = build(kind, layers=3).eval()
    model.set_attn_implementation("eager")
    batch = collate(rows(kind, 5))
    ids = {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])} if stack else {}
    features, tokens, outputs = captured(model, batch, stack, **ids)
    side = f"{stack}_" if stack else ""
    attentions = outputs[f"{side}attentions"]
    for i in (0, 1):
        assert torch.equal(
            features[FeatureKey("hidden", i, stack)], tokens.gather(outputs[f"{side}hidden_states"][i + 1])
        )
        assert torch.equal(features[FeatureKey("attention", i, stack)], tokens.gather(attentions[i].transpose(1, 2)))


def test_bart_whose_config_has_two_depths_has_two_stacks():
    config = BartConfig(
        vocab_size=97, d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    assert [len(get_layer_stack(model, which).blocks) for which in ("encoder", "decoder", None)] == [3, 2, 2]


def test_values_are_those_of_the_value_projection():
    model, batch = family("llama"), collate(rows("llama", 5))
    features, _, outputs = captured(model, batch)
    block = model.model.layers[1]
    values = block.self_attn.v_proj(block.input_layernorm(outputs.hidden_states[1]))
    torch.testing.assert_close(features[FeatureKey("values", 1)], values.unflatten(-1, (2, -1)).transpose(1, 2))


def test_only_requested_layers_and_tokens_are_captured():
    features, tokens, _ = captured(
        build("llama", layers=3).eval(), collate(rows("llama", 5)), layers=(2,), kinds=("hidden",)
    )
    assert list(features) == [FeatureKey("hidden", 2)]
    assert features[FeatureKey("hidden", 2)].untyped_storage().nbytes() == len(tokens) * 32 * 4


def test_capturing_does_not_change_the_model():
    model, batch = build("gpt2", dropout=0.3), collate(rows("gpt2", 4))
    model.set_attn_implementation("eager")
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    torch.manual_seed(3)
    plain = model(**inputs).logits
    torch.manual_seed(3)
    tokens = Targets.from_batch(batch, True).feature_tokens(batch, True)
    with capture_features(model, {FeatureKey("attention", 0): tokens}) as features:
        assert torch.equal(model(**inputs).logits, plain)
    assert features[FeatureKey("attention", 0)].sum(-1).allclose(torch.ones(1))  # maps as before dropout: distributions
    assert not any(block._forward_hooks for block in model.transformer.h)


def test_attention_outside_the_attention_interface_is_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **SMALL)).eval()
    with pytest.raises(DistillError, match=r"BloomBlock does not compute its attention through .*AttentionInterface"):
        captured(model, collate(rows("llama", 2)), kinds=("values",))


def test_a_model_whose_blocks_cannot_be_found_is_refused_with_its_lists():
    model = build("llama")
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(
        DistillError, match=r"LlamaForCausalLM has 0 lists of 2 layers.*Its lists and their lengths: none"
    ):
        get_layer_stack(model)


def test_a_stack_that_a_model_does_not_have_is_refused():
    with pytest.raises(DistillError, match="LlamaForCausalLM has one stack of layers and no encoder"):
        get_layer_stack(build("llama"), "encoder")
