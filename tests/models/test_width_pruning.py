"""Students with fewer hidden channels, neurons, heads and experts than their teacher, in each family of models."""

import copy
import json
from functools import cache

import pytest
import torch
from tiny import VOCAB, build, collate, rows
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, set_seed

from hf_distill import DistillError, block_influence, cut_student
from hf_distill.models.importance import measure_importance
from hf_distill.models.pruned_shape import KeptUnits, PrunedShape
from hf_distill.models.width_pruning import keep_units, prune_student, pruned_config

# A dimension that has the hidden size belongs to the hidden channels, except those of the heads, which are 4 * 12 too.
HEAD_DIMENSIONS = (("q_proj.weight", 0), ("q_proj.bias", 0), ("o_proj.weight", 1), ("dense.weight", 1))
SIZES = dict(hidden_size=48, intermediate_size=56, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
IDS = dict(vocab_size=VOCAB, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(num_experts_per_tok=2, head_dim=8)
FAMILIES = {
    "llama": dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen2": dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": dict(head_dim=8),
    "mistral": dict(head_dim=8, sliding_window=4),
    "gemma": dict(head_dim=8),
    "gemma2": dict(head_dim=8, query_pre_attn_scalar=12, sliding_window=4, attn_logit_softcapping=5.0),
    "gemma3_text": dict(head_dim=8, query_pre_attn_scalar=12, sliding_window=4, final_logit_softcapping=20.0),
    "phi3": dict(sliding_window=4),
    "phi": dict(partial_rotary_factor=0.5),
    "mixtral": dict(num_local_experts=6, **EXPERTS),
    "qwen3_moe": dict(num_experts=6, moe_intermediate_size=20, **EXPERTS),
    "gpt_oss": dict(num_local_experts=6, sliding_window=4, **EXPERTS),
}
MOE = ("mixtral", "qwen3_moe", "gpt_oss")
GEMMA = ("gemma", "gemma2", "gemma3_text")
NEURONS = {"qwen3_moe": "moe_intermediate_size"}
INPUTS = ("input_ids", "attention_mask")


@cache
def teacher_of(family: str):
    """A tiny model whose weights, norms and biases too, are random."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SIZES, **IDS, **FAMILIES[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@cache
def importance_of(family: str, by: str = "activation"):
    return measure_importance(teacher_of(family), [batch()], by=by, with_block_influence=True)


def batch():
    return {key: value for key, value in collate(rows("llama", 4)).items() if key in INPUTS}


def logits_of(model):
    """Logits of the tokens that are no padding."""
    with torch.no_grad():
        inputs = batch()
        return model.eval()(**inputs).logits[inputs["attention_mask"].bool()]


def shape_of(family: str, **sizes):
    """A shape by the names of LLaMA: the neurons of Qwen3-MoE's experts have another name."""
    if "intermediate_size" in sizes:
        sizes[NEURONS.get(family, "intermediate_size")] = sizes.pop("intermediate_size")
    return PrunedShape(**sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_nothing_gives_the_same_logits_bit_for_bit(family):
    teacher = teacher_of(family)
    config = teacher.config
    same = {"intermediate_size": getattr(config, NEURONS.get(family, "intermediate_size"))}
    if family in MOE:
        same["num_experts"] = 6
    shape = shape_of(family, hidden_size=48, num_attention_heads=4, layers=(0, 1, 2), **same)
    for shape_of_all in (PrunedShape(), shape):
        pruned = prune_student(teacher, shape_of_all, importance_of(family))
        assert pruned.model.training
        assert torch.equal(logits_of(pruned.model), logits_of(teacher))
        assert pruned.kept == KeptUnits(layers=[0, 1, 2] if shape_of_all.layers else None)


READERS = {"phi": ("dense", "fc2")}  # the output projections of the attention and of the feed-forward network


def zero_unkept(model, family, kept):
    """Set the weights that read the units which were not kept to 0."""
    attention, network = READERS.get(family, ("o_proj", "down_proj"))
    head_dim = getattr(model.config, "head_dim", None) or 12
    with torch.no_grad():
        for name, heads in (kept.heads or {}).items():
            weight = getattr(model.get_submodule(name), attention).weight
            gone = [i for i in range(weight.shape[1]) if i // head_dim not in heads]
            weight[:, gone] = 0
        for name, neurons in (kept.neurons or {}).items():
            module = getattr(model.get_submodule(name), network)
            if family in MOE:
                for weight, of_expert in zip(module, neurons, strict=True):
                    read = weight if family == "gpt_oss" else weight.T
                    read[[i for i in range(len(read)) if i not in of_expert]] = 0
            else:
                module.weight[:, [i for i in range(module.weight.shape[1]) if i not in neurons]] = 0


@pytest.mark.parametrize("by", ["activation", "weight"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_neurons_and_heads_is_the_same_as_setting_their_weights_to_zero(family, by, tmp_path):
    teacher = teacher_of(family)
    shape = shape_of(family, num_attention_heads=2, intermediate_size=16)
    student, kept = (pruned := prune_student(teacher, shape, importance_of(family, by))).model, pruned.kept
    zeroed = copy.deepcopy(teacher)
    zero_unkept(zeroed, family, kept)
    assert not torch.allclose(logits_of(zeroed), logits_of(teacher), atol=1e-2)
    torch.testing.assert_close(logits_of(student), logits_of(zeroed), atol=2e-5, rtol=1e-5)
    if by == "activation":
        assert pruned_config(teacher, shape).to_dict() == student.config.to_dict()
        student.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits_of(loaded), logits_of(student))
        assert loaded.config.num_key_value_heads == 1


def naive_slice(teacher, config, channels):
    """A model with some hidden channels: each dimension that has the hidden size is cut."""
    naive = type(teacher)(config)
    state = {}
    for name, value in teacher.state_dict().items():
        for dim, size in enumerate(value.shape):
            if size == 48 and (name.split("self_attn.")[-1], dim) not in HEAD_DIMENSIONS:
                value = value.index_select(dim, torch.tensor(channels))
        state[name] = value
    naive.load_state_dict(state)
    return naive


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_hidden_channels_is_a_slice_of_all_weights(family, tmp_path):
    teacher = teacher_of(family)
    student, kept = (p := prune_student(teacher, PrunedShape(hidden_size=32), importance_of(family))).model, p.kept
    assert len(kept.channels) == 32
    assert student.config.hidden_size == 32
    naive = naive_slice(teacher, student.config, kept.channels)
    if family in GEMMA:
        naive.model.embed_tokens.embed_scale.fill_(48**0.5)  # of the teacher; its config has no such value
    torch.testing.assert_close(logits_of(student), logits_of(naive), atol=2e-4, rtol=1e-4)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(student))
    tied = teacher.lm_head.weight.data_ptr() == teacher.get_input_embeddings().weight.data_ptr()
    assert (student.lm_head.weight.data_ptr() == student.get_input_embeddings().weight.data_ptr()) == tied
    assert tied == (family in GEMMA or family == "llama")


@pytest.mark.parametrize("family", MOE)
def test_pruning_experts_is_the_same_as_never_choosing_them(family):
    teacher = teacher_of(family)
    shape = shape_of(family, num_experts=4, intermediate_size=16)
    student, kept = (pruned := prune_student(teacher, shape, importance_of(family))).model, pruned.kept
    reference = copy.deepcopy(teacher)
    with torch.no_grad():
        for name, experts in kept.experts.items():
            router = reference.get_submodule(name)
            router = getattr(router, "gate", None) or router.router
            gone = [i for i in range(6) if i not in experts]

            def mask_logits(module, args, gone=gone):
                bias = torch.zeros(6)
                bias[gone] = -1e9
                return torch.nn.functional.linear(
                    args[0].reshape(-1, 48), module.weight, bias + getattr(module, "bias", 0)
                )

            assert len(gone) == 2
            router.forward = route(router, mask_logits)
            neurons = kept.neurons[f"{name}.experts"]
            module = reference.get_submodule(f"{name}.experts").down_proj
            for expert, of_expert in zip(experts, neurons, strict=True):
                read = module[expert] if family == "gpt_oss" else module[expert].T
                read[[i for i in range(len(read)) if i not in of_expert]] = 0
    torch.testing.assert_close(logits_of(student), logits_of(reference), atol=2e-5, rtol=1e-5)


def route(router, logits_of_router):
    """A router that chooses the best two of some logits and divides the probability among them."""

    def forward(hidden_states):
        logits = logits_of_router(router, (hidden_states,))
        best, index = logits.topk(2, dim=-1)
        weights = best.softmax(-1)
        if not getattr(router, "norm_topk_prob", True):
            weights = logits.softmax(-1).gather(-1, index)
        return logits, weights, index

    return forward


def test_depth_and_width_together_are_a_cut_student_that_is_narrowed():
    teacher, importance = teacher_of("llama"), importance_of("llama")
    shape = PrunedShape(layers=(2, 0), hidden_size=32, intermediate_size=16, num_attention_heads=2)
    student, kept = (pruned := prune_student(teacher, shape, importance)).model, pruned.kept
    assert kept.layers == [0, 2]
    assert set(kept.neurons) == {"model.layers.0.mlp", "model.layers.2.mlp"}
    assert importance.block_influence == pytest.approx(block_influence(teacher, [batch()]))
    names = {"model.layers.2.mlp": "model.layers.1.mlp", "model.layers.2.self_attn": "model.layers.1.self_attn"}
    renumbered = KeptUnits(
        channels=kept.channels,
        neurons={names.get(name, name): units for name, units in kept.neurons.items()},
        heads={names.get(name, name): units for name, units in kept.heads.items()},
    )
    twice = keep_units(cut_student(teacher, [0, 2]), renumbered)
    assert torch.equal(logits_of(twice), logits_of(student))
    assert twice.config.to_dict() == student.config.to_dict()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_the_student_is_made_again_from_its_kept_units_and_generates(family):
    teacher = copy.deepcopy(teacher_of(family)).to(torch.bfloat16)
    teacher.generation_config.max_new_tokens = 5
    sizes = {"num_experts": 4} if family in MOE else {}
    shape = shape_of(family, layers=(0, 2), hidden_size=32, intermediate_size=16, num_attention_heads=2, **sizes)
    student, kept = (p := prune_student(teacher, shape, measure_importance(teacher, [batch()]))).model, p.kept
    assert {value.dtype for value in student.state_dict().values()} == {torch.bfloat16}
    values = json.loads(json.dumps(kept.to_json()))
    again = keep_units(teacher, KeptUnits.from_json(values))
    assert torch.equal(logits_of(again), logits_of(student))
    ids = batch()["input_ids"][:1, :4]
    assert student.generation_config.max_new_tokens == 5
    assert student.generation_config is not teacher.generation_config
    cached = student.float().generate(ids, do_sample=False, use_cache=True)
    assert torch.equal(cached, student.generate(ids, do_sample=False, use_cache=False))


def test_the_most_important_units_are_kept():
    importance = copy.deepcopy(importance_of("qwen2"))
    for (kind, _), values in importance.values.items():
        values.copy_(torch.arange(len(values)) % 7)
        if kind == "heads":
            values.copy_(torch.tensor([9.0, 0.0, 4.0, 4.0]))
    shape = PrunedShape(hidden_size=8, intermediate_size=16, num_attention_heads=2)
    kept = prune_student(teacher_of("qwen2"), shape, importance).kept
    assert kept.channels == [5, 6, 12, 13, 20, 27, 34, 41]
    assert kept.neurons["model.layers.1.mlp"] == sorted(i for i in range(56) if i % 7 > 4)
    assert kept.heads["model.layers.1.self_attn"] == [0, 1]


@pytest.mark.parametrize(
    ("family", "shape", "message"),
    [
        ("llama", {"hidden_size": 64}, "hidden_size is 64: give a number from 1 to 48"),
        ("llama", {"intermediate_size": 0}, "intermediate_size is 0: give a number from 1 to 56"),
        ("llama", {"num_attention_heads": 3}, "heads are in groups of 2 .* Give a multiple of 2, up to 4"),
        ("llama", {"hidden_size": 30}, r"LlamaConfig does not allow these sizes \(hidden_size=30\).*multiple of"),
        (
            "llama",
            {"num_experts": 2},
            "num_experts of LlamaForCausalLM cannot be pruned: its config has no `num_experts`",
        ),
        ("llama", {"layers": (5,)}, r"layers is \[5\]"),
        ("mixtral", {"num_experts": 1}, "each token needs 2 experts: give 2 to 6"),
        ("mixtral", {"intermediate_size": 6}, "multiples of 16 bytes. Give a multiple of 4"),
        (
            "qwen3_moe",
            {"intermediate_size": 8},
            "none of its weights changes with `intermediate_size`.*moe_intermediate",
        ),
    ],
)
def test_sizes_that_are_not_possible_are_refused(family, shape, message):
    for call in (
        lambda: prune_student(teacher_of(family), PrunedShape(**shape), importance_of(family)),
        lambda: pruned_config(teacher_of(family), PrunedShape(**shape)),
    ):
        with pytest.raises(DistillError, match=message):
            call()


def test_models_without_the_structure_are_refused_with_what_was_found():
    """GPT-2's heads have no size of their own; the heads of OLMo 2 share a norm."""
    teacher = build("gpt2")
    importance = measure_importance(teacher, [batch()])
    with pytest.raises(DistillError, match=r"dimension 1 of transformer.h.0.attn.c_attn.weight is 96 .* Only layers"):
        prune_student(teacher, PrunedShape(hidden_size=16), importance)
    small = AutoModelForCausalLM.from_config(CONFIG_MAPPING["olmo2"](**SIZES, **IDS))
    importance = measure_importance(small, [batch()])
    with pytest.raises(DistillError, match="they share a norm"):
        prune_student(small, PrunedShape(num_attention_heads=2), importance)
    assert (
        prune_student(small, PrunedShape(intermediate_size=8, hidden_size=32), importance).model.config.head_dim == 12
    )
    with pytest.raises(DistillError, match="measured on another model"):
        prune_student(teacher_of("llama"), PrunedShape(intermediate_size=8), importance)


@pytest.mark.parametrize(
    "kept",
    [
        KeptUnits(channels=[0, 48]),
        KeptUnits(channels=[1, 0]),
        KeptUnits(channels=[]),
        KeptUnits(neurons={"model.layers.0.mlp": [0, 1]}),
        KeptUnits(heads={f"model.layers.{i}.self_attn": [0, 1][: 2 - i % 2] for i in range(3)}),
        KeptUnits(heads={f"model.layers.{i}.self_attn": [0, 2] for i in range(3)}),
        KeptUnits(experts={"model.layers.0.mlp": [0]}),
    ],
)
def test_units_of_another_model_are_refused(kept):
    with pytest.raises(DistillError, match="are not units of this teacher"):
        keep_units(teacher_of("llama"), kept)


def test_values_that_are_no_kept_units_are_refused():
    with pytest.raises(DistillError, match="Kept units have no blocks; they have layers, channels"):
        KeptUnits.from_json({"blocks": [0]})
