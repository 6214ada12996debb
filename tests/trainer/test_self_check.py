"""The self-check of the first batch sees every way in which an objective could be another one."""

import copy
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


class Counted(SelfCheck):
    calls = 0

    def __call__(self, *given):
        Counted.calls += 1
        super().__call__(*given)


def failure(trainer) -> str:
    """What the self-check has to say."""
    with pytest.raises(RunError, match=r"The self-check of the first batch failed: ") as error:
        trainer.train()
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js", "adaptive_kl", "total_variation"])
def test_all_kinds_of_models_and_divergences_pass(make_trainer, kind, divergence, monkeypatch):
    monkeypatch.setattr("hf_distill.trainer.trainer.SelfCheck", Counted)
    before = Counted.calls
    make_trainer(kind, divergence=divergence, alpha=0.7, temperature=3.0, max_steps=2).train()
    assert Counted.calls == before + 1


def peer():
    return PeerTeacher(build("llama", 3), mutual=True)


TEACHERS = {
    "frozen": lambda: build("llama", 1, layers=3, width=48),
    "wider vocabulary": lambda: build("llama", 1, vocab=101),
    "ema": partial(EMATeacher, decay=0.5),
    "snapshot": partial(SnapshotTeacher, interval_steps=2),
    "peer": peer,
    "several": lambda: MultiTeacher({"one": FrozenTeacher(build("llama", 1)), "two": FrozenTeacher(build("llama", 2))}),
    "mtp": partial(MTPTeacher, num_future_tokens=2),
}


@pytest.mark.parametrize("teacher", TEACHERS)
def test_it_changes_nothing_of_what_is_trained(make_trainer, teacher):
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


@pytest.mark.parametrize("bits", ["bfloat16", "autocast"])
def test_rounding_is_no_mismatch(make_trainer, bits):
    model, teacher = build("llama", 0, vocab=900), build("llama", 1, layers=3, width=48, vocab=900)
    if bits == "bfloat16":
        model, teacher = model.bfloat16(), teacher.bfloat16()
    trainer = make_trainer(model=model, teacher=teacher, bf16=bits == "autocast", use_cpu=True, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js", "total_variation"])
def test_what_cancels_between_models_that_are_alike_is_no_mismatch(make_trainer, alpha, divergence):
    model = build("llama", 0, layers=3, width=64, vocab=3000)
    options = {"alpha": alpha, "divergence": divergence, "max_steps": 2}
    trainer = make_trainer(model=model, teacher=copy.deepcopy(model), **options)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_head_that_something_follows_is_known(make_trainer):
    from transformers import GraniteConfig

    config = GraniteConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                           num_key_value_heads=1, intermediate_size=64, logits_scaling=4.0, pad_token_id=0)  # fmt: skip
    trainer = make_trainer(model=AutoModelForCausalLM.from_config(config), max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def swapped(monkeypatch, name: str, **changes) -> None:
    monkeypatch.setitem(LOSSES, name, replace(get_loss(name), **changes))


def test_a_gradient_of_another_loss_is_seen(make_trainer, monkeypatch):
    closed = get_loss("forward_kl").gradient

    def wrong(pair, **options):
        values, gradient = closed(pair, **options)
        return values, gradient.mul_(1.1)

    swapped(monkeypatch, "forward_kl", gradient=wrong)
    told = failure(make_trainer())
    assert "the fused head's gradient is not that of the loss" in told


def test_a_loss_under_anothers_name_is_seen(make_trainer, monkeypatch):
    swapped(monkeypatch, "forward_kl", gradient=get_loss("reverse_kl").gradient)
    told = failure(make_trainer())
    assert "soft is " in told
    assert "by its definition" in told


def test_a_square_that_is_forgotten_is_seen(make_trainer, monkeypatch):
    monkeypatch.setattr(Term, "scale", property(lambda self: 1.0))
    told = failure(make_trainer(temperature=2.0))
    assert "soft is " in told
    assert "by its definition" in told
    assert "the loss is " in told


def test_another_weight_or_temperature_than_asked_is_seen(make_trainer):
    trainer = make_trainer(alpha=0.5)
    trainer.distiller.terms[0] = replace(trainer.distiller.terms[0], weight=0.6)
    trainer.distiller._logit_terms[0] = trainer.distiller.terms[0]
    told = failure(trainer)
    assert "with the weights that were asked for: soft 0.5, hard 0.5" in told
    trainer = make_trainer(temperature=2.0)
    trainer.distiller._logit_terms[0] = replace(trainer.distiller.terms[0], options={"temperature": 3.0})
    told = failure(trainer)
    assert "soft is " in told


def test_an_answer_with_a_graph_is_seen(make_trainer):
    class Trained(FrozenTeacher):
        def forward(self, inputs, targets, feature_requests):
            logits = self.model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
            return Signals(DenseLogits(targets.gather(logits)))

    teacher = Trained(build("llama", 1))
    trainer = make_trainer(teacher=teacher)
    teacher.model.requires_grad_(True)
    told = failure(trainer)
    assert "the teacher's answer carries a gradient" in told


def test_tokens_that_are_lost_are_seen(make_trainer, monkeypatch):
    original = Targets.from_batch.__func__
    monkeypatch.setattr(
        Targets, "from_batch", classmethod(lambda cls, *given: original(cls, *given).slice(slice(1, None)))
    )
    told = failure(make_trainer())
    assert "tokens are asked, but the labels ask " in told


def test_a_loss_of_ones_own_that_looks_beyond_its_token_is_refused_unless_told(make_trainer):
    @loss("centred", needs={"logits"})
    def centred(student, teacher, targets):
        values = student.logits.project().square().mean(1)
        return values - values.mean()

    try:
        told = failure(make_trainer(losses=[{"name": "centred"}]))
        assert "centred is " in told
        assert "looks beyond its token" in told
        trainer = make_trainer(losses=[{"name": "centred"}], self_check=False)
        trainer.train()
        assert trainer.state.global_step == 4
    finally:
        LOSSES.pop("centred")


def test_a_batch_that_asks_nothing_is_no_reason_to_fail(make_trainer):
    data = rows("llama", 4)
    for row in data:
        row["labels"] = torch.full_like(row["labels"], -100)
    trainer: DistillTrainer = make_trainer(train_dataset=data, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("divergence", ["js", "skew_kl", "skew_reverse_kl", "adaptive_kl"])
def test_an_adapter_that_equals_its_base_passes_with_large_logits(make_trainer, divergence, temperature):
    model = build("llama", 0, layers=2, width=64, vocab=3000)
    model.lm_head.weight.data.mul_(8)
    trainer = make_trainer(model=model, teacher=copy.deepcopy(model), alpha=1.0, divergence=divergence,
                           temperature=temperature, max_steps=1)  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1


def test_soft_capped_students_pass(make_trainer):
    from transformers import Gemma2Config

    config = Gemma2Config(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
                          num_key_value_heads=1, intermediate_size=64, pad_token_id=0)  # fmt: skip
    trainer = make_trainer(model=AutoModelForCausalLM.from_config(config), max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_lazy_logits_that_are_not_the_model_s_own_are_seen(make_trainer, monkeypatch):
    from hf_distill.models import output_head

    monkeypatch.setattr(output_head, "_alike", lambda *given, **options: True)
    for side in ("model", "teacher"):
        model = build("llama", 1)
        model.lm_head.register_forward_hook(lambda _module, _args, output: 3 * output)
        assert "from the logits that the unmodified models return" in failure(make_trainer(**{side: model}))
