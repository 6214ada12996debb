"""Losses that a model adds to its cross entropy are part of the objective, and are logged."""

import logging

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from peft import AdaLoraConfig, get_peft_model
from tiny import VOCAB, build, collate, rows

from hf_distill import DistillError
from hf_distill.core.targets import Targets
from hf_distill.losses.objective import objective
from hf_distill.models.aux_losses import plan_aux_losses
from hf_distill.teachers import FrozenTeacher, PeerTeacher
from hf_distill.trainer.distiller import Distiller

DECODER = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
)
MOE = dict(num_key_value_heads=1, output_router_logits=True)
VISION = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=4)


class LlamaWithEntropyBonus(tf.LlamaForCausalLM):
    """A class outside transformers that adds to the loss of the class it derives from."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        if labels is not None:
            outputs["loss"] = outputs.loss + 0.3 * outputs.logits.logsumexp(-1).square().mean()
        return outputs


class BertWithWeightDecay(tf.BertForMaskedLM):
    """Adds a loss in training mode only, to a cross entropy that it computes itself."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        if labels is not None and self.training:
            outputs["loss"] = outputs.loss + 0.3 * self.cls.predictions.transform.dense.weight.square().sum()
        return outputs


class LlamaWithHiddenLabels(tf.LlamaForCausalLM):
    """Labels reach the base class only through `**kwargs`."""

    def forward(self, input_ids=None, **kwargs):
        outputs = super().forward(input_ids, **kwargs)
        if outputs.loss is not None:
            outputs["loss"] = outputs.loss + 0.3 * outputs.logits.logsumexp(-1).square().mean()
        return outputs


# Classes of remote code often have the names of classes of transformers.
LlamaWithEntropyBonus.__name__, BertWithWeightDecay.__name__ = "LlamaForCausalLM", "BertForMaskedLM"


def adalora(kind, task):
    sizes = dict(init_r=4, target_r=2, total_step=10, orth_reg_weight=5.0)
    return get_peft_model(build(kind, 0), AdaLoraConfig(task_type=task, target_modules=["q_proj", "query"], **sizes))


def of_class(name, config, **settings):
    return getattr(tf, name)(getattr(tf, config)(**settings))


