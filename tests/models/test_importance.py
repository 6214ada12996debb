"""The importance of units is measured in one pass, with masked tokens left out, and equals a plain computation."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import VOCAB, build, collate, rows
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, set_seed

from hf_distill import DistillError, block_influence
from hf_distill.models.importance import measure_importance

SMALL = dict(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def llama():
    set_seed(0)
    config = LlamaConfig(**SMALL, intermediate_size=20, tie_word_embeddings=True, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config)


def mixtral():
    set_seed(0)
    config = MixtralConfig(**SMALL, intermediate_size=20, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config)


def batches(count=4):
    """Batches of two rows with padding."""
    batch = collate(rows("llama", count))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return [{key: value[i : i + 2] for key, value in inputs.items()} for i in range(0, count, 2)]


def rows_of(model):
    """Yield each row alone, without its padding."""
    for batch in batches():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            yield ids[mask.bool()].unsqueeze(0)


def aggregate(means):
    """sqrt(sum over rows of squares), of the means over the tokens of each row."""
    return torch.stack(means).double().square().sum(0).sqrt()


@torch.no_grad()
def test_activations_are_those_of_each_row_without_its_padding():
    model = llama()
    importance = measure_importance(model, batches(), with_block_influence=True)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    inputs: dict = {}

    def save(name):
        return lambda module, args, output: inputs.update({name: (args[0][0], output[0])})

    model.eval()
    for name, module in model.named_modules():
        module.register_forward_hook(save(name)) if name.endswith(("_proj", "norm")) else None
    neurons, heads, norms = [], [], []
    for ids in rows_of(model):
        model(ids)
        neurons.append(inputs["model.layers.1.mlp.down_proj"][0].abs().mean(0))
        output = inputs["model.layers.1.self_attn.o_proj"][0].unflatten(-1, (4, 6))
        heads.append(output.norm(dim=-1).mean(0))
        norms.append({key: value[1].abs().mean(0) for key, value in inputs.items() if key.endswith("norm")})
    channels = sum(aggregate([norm[key] for norm in norms]) for key in norms[0])
    assert len(norms[0]) == 5
    for kind, group, expected in (
        ("neurons", "model.layers.1.mlp", aggregate(neurons)),
        ("heads", "model.layers.1.self_attn", aggregate(heads)),
        ("channels", "", channels),
    ):
        torch.testing.assert_close(importance.scores(kind, group), expected, atol=1e-5, rtol=1e-5)
    assert importance.block_influence == pytest.approx(block_influence(model, batches()))


@torch.no_grad()
def test_experts_and_their_neurons_are_measured_for_the_tokens_that_they_read():
    model = mixtral()
    model.set_experts_implementation("grouped_mm")
    importance = measure_importance(model, batches())
    assert model.config._experts_implementation == "grouped_mm"
    model.eval()
    moe, inputs = model.model.layers[1].mlp, []
    moe.register_forward_hook(lambda module, args, output: inputs.append(args[0][0]))
    masses, neurons = [], []
    for ids in rows_of(model):
        model(ids)
        hidden = inputs.pop()
        probabilities = (hidden @ moe.gate.weight.T).softmax(-1)
        masses.append(probabilities.mean(0))
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(2).indices, 1.0)
        means = []
        for expert in range(4):
            gate, up = (hidden @ moe.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            means.append(((torch.nn.functional.silu(gate) * up).abs() * chosen[:, [expert]]).mean(0))
        neurons.append(torch.stack(means))
    torch.testing.assert_close(importance.scores("experts", "model.layers.1.mlp"), aggregate(masses))
    torch.testing.assert_close(
        importance.scores("neurons", "model.layers.1.mlp.experts"), aggregate(neurons), atol=1e-5, rtol=1e-5
    )


def test_importance_by_weight_is_the_norm_of_all_weights_of_a_unit():
    model = llama()
    importance = measure_importance(model, [], by="weight")
    state, layer = dict(model.named_parameters()), "model.layers.0"
    mlp = [state[f"{layer}.mlp.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")]
    neurons = (mlp[0].square().sum(1) + mlp[1].square().sum(1) + mlp[2].square().sum(0)).sqrt()
    torch.testing.assert_close(importance.scores("neurons", f"{layer}.mlp"), neurons.double())
    q, k, v, o = (state[f"{layer}.self_attn.{name}_proj.weight"] for name in "qkvo")
    shared = (k.square().sum(1) + v.square().sum(1)).view(2, 6).sum(1).repeat_interleave(2) / 2
    heads = (q.square().sum(1).view(4, 6).sum(1) + o.square().sum(0).view(4, 6).sum(1) + shared).sqrt()
    torch.testing.assert_close(importance.scores("heads", f"{layer}.self_attn"), heads.double())
    writers = ("o_proj.weight", "down_proj.weight")  # [H, ...]; other matrices are [..., H], and norms are [H]
    squares = {name: value.square() for name, value in state.items()}
    channels = sum(
        value if value.dim() == 1 else value.sum(1 if name.endswith(writers) else 0) for name, value in squares.items()
    )
    torch.testing.assert_close(importance.scores("channels", ""), channels.sqrt().double())
    assert importance.block_influence is None


def test_models_whose_units_cannot_be_measured_are_refused():
    model = llama()
    with pytest.raises(DistillError, match="by is 'size': choose activation or weight"):
        measure_importance(model, batches(), by="size")
    with pytest.raises(DistillError, match="at least one batch with a token"):
        measure_importance(model, [])
    with pytest.raises(DistillError, match="at least one batch with a token"):
        measure_importance(model, [], by="weight", with_block_influence=True)
    with pytest.raises(DistillError, match="BertForMaskedLM is no causal language model"):
        measure_importance(build("bert"), batches())
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(DistillError, match="merge the adapters first"):
        measure_importance(adapted, batches())
    model.quantization_method = "bitsandbytes"
    with pytest.raises(DistillError, match=r"is quantized, .* load it in bfloat16 or float32"):
        measure_importance(model, batches())
