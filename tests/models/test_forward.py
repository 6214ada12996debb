"""The fused loss inside real models equals the loss on materialized logits: scales, caps, adapters, training."""

import pytest
import torch
from tiny import build, collate, rows
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

import hf_distill.models.output_head as module
from hf_distill import FrozenTeacher
from hf_distill.core.logits import LogitScaling
from hf_distill.losses.objective import objective
from hf_distill.models.output_head import known_output_head
from hf_distill.trainer.distiller import Distiller

SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip
SCALED = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
}


def loss_and_gradients(student, teacher, batch, keep_logits):
    frozen_teacher = FrozenTeacher(teacher)
    frozen_teacher.prepare(student, torch.device("cpu"))
    student.zero_grad()
    step = Distiller(objective(0.5, 2.0), chunk_tokens=5)(student, frozen_teacher, batch, keep_logits=keep_logits)
    step.loss.backward()
    return step.loss.detach(), {n: p.grad.clone() for n, p in student.named_parameters()}


def assert_fused_equals_materialized(student, teacher, batch):
    fused, dense = (loss_and_gradients(student, teacher, batch, keep) for keep in (False, True))
    torch.testing.assert_close(fused[0], dense[0], rtol=1e-5, atol=1e-6)
    for name in dense[1]:
        torch.testing.assert_close(fused[1][name], dense[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", SCALED)
def test_scale_and_softcap_of_both_models_are_applied(kind):
    torch.manual_seed(0)
    student, teacher = SCALED[kind](), SCALED[kind]()
    assert_fused_equals_materialized(student, teacher, collate(rows("llama", 5)))
    for model in (student, teacher):
        assert known_output_head(model).scaling == LogitScaling.of(model.config) != LogitScaling()


def test_an_unknown_operation_after_the_head_materializes_the_logits():
    class OddForCausalLM(type(build("llama"))):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 3 + 1
            return outputs

    student, teacher = OddForCausalLM(build("llama").config), OddForCausalLM(build("llama").config)
    batch = collate(rows("llama", 5))
    assert_fused_equals_materialized(student, teacher, batch)
    for model in (student, teacher):
        assert known_output_head(model).scaling is None
        assert "its logits are not the output of its output head" in known_output_head(model).reason


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_training_with_the_fused_loss_is_training_with_materialized_logits(make_trainer, monkeypatch, kind, tied):
    def run():
        student = build(kind, 0)
        if tied and kind == "llama":
            student.config.tie_word_embeddings = True
            student.tie_weights()
        options = dict(max_steps=10, optim="sgd", learning_rate=0.05, gradient_accumulation_steps=2)
        trainer = make_trainer(kind, model=student, **options)
        trainer.train()
        return trainer

    fused = run()
    monkeypatch.setattr(module, "_obstacle", lambda head: "the test requires it")
    materialized = run()
    for a, b in zip(fused.state.log_history[:10], materialized.state.log_history[:10], strict=True):
        for name in ("loss", "soft_loss", "hard_loss", "kl", "agreement", "student_entropy", "teacher_entropy"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)
    for name, value in fused.model.state_dict().items():
        torch.testing.assert_close(value, materialized.model.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_an_adapter_on_the_head_materializes_the_logits_and_warns_once(make_trainer, caplog):
    from peft import LoraConfig, get_peft_model

    module.logger.warning_once.cache_clear()
    student = get_peft_model(build("llama", 0), LoraConfig(r=4, target_modules=["lm_head"]))
    make_trainer(model=student).train()
    assert sum("The logits of LlamaForCausalLM are materialized" in record.message for record in caplog.records) == 1


def test_a_failing_forward_restores_the_head():
    student = build("llama", 0)
    teacher = FrozenTeacher(build("llama", 1))
    teacher.prepare(student, torch.device("cpu"))
    batch = collate(rows("llama", 2))
    student.model.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        Distiller(objective(0.5, 2.0))(student, teacher, batch)
    assert "forward" not in vars(student.lm_head)
    assert not student.lm_head._forward_hooks
