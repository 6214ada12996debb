"""The self-check of the first batch fails for every kind of wrong objective, and only for these."""

import copy
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import KINDS, build, rows
from transformers import AutoModelForCausalLM

from hf_distill import DistillTrainer
from hf_distill.core.logits import DenseLogits
from hf_distill.core.signals import Signals
from hf_distill.core.targets import Targets
from hf_distill.errors import RunError
from hf_distill.losses import LOSSES, get_loss, loss
from hf_distill.losses.objective import Term
from hf_distill.teachers import EMATeacher, FrozenTeacher, MTPTeacher, MultiTeacher, PeerTeacher, SnapshotTeacher
from hf_distill.trainer.self_check import SelfCheck


class CountingSelfCheck(SelfCheck):
    calls = 0

    def __call__(self, *args):
        CountingSelfCheck.calls += 1
        super().__call__(*args)


def failure(trainer) -> str:
    """Return the message of the self-check, which must fail."""
    with pytest.raises(RunError, match=r"The self-check of the first batch failed: ") as error:
        trainer.train()
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js", "adaptive_kl", "total_variation"])
def test_the_check_passes_for_all_model_types_and_divergences(make_trainer, kind, divergence, monkeypatch):
    monkeypatch.setattr("hf_distill.trainer.trainer.SelfCheck", CountingSelfCheck)
    before = CountingSelfCheck.calls
    make_trainer(kind, divergence=divergence, alpha=0.7, temperature=3.0, max_steps=2).train()
    assert CountingSelfCheck.calls == before + 1


def make_mutual_peer():
    return PeerTeacher(build("llama", 3), mutual=True)