def composite():
    text = DECODER | dict(num_key_value_heads=2, head_dim=16, num_experts=4, moe_intermediate_size=32)
    text |= dict(rope_parameters={"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4})
    vision = VISION | dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
    ids = dict(image_token_id=1, video_token_id=2, vision_start_token_id=95, vision_end_token_id=96)
    config = tf.Qwen3VLMoeConfig(text_config=text | dict(output_router_logits=True), vision_config=vision, **ids)
    config.text_config.router_aux_loss_coef = 0.5
    return tf.Qwen3VLMoeForConditionalGeneration(config)


SWITCH = dict(vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=32, num_heads=2, num_experts=4, dropout_rate=0.0)
SWITCH |= dict(num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
SWITCH |= dict(router_z_loss_coef=0.5, router_aux_loss_coef=0.5, router_jitter_noise=0.0, expert_capacity=64)
SWITCH |= dict(pad_token_id=0, decoder_start_token_id=0)


MODELS = {  # name -> (factory, kind of its rows, whether the loss is fused)
    "Mixtral": (
        lambda: of_class("MixtralForCausalLM", "MixtralConfig", **DECODER, **MOE, num_local_experts=4),
        "llama",
        True,
    ),
    "JetMoe, a coefficient of another name": (
        lambda: of_class(
            "JetMoeForCausalLM",
            "JetMoeConfig",
            **DECODER,
            **MOE,
            num_local_experts=4,
            kv_channels=16,
            aux_loss_coef=0.5,
        ),
        "llama",
        True,
    ),
    "Qwen3-VL-MoE, a coefficient in the text's config": (composite, "llama", True),
    "Bamba, a z-loss of its logits": (
        lambda: of_class(
            "BambaForCausalLM",
            "BambaConfig",
            **DECODER,
            num_key_value_heads=1,
            attn_layer_indices=[0, 1],
            mamba_n_heads=4,
            mamba_d_head=16,
            z_loss_coefficient=0.1,
        ),
        "llama",
        False,
    ),
    "Switch, z-losses of its routers": (
        lambda: of_class("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", **SWITCH),
        "t5",
        False,
    ),
    "AdaLoRA": (lambda: adalora("llama", "CAUSAL_LM"), "llama", True),
    "AdaLoRA on a classifier": (lambda: adalora("token", "TOKEN_CLS"), "token", False),
    "a class outside transformers": (lambda: LlamaWithEntropyBonus(build("llama").config), "llama", False),
    "labels that reach it through kwargs": (lambda: LlamaWithHiddenLabels(build("llama").config), "llama", False),
    "a loss in training mode only": (lambda: BertWithWeightDecay(build("bert").config), "bert", False),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_hard_objective_has_the_loss_and_gradients_of_the_model(name, caplog):
    make, kind, fused = MODELS[name]
    tf.set_seed(0)
    student = make().train()
    batch, teacher = collate(rows(kind, 4)), FrozenTeacher(build(kind, 1))
    batch |= {"output_router_logits": True} if "Switch" in name else {}
    teacher.prepare(student, torch.device("cpu"))
    outputs = student(**batch)
    outputs.loss.backward()
    expected = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    with caplog.at_level(logging.WARNING):
        step = Distiller(objective(0.0, 1.0))(student, teacher, batch, statistics_every=1)
    step.loss.backward()
    torch.testing.assert_close(step.loss, outputs.loss, rtol=1e-5, atol=1e-6)
    assert {n for n, p in student.named_parameters() if p.grad is not None} == set(expected)
    for n, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[n], rtol=1e-3, atol=1e-6, msg=n)
    added = outputs.loss - step.per_token["student_ce"].mean()
    assert added.abs() > 1e-3
    torch.testing.assert_close(step.per_token["aux"].mean(), added.detach(), rtol=1e-3, atol=1e-5)
    assert (step.outputs.logits.shape[-1] == 1) == fused


def test_a_config_setting_that_is_enabled_later_is_used():
    student, batch = MODELS["Mixtral"][0](), collate(rows("llama", 4))
    teacher, distiller = FrozenTeacher(build("llama", 1)), Distiller(objective(0.5, 2.0))
    teacher.prepare(student, torch.device("cpu"))
    student.config.output_router_logits = False
    assert "aux" not in distiller(student, teacher, batch).per_token
    student.config.output_router_logits = True
    assert distiller(student, teacher, batch).per_token["aux"].mean() > 0


def test_measuring_a_model_without_auxiliary_losses_changes_no_random_state():
    student, batch = build("bert", 0, dropout=0.1).train(), collate(rows("bert", 4))
    teacher, distiller = FrozenTeacher(build("bert", 1)), Distiller(objective(0.5, 2.0))
    teacher.prepare(student, torch.device("cpu"))
    config, losses = student.config.to_dict(), []
    for _ in range(2):  # the first run measures
        torch.manual_seed(0)
        losses.append(distiller(student, teacher, batch))
    assert torch.equal(losses[0].loss, losses[1].loss)
    assert "aux" not in losses[0].per_token
    assert student.config.to_dict() == config
    assert not {"forward", "_loss_function"} & set(vars(student))


def test_logs_and_evaluation_have_the_auxiliary_losses(make_trainer):
    tf.set_seed(0)
    student = MODELS["AdaLoRA"][0]()
    trainer = make_trainer(model=student, max_steps=2, gradient_accumulation_steps=2, learning_rate=0.0)
    trainer.train()
    with torch.no_grad():
        batch = collate(trainer.train_dataset[:4])
        outputs = student(**batch)
        base_outputs = student.get_base_model()(**batch)
    log, expected = trainer.state.log_history[0], float(outputs.loss - base_outputs.loss)
    assert log["aux_loss"] == pytest.approx(expected, rel=1e-4)
    assert log["loss"] == pytest.approx((log["soft_loss"] + log["hard_loss"]) / 2 + expected, rel=1e-4)
    for metrics in (False, True):
        trainer.compute_metrics = (lambda prediction: {}) if metrics else None
        evaluation = trainer.evaluate()
        assert evaluation["eval_aux_loss"] == pytest.approx(expected, rel=1e-4)
        mix = (evaluation["eval_soft_loss"] + evaluation["eval_hard_loss"]) / 2
        assert evaluation["eval_loss"] == pytest.approx(mix + expected, rel=1e-4)


def test_a_peer_is_trained_with_its_auxiliary_losses(make_trainer):
    tf.set_seed(0)
    peer = MODELS["Mixtral"][0]()
    trainer = make_trainer(teacher=PeerTeacher(peer), max_steps=1, learning_rate=0.0)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["peer_aux_loss"] > 0
    assert "aux_loss" not in log
    student_loss = (log["soft_loss"] + log["hard_loss"]) / 2
    assert log["loss"] == pytest.approx(student_loss + log["peer_hard_loss"] + log["peer_aux_loss"], rel=1e-5)


def test_saving_a_model_does_not_repeat_the_measurement(tmp_path):
    model = build("llama")
    batch = collate(rows("llama", 3))
    probes = []

    def forward(part, replaced):
        probes.append(replaced)
        return model(**part)

    plan_aux_losses(model, batch, forward, Targets.from_batch(batch, shift=True))
    before = len(probes)
    model.save_pretrained(tmp_path)  # only on the main process; the others would wait in a measurement
    plan_aux_losses(model, batch, forward, Targets.from_batch(batch, shift=True))
    assert len(probes) == before > 0


class BertWithCustomLoss(tf.BertForMaskedLM):
    """Computes its loss by `custom_loss`, which replaces the one of the class that it derives from."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, **kwargs)
        if labels is not None:
            outputs["loss"] = self.custom_loss(outputs.logits, labels)
        return outputs


class BertWithoutLabels(BertWithCustomLoss):
    """The class without labels that the error message proposes."""

    def forward(self, input_ids=None, attention_mask=None):
        return super().forward(input_ids, attention_mask)


def nll(logits, labels):
    """A cross entropy that does not call `cross_entropy`."""
    return F.nll_loss(logits.log_softmax(-1).flatten(0, 1), labels.flatten())


def nll_and_penalty(logits, labels):
    return nll(logits, labels) + 0.01 * logits.square().mean()


def two_halves(logits, labels):
    """The mean over all tokens as the weighted sum of two cross entropies; fails for fewer than three rows."""
    parts = [F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum") for x, y in
             zip(logits.split((2, len(logits) - 2)), labels.split((2, len(labels) - 2)), strict=True)]  # fmt: skip
    if not (labels[2:] != -100).any():
        raise IndexError("no second half")
    return (parts[0] + parts[1]) / (labels != -100).sum()


def unequal_parts(logits, labels):
    """Two cross entropies, the first with weight 2."""
    first = F.cross_entropy(logits[:1].flatten(0, 1), labels[:1].flatten())
    return 2 * first + F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def fails(logits, labels):
    raise KeyError("boxes")


def hard_step(student, size=4):
    batch, teacher = collate(rows("bert", size)), FrozenTeacher(build("bert", 1))
    teacher.prepare(student, torch.device("cpu"))
    return Distiller(objective(0.0, 1.0))(student, teacher, batch), batch


@pytest.mark.parametrize("loss", [nll, two_halves])
def test_a_loss_that_equals_the_cross_entropy_adds_nothing(loss):
    student = BertWithCustomLoss(build("bert").config).train()
    student.custom_loss = loss
    step, batch = hard_step(student)
    torch.testing.assert_close(step.loss, student(**batch).loss, rtol=1e-5, atol=1e-6)
    assert "aux" not in step.per_token


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nll_and_penalty, "cannot be separated from the cross entropy"),
        (unequal_parts, "cannot be separated from the cross entropy"),
        (fails, "cannot compute its own loss from the batch .KeyError: 'boxes'"),
    ],
)
def test_a_loss_that_cannot_be_separated_is_refused(loss, message):
    student = BertWithCustomLoss(build("bert").config).train()
    student.custom_loss = loss
    with pytest.raises(DistillError, match=message) as error:
        hard_step(student)
    assert "derive a class from BertWithCustomLoss" in str(error.value)
    plain = BertWithoutLabels(student.config).train()
    plain.custom_loss = loss
    step, batch = hard_step(plain)
    logits = plain(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(step.loss, nll(logits, batch["labels"]), rtol=1e-5, atol=1e-6)


def test_the_error_names_a_setting_that_disables_the_added_loss():
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_encoder_layers=1, num_decoder_layers=1, encoder_ffn_dim=32)
    sizes |= dict(num_encoder_attention_heads=2, num_decoder_attention_heads=2, decoder_ffn_dim=32, pad_token_id=0)
    sizes |= dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, decoder_start_token_id=0)
    batch, teacher = collate(rows("t5", 4)), FrozenTeacher(build("t5", 1))
    for off in (False, True):
        student = of_class("ProphetNetForConditionalGeneration", "ProphetNetConfig", **sizes, disable_ngram_loss=off)
        teacher.prepare(student, torch.device("cpu"))
        if not off:
            with pytest.raises(DistillError, match="disable_ngram_loss=False"):
                Distiller(objective(0.0, 1.0))(student, teacher, batch)
            continue
        step = Distiller(objective(0.0, 1.0))(student, teacher, batch)
        torch.testing.assert_close(step.loss, student(**batch).loss, rtol=1e-5, atol=1e-6)


def test_a_loss_function_may_have_another_name_for_logits():
    sizes = dict(num_channels=1, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=3, drop_path_rate=0.0)
    student, other = (of_class("ConvNextForImageClassification", "ConvNextConfig", **sizes).train() for _ in range(2))
    batch = {"pixel_values": torch.randn(4, 1, 32, 32), "labels": torch.tensor([0, 1, 2, 0])}
    teacher = FrozenTeacher(other)
    teacher.prepare(student, torch.device("cpu"))
    step = Distiller(objective(0.0, 1.0))(student, teacher, batch)
    torch.testing.assert_close(step.loss, student(**batch).loss, rtol=1e-5, atol=1e-6)
