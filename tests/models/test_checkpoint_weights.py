"""The weights of a checkpoint are loaded exactly, whatever names transformers saves them with."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build, collate, rows
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    EsmConfig,
    GPTNeoXConfig,
    MarianConfig,
    MarianMTModel,
    MixtralConfig,
    Qwen2MoeConfig,
    set_seed,
)

from hf_distill import DistillConfig, DistillError, DistillTrainer
from hf_distill.models.checkpoint_weights import load_weights

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"max_position_embeddings": 64, "initializer_range": 0.3}
EXPERTS = {"num_key_value_heads": 1, "num_experts_per_tok": 2}
RENAMED = {  # classes whose files have other names, or other tensors, than their modules
    "gpt_neox": (AutoModelForCausalLM, lambda: GPTNeoXConfig(**SIZES)),
    "mixtral": (AutoModelForCausalLM, lambda: MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4)),
    "qwen2_moe": (
        AutoModelForCausalLM,
        lambda: Qwen2MoeConfig(**SIZES, **EXPERTS, num_experts=4, moe_intermediate_size=16),
    ),
    "esm": (AutoModelForMaskedLM, lambda: EsmConfig(**SIZES, pad_token_id=0, mask_token_id=1)),
}


def build_renamed(kind, seed):
    set_seed(seed)
    auto, config = RENAMED[kind]
    return auto.from_config(config())


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", RENAMED)
def test_renamed_weights_are_copied_into_the_same_parameters(kind, tmp_path):
    writer, reader = build_renamed(kind, 0), build_renamed(kind, 1)
    writer.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() != writer.state_dict().keys()
    parameters = dict(reader.named_parameters())
    assert not equal(state_of(reader), state_of(writer))
    load_weights(reader, tmp_path)
    assert equal(state_of(reader), state_of(writer))
    assert all(parameter is parameters[name] for name, parameter in reader.named_parameters())
    reader.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", RENAMED)
def test_a_model_from_from_pretrained_loads_checkpoints_that_it_wrote(kind, tmp_path):
    build_renamed(kind, 0).save_pretrained(tmp_path / "start")
    writer, reader = (RENAMED[kind][0].from_pretrained(tmp_path / "start") for _ in range(2))
    for parameter in writer.parameters():
        parameter.data.add_(0.25)
    writer.save_pretrained(tmp_path / "later")
    load_weights(reader, tmp_path / "later")
    assert equal(state_of(reader), state_of(writer))


@pytest.mark.parametrize("kind", ["gpt_neox", "mixtral", "esm"])
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(kind, tmp_path):
    def trainer(seed=0, **changes):
        values = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"} | changes
        values |= {"per_device_train_batch_size": 4, "dataloader_pin_memory": False, "logging_steps": 1}
        data = {"train_dataset": rows("llama", 32), "eval_dataset": rows("llama", 8), "data_collator": collate}
        args = DistillConfig(str(tmp_path / "run"), **values)
        return DistillTrainer(build_renamed(kind, seed), args, teacher=build_renamed(kind, 5), **data)

    straight = trainer()
    straight.train()
    resumed = trainer(seed=3)  # no weight of this model may remain
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert equal(state_of(straight.model), state_of(resumed.model))

    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "greater_is_better": True}
    best = trainer(load_best_model_at_end=True, **options)
    best.train()
    again = build_renamed(kind, 7)
    load_weights(again, tmp_path / "run" / f"checkpoint-{best.state.best_global_step}")
    assert equal(state_of(best.model), state_of(again))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "sequence", "token"])
def test_sharded_files_and_tied_weights_are_loaded(kind, tmp_path):
    writer, reader = build(kind, 0), build(kind, 1)
    writer.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    load_weights(reader, tmp_path)
    assert equal(state_of(reader), state_of(writer))
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(
        DistillError, match=r"has no model-00002-of-.*, which its model\.safetensors\.index\.json lists"
    ):
        load_weights(reader, tmp_path)


def test_positions_that_marian_computes_are_not_missing(tmp_path):
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
    config = MarianConfig(vocab_size=97, **sizes, **heads, pad_token_id=0, decoder_start_token_id=0)
    writer, reader = MarianMTModel(config), MarianMTModel(config)
    writer.save_pretrained(tmp_path)
    load_weights(reader, tmp_path)
    assert equal(state_of(reader), state_of(writer))


def changed(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


WRONG = {
    "missing": (lambda s: s.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
    "unknown": (lambda s: s.update(extra=torch.ones(2)), "extra is unknown to the model"),
    "another shape": (lambda s: s.update({"lm_head.weight": torch.ones(2, 2)}), r"lm_head\.weight has shape \(2, 2\)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_weights_that_do_not_fit_are_refused_and_the_model_is_not_changed(what, tmp_path):
    build("llama", 0).save_pretrained(tmp_path)
    changed(tmp_path, WRONG[what][0])
    model = build("llama", 1)
    before = state_of(model)
    with pytest.raises(DistillError, match=WRONG[what][1]):
        load_weights(model, tmp_path)
    assert equal(state_of(model), before)


def test_a_plain_module_is_loaded_strictly(tmp_path):
    writer, reader = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    save_file(writer.state_dict(), tmp_path / "model.safetensors")
    load_weights(reader, tmp_path)
    assert equal(state_of(reader), state_of(writer))
    changed(tmp_path, lambda state: state.pop("bias"))
    with pytest.raises(DistillError, match="bias is missing"):
        load_weights(reader, tmp_path)
    with pytest.raises(DistillError, match="Can't find a valid checkpoint"):
        load_weights(reader, tmp_path / "nowhere")


def adapted(config, seed, kind="llama", **options):
    from peft import get_peft_model

    base = build_renamed(kind, 9) if kind in RENAMED else build(kind, 9)
    set_seed(seed)
    model = get_peft_model(base, config(), **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return model


def adapters():
    from peft import IA3Config, LoraConfig, PromptTuningConfig

    task = {"task_type": "CAUSAL_LM"}
    return {
        "lora": lambda: LoraConfig(**task, r=2),
        "lora and a saved head": lambda: LoraConfig(**task, r=2, modules_to_save=["lm_head"]),
        "lora with biases": lambda: LoraConfig(**task, r=2, bias="all", target_modules=["c_attn"], fan_in_fan_out=True),
        "ia3": lambda: IA3Config(**task),
        "prompts": lambda: PromptTuningConfig(**task, num_virtual_tokens=3),
    }


@pytest.mark.parametrize("kind", ["lora", "lora and a saved head", "lora with biases", "ia3", "prompts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_copied_into_the_same_parameters_in_their_dtype(kind, dtype, tmp_path):
    base = "gpt2" if "biases" in kind else "llama"
    writer, reader = (adapted(adapters()[kind], seed, base).to(dtype) for seed in (0, 1))
    writer.save_pretrained(tmp_path)
    parameters = {name: (parameter, parameter.requires_grad) for name, parameter in reader.named_parameters()}
    load_weights(reader, tmp_path)
    assert equal(state_of(reader), state_of(writer))
    for name, parameter in reader.named_parameters():
        assert (parameter, parameter.requires_grad) == parameters[name]


def test_adapters_of_a_renamed_class_are_loaded(tmp_path):
    writer, reader = (adapted(adapters()["lora"], seed, "gpt_neox") for seed in (0, 1))
    writer.save_pretrained(tmp_path)
    load_weights(reader, tmp_path)
    assert equal(state_of(reader), state_of(writer))


def test_missing_adapters_are_refused(tmp_path):
    writer, reader = (adapted(adapters()["lora and a saved head"], seed) for seed in (0, 1))
    writer.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    for part in ("layers.1.self_attn.q_proj.lora_A", "lm_head"):
        save_file({k: v for k, v in state.items() if part not in k}, file)
        with pytest.raises(DistillError, match=part.split(".")[-1]):
            load_weights(reader, tmp_path)
    save_file(state, file)
    reader.get_base_model().model.norm.weight.requires_grad_(True)  # it is not in peft's files
    with pytest.raises(DistillError, match=r"model\.norm\.weight is missing"):
        load_weights(reader, tmp_path)


def test_several_adapters_are_loaded(tmp_path):
    models = []
    for seed in (0, 1):
        model = adapted(adapters()["lora"], seed)
        model.add_adapter("other", adapters()["lora"]())
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data.normal_()
        models.append(model)
    writer, reader = models
    writer.save_pretrained(tmp_path)
    load_weights(reader, tmp_path)
    assert equal(state_of(reader), state_of(writer))
