"""Quantization-aware training: forwards use rounded weights, and the exported model computes the same numbers."""

import pytest
import torch
from tiny import VOCAB, build, collate, one_step, rows
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from hf_distill import DistillError, QuantizationScheme, convert_quantized_student, prepare_quantized_student
from hf_distill.models.output_head import known_output_head
from hf_distill.models.quantized_training import is_fake_quantized

SCHEMES = [
    QuantizationScheme("int4_weight_only", group_size=16),
    QuantizationScheme("int8_weight_only"),
    QuantizationScheme("int8_weight_only", group_size=16),
    QuantizationScheme("int8_dynamic_activation"),
    QuantizationScheme("int8_dynamic_activation", group_size=16, weight_bits=4),
]
INT4 = SCHEMES[0]


def llama(tied=False, dtype=torch.float32):
    model = build("llama").eval()
    for parameter in model.parameters():  # buffers of rotary embeddings stay in float32, as in from_pretrained
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=collate(rows("llama", 4))["input_ids"]).logits


def rounded(weight, bits, group):
    """A naive reference of symmetric rounding in groups of a row, and which values are in the range of the integers.

    The largest value of a group is halfway between two integers, so that only the same order of operations rounds it
    in the same direction.
    """
    groups = weight.reshape(-1, group)
    scale = groups.abs().amax(1, keepdim=True) / ((2**bits - 1) / 2)
    integers, largest = (groups * (1 / scale)).round(), 2 ** (bits - 1) - 1
    values = integers.clamp(-largest - 1, largest) * scale
    return values.reshape(weight.shape), (integers <= largest).reshape(weight.shape)


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=lambda s: s.description)
def test_a_prepared_student_computes_with_weights_that_are_rounded_as_a_naive_reference_does(scheme):
    reference = llama()
    for block in reference.model.layers:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                group = scheme.group_size or module.in_features
                module.weight.data = rounded(module.weight.data, scheme.weight_bits, group)[0]
    prepared = prepare_quantized_student(llama(), scheme)
    torch.testing.assert_close(logits_of(prepared), logits_of(reference), rtol=1e-5, atol=1e-5)
    assert (logits_of(llama()) - logits_of(prepared)).abs().max() > 1e-3


def test_activations_are_rounded_to_8_bits_per_token():
    scheme = QuantizationScheme("int8_dynamic_activation")
    prepared, plain = prepare_quantized_student(llama(), scheme), llama()
    layer = prepared.model.layers[0].mlp.up_proj
    x = torch.randn(3, 32)
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    activations = (((x * (1 / scale)).round() + zero).clamp(-128, 127) - zero) * scale
    expected = activations @ rounded(plain.model.layers[0].mlp.up_proj.weight, 8, 32)[0].T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_passes_the_rounding_unchanged():
    layer = prepare_quantized_student(llama(), INT4).model.layers[0].mlp.up_proj
    x = torch.randn(5, 32)
    layer(x).square().sum().backward()
    weight, inside = rounded(layer.weight.detach(), 4, 16)
    (x @ weight.requires_grad_().T).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad[inside], weight.grad[inside], rtol=1e-4, atol=1e-4)
    assert inside.float().mean() > 0.9
    assert not layer.weight.grad[~inside].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.description)
def test_the_exported_checkpoint_computes_the_same_logits_bit_for_bit(tmp_path, scheme, tied, dtype):
    """Both round the same weights by the same operations, and multiply in the same dtype."""
    model = prepare_quantized_student(llama(tied, dtype), scheme)
    expected = logits_of(model)
    converted = convert_quantized_student(model, scheme)
    torch.testing.assert_close(logits_of(converted), expected, rtol=0, atol=0)
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert loaded.config.quantization_config.quant_method == "torchao"
    torch.testing.assert_close(logits_of(loaded), expected, rtol=0, atol=0)


def test_the_backward_pass_keeps_two_numbers_per_weight_as_plans_say():
    kept = []
    for model in (llama(), prepare_quantized_student(llama(), INT4)):
        weights, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def pack(tensor, weights=weights, saved=saved):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=torch.tensor([[3]])).logits.sum()
        kept.append(sum(size for size, _ in saved.values()))
    weights = sum(p.numel() for name, p in llama().model.layers.named_parameters() if "proj" in name)
    assert 8 <= (kept[1] - kept[0]) / weights < 9


def test_the_state_dict_is_that_of_the_plain_model():
    plain, prepared = llama(), prepare_quantized_student(llama(), INT4)
    assert {n: v.tolist() for n, v in prepared.state_dict().items()} == {
        n: v.tolist() for n, v in plain.state_dict().items()
    }


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "sequence"])
def test_only_linear_layers_of_the_blocks_are_quantized(kind):
    model = prepare_quantized_student(build(kind), INT4)
    changed = {name for name, module in model.named_modules() if "FakeQuantizedLinear" in type(module).__name__}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    blocks = {"llama": ".layers.", "bert": ".layer.", "t5": ".block.", "sequence": ".layer."}[kind]
    assert changed == {name for name in linear if blocks in f".{name}"}
    assert linear - changed
    if kind == "t5":
        assert {name.partition(".")[0] for name in changed} == {"encoder", "decoder"}


