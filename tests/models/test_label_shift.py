"""The loss of a model decides whether its labels are shifted, and its model type."""

from dataclasses import replace

import pytest
import torch
import transformers as tf
from tiny import build

from hf_distill import DistillError
from hf_distill.models.model_types import model_type_of
from hf_distill.models.type_catalog import CAUSAL, SEQ2SEQ

SMALL = dict(
    vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=16, head_dim=8,
)  # fmt: skip
BART = dict(
    vocab_size=97, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=16, decoder_ffn_dim=16,
)  # fmt: skip


def xlm():
    return tf.XLMWithLMHeadModel(tf.XLMConfig(vocab_size=97, emb_dim=16, n_layers=1, n_heads=2, embed_init_std=0.5))


def xlnet():
    small = dict(vocab_size=97, d_model=16, n_layer=1, n_head=2, d_inner=16, initializer_range=0.5)
    return tf.XLNetLMHeadModel(tf.XLNetConfig(**small))


def audio():
    sound = dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16)
    text = {"model_type": "qwen2", **SMALL}
    config = tf.Qwen2AudioConfig(audio_config={"model_type": "qwen2_audio_encoder", **sound}, text_config=text)
    return tf.Qwen2AudioForConditionalGeneration(config)


def bart_decoder():
    return tf.BartForCausalLM(tf.BartConfig(**BART, init_std=0.5, is_decoder=True, is_encoder_decoder=False))


class SwappedForCausalLM(tf.LlamaForCausalLM):
    """Its forward compares the logits at position i with the label at i."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, **kwargs)
        if labels is not None:
            outputs.loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return outputs


@pytest.mark.parametrize(
    ("make", "shift"),
    [
        (lambda: build("llama"), True),
        (lambda: build("gpt2"), True),
        (audio, True),
        (xlm, False),
        (xlnet, False),
        (bart_decoder, False),
        (lambda: SwappedForCausalLM(build("llama").config), False),
        (lambda: build("bert"), False),
        (lambda: build("t5"), False),
    ],
)
def test_the_loss_of_the_model_decides_the_shift(make, shift):
    model = make().eval()
    before = torch.get_rng_state()
    assert model_type_of(model.train()).shifts_labels == shift
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


def test_a_loss_function_that_the_user_sets_decides_the_shift():
    model = build("llama")
    assert model_type_of(model) == CAUSAL
    model.loss_function = lambda logits, labels, **kwargs: torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten()
    )
    assert not model_type_of(model).shifts_labels


def test_a_decoder_only_audio_model_is_a_causal_language_model():
    model = audio()
    assert model_type_of(model) == replace(CAUSAL, placeholders=frozenset({model.config.audio_token_id}))
    assert model_type_of(build("t5")) is SEQ2SEQ


def test_the_hard_loss_of_a_model_that_does_not_shift_is_its_loss(make_trainer):
    student, teacher = xlm().eval(), xlm().eval()
    ids = torch.arange(5, 17)[None]
    rows = [{"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0]), "labels": ids[0]}] * 4
    with torch.no_grad():
        model_loss = float(student(ids, labels=ids).loss)
    student.transformer.dropout = student.transformer.attention_dropout = 0.0
    trainer = make_trainer(model=student, teacher=teacher, train_dataset=rows, eval_dataset=rows, max_steps=1)
    assert trainer.evaluate()["eval_hard_loss"] == pytest.approx(model_loss, rel=1e-4)


def test_a_teacher_with_another_shift_is_refused(make_trainer):
    with pytest.raises(DistillError, match="shifts its labels"):
        make_trainer(model=xlm(), teacher=build("llama", 1))