TEACHERS = {
    "frozen": lambda: build("llama", 1, layers=3, width=48),
    "wider vocabulary": lambda: build("llama", 1, vocab=101),
    "ema": partial(EMATeacher, decay=0.5),
    "snapshot": partial(SnapshotTeacher, interval_steps=2),
    "peer": make_mutual_peer,
    "several": lambda: MultiTeacher({"one": FrozenTeacher(build("llama", 1)), "two": FrozenTeacher(build("llama", 2))}),
    "mtp": partial(MTPTeacher, num_future_tokens=2),
}


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_check_does_not_change_the_trained_weights(make_trainer, teacher):
    weights = []
    for check in (True, False):
        options = {"alpha": 0.0} if teacher == "mtp" else {}
        trainer = make_trainer(
            "gpt2" if teacher == "ema" else "llama",
            folder=str(check),
            self_check=check,
            teacher=TEACHERS[teacher](),
            **options,
        )
        trainer.train()
        weights.append([p.detach() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_rounding_in_bf16_does_not_fail_the_check(make_trainer, precision):
    model, teacher = build("llama", 0, vocab=900), build("llama", 1, layers=3, width=48, vocab=900)
    if precision == "bfloat16":
        model, teacher = model.bfloat16(), teacher.bfloat16()
    trainer = make_trainer(model=model, teacher=teacher, bf16=precision == "autocast", use_cpu=True, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js", "total_variation"])
def test_rounding_between_equal_models_does_not_fail_the_check(make_trainer, alpha, divergence):
    model = build("llama", 0, layers=3, width=64, vocab=3000)
    options = {"alpha": alpha, "divergence": divergence, "max_steps": 2}
    trainer = make_trainer(model=model, teacher=copy.deepcopy(model), **options)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_logit_scale_after_the_output_head_does_not_fail_the_check(make_trainer):
    from transformers import GraniteConfig

    config = GraniteConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                           num_key_value_heads=1, intermediate_size=64, logits_scaling=4.0, pad_token_id=0)  # fmt: skip
    trainer = make_trainer(model=AutoModelForCausalLM.from_config(config), max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def replace_loss(monkeypatch, name: str, **changes) -> None:
    monkeypatch.setitem(LOSSES, name, replace(get_loss(name), **changes))


def test_a_wrong_analytic_gradient_fails_the_check(make_trainer, monkeypatch):
    analytic_gradient = get_loss("forward_kl").gradient_fn

    def wrong(pair, **options):
        values, gradient = analytic_gradient(pair, **options)
        return values, gradient.mul_(1.1)

    replace_loss(monkeypatch, "forward_kl", gradient_fn=wrong)
    message = failure(make_trainer())
    assert "the gradient of the fused loss is not the gradient of its definition" in message


def test_a_loss_with_the_gradient_function_of_another_fails_the_check(make_trainer, monkeypatch):
    replace_loss(monkeypatch, "forward_kl", gradient_fn=get_loss("reverse_kl").gradient_fn)
    message = failure(make_trainer())
    assert "soft is " in message
    assert "by its definition" in message


def test_a_missing_squared_temperature_fails_the_check(make_trainer, monkeypatch):
    monkeypatch.setattr(Term, "temperature_squared", property(lambda self: 1.0))
    message = failure(make_trainer(temperature=2.0))
    assert "soft is " in message
    assert "by its definition" in message
    assert "the loss is " in message


def test_a_weight_or_temperature_that_is_not_that_of_the_arguments_fails_the_check(make_trainer):
    trainer = make_trainer(alpha=0.5)
    trainer.distiller.terms[0] = replace(trainer.distiller.terms[0], weight=0.6)
    trainer.distiller._logit_terms[0] = trainer.distiller.terms[0]
    message = failure(trainer)
    assert "with the weights of the arguments (soft 0.5, hard 0.5)" in message
    trainer = make_trainer(temperature=2.0)
    trainer.distiller._logit_terms[0] = replace(trainer.distiller.terms[0], options={"temperature": 3.0})
    message = failure(trainer)
    assert "soft is " in message


def test_teacher_logits_with_a_gradient_fail_the_check(make_trainer):
    class Trained(FrozenTeacher):
        def forward(self, inputs, targets, feature_requests):
            logits = self.model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
            return Signals(DenseLogits(targets.gather(logits)))

    teacher = Trained(build("llama", 1))
    trainer = make_trainer(teacher=teacher)
    teacher.model.requires_grad_(True)
    message = failure(trainer)
    assert "the teacher's signals require a gradient" in message


def test_missing_target_tokens_fail_the_check(make_trainer, monkeypatch):
    original = Targets.from_batch.__func__
    monkeypatch.setattr(
        Targets, "from_batch", classmethod(lambda cls, *args: original(cls, *args).slice(slice(1, None)))
    )
    message = failure(make_trainer())
    assert re.search(r"the step has \d+ target tokens, but the labels have \d+", message)


def test_a_custom_loss_that_reads_other_tokens_fails_the_check_unless_it_is_off(make_trainer):
    @loss("centred", compares={"logits"})
    def centred(student, teacher, targets):
        values = student.logits.project().square().mean(1)
        return values - values.mean()

    try:
        message = failure(make_trainer(losses=[{"name": "centred"}]))
        assert "centred is " in message
        assert "reads other tokens" in message
        trainer = make_trainer(losses=[{"name": "centred"}], self_check=False)
        trainer.train()
        assert trainer.state.global_step == 4
    finally:
        LOSSES.pop("centred")


def test_a_batch_without_target_tokens_does_not_fail_the_check(make_trainer):
    data = rows("llama", 4)
    for row in data:
        row["labels"] = torch.full_like(row["labels"], -100)
    trainer: DistillTrainer = make_trainer(train_dataset=data, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("divergence", ["js", "skew_kl", "skew_reverse_kl", "adaptive_kl"])
def test_large_logits_of_an_adapter_that_equals_the_base_model_do_not_fail_the_check(
    make_trainer, divergence, temperature
):
    model = build("llama", 0, layers=2, width=64, vocab=3000)
    model.lm_head.weight.data.mul_(8)
    trainer = make_trainer(model=model, teacher=copy.deepcopy(model), alpha=1.0, divergence=divergence,
                           temperature=temperature, max_steps=1)  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1


def test_soft_capped_logits_do_not_fail_the_check(make_trainer):
    from transformers import Gemma2Config

    config = Gemma2Config(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
                          num_key_value_heads=1, intermediate_size=64, pad_token_id=0)  # fmt: skip
    trainer = make_trainer(model=AutoModelForCausalLM.from_config(config), max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_lazy_logits_that_differ_from_the_models_logits_fail_the_check(make_trainer, monkeypatch):
    from hf_distill.models import output_head

    monkeypatch.setattr(output_head, "_is_close", lambda *args, **options: True)
    for side in ("model", "teacher"):
        model = build("llama", 1)
        model.lm_head.register_forward_hook(lambda _module, _args, output: 3 * output)
        assert "from the logits that the unmodified models return" in failure(make_trainer(**{side: model}))