def test_experts_that_stay_in_full_precision_are_warned_about(caplog):
    from hf_distill.models import quantized_training

    config = Qwen2MoeConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    quantized_training.logger.addHandler(caplog.handler)
    try:
        prepare_quantized_student(Qwen2MoeForCausalLM(config), INT4)
    finally:
        quantized_training.logger.removeHandler(caplog.handler)
    assert "of the weights in the layers of Qwen2MoeForCausalLM are in nn.Linear" in caplog.text


@pytest.mark.parametrize(
    ("model", "scheme", "message"),
    [
        (
            lambda: build("llama"),
            QuantizationScheme("int4_weight_only", group_size=48),
            r"groups of 48 .*q_proj \(32\)",
        ),
        (lambda: build("llama", width=48), INT4.__class__("int4_weight_only"), "Sizes that divide all of them: 8, 12"),
        (lambda: build("gpt2"), INT4, "have no nn.Linear"),
        (lambda: build("llama"), QuantizationScheme("nvfp4"), "compute capability 10.0 .* has no CUDA GPU"),
        (lambda: prepare_quantized_student(llama(), INT4), INT4, "is quantized already"),
        (lambda: convert_quantized_student(prepare_quantized_student(llama(), INT4), INT4), INT4, "quantized already"),
    ],
    ids=["group", "sizes", "no linear", "machine", "prepared", "converted"],
)
def test_a_student_that_cannot_be_prepared_is_an_error_and_stays_as_it_was(model, scheme, message):
    model = model()
    types = [type(module) for module in model.modules()]
    with pytest.raises(DistillError, match=message):
        prepare_quantized_student(model, scheme)
    assert [type(module) for module in model.modules()] == types


def test_adapters_are_an_error():
    from peft import LoraConfig, get_peft_model

    with pytest.raises(DistillError, match="has adapters"):
        prepare_quantized_student(get_peft_model(llama(), LoraConfig(target_modules="all-linear")), INT4)


def test_a_model_that_was_not_prepared_cannot_be_converted():
    with pytest.raises(DistillError, match="call prepare_quantized_student first"):
        convert_quantized_student(llama(), INT4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "int4_weigth_only"}, "did you mean 'int4_weight_only'"),
        ({"name": "float8"}, "known: int4_weight_only"),
        ({"name": "int4_weight_only", "weight_bits": 4}, "remove weight_bits"),
        ({"name": "int8_dynamic_activation", "weight_bits": 3}, "must be 4 or 8"),
        ({"name": "int8_weight_only", "group_size": 1}, "2 or more"),
        ({"name": "nvfp4", "group_size": 32}, "remove it"),
    ],
    ids=str,
)
def test_a_wrong_scheme_is_an_error(options, message):
    with pytest.raises(DistillError, match=message):
        QuantizationScheme(**options)


@pytest.mark.parametrize("scheme", [INT4, SCHEMES[-1]], ids=lambda s: s.description)
def test_a_trainer_distills_a_prepared_student_and_evaluates_it_as_it_is_exported(make_trainer, tmp_path, scheme):
    trainer = make_trainer(model=prepare_quantized_student(build("llama"), scheme), learning_rate=1e-2)
    trainer.train()
    head = known_output_head(trainer.model)
    assert head is not None
    assert head.scaling is not None  # the fused loss is used
    evaluated = trainer.evaluate()
    trainer.save_model(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    exported = convert_quantized_student(prepare_quantized_student(plain, scheme), scheme)
    other = make_trainer(model=exported, folder="other")
    assert other.evaluate()["eval_kl"] == evaluated["eval_kl"]
    assert make_trainer(model=build("llama"), folder="before").evaluate()["eval_kl"] > evaluated["eval_kl"]


def test_gradient_accumulation_does_not_change_loss_or_gradient_of_a_quantized_student(make_trainer):
    def student():
        return prepare_quantized_student(build("llama"), INT4)

    unsplit, gradient = one_step(make_trainer, "llama", 8, 1, model=student())
    split, split_gradient = one_step(make_trainer, "llama", 2, 4, model=student())
    assert split["loss"] == pytest.approx(unsplit["loss"], rel=1e-6)
    for name in gradient:
        torch.testing.assert_close(split_gradient[name], gradient[name], rtol=1e-4, atol=1e-6)


def test_a_quantized_student_resumes_exactly(make_trainer):
    def trained(folder, steps, resume=None):
        model = prepare_quantized_student(build("llama"), INT4)
        trainer = make_trainer(
            model=model, folder=folder, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2
        )
        trainer.train(resume)
        return trainer

    whole = trained("whole", 4)
    resumed = trained("resumed", 4, str(whole.args.output_dir) + "/checkpoint-2")
    assert is_fake_quantized(resumed.model)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_student_that_torchao_prepared_trains_with_an_ema_teacher(make_trainer):
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    from hf_distill.teachers import EMATeacher

    model = build("llama")
    config = QATConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(16)), step="prepare")
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
    trainer = make_trainer(model=model, teacher=EMATeacher(0.5), learning_rate=1e-2)
    trainer.train()
    assert trainer.evaluate()["eval_kl"] > 0


def test_a_quantized_student_is_refused_under_zero3(make_trainer, monkeypatch):
    monkeypatch.setattr("hf_distill.trainer.validation.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(DistillError, match="the student is quantized, and ZeRO-3 shards"):
        make_trainer(model=prepare_quantized_student(build("llama"), INT4))
