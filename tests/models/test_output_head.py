"""Logits are materialized for each head, and each operation after a head, that is more than a plain product."""

import copy

import pytest
import torch
from tiny import VOCAB, build, collate, rows
from torch import nn
from torch.nn import functional as F
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

import hf_distill.models.output_head as module
from hf_distill import FrozenTeacher
from hf_distill.core.logits import DenseLogits, LazyLogits, LogitScaling
from hf_distill.core.targets import Targets
from hf_distill.losses import get_loss
from hf_distill.losses.fused import ChunkedLoss
from hf_distill.losses.objective import objective
from hf_distill.models.output_head import known_output_head, output_head
from hf_distill.trainer.distiller import Distiller

Llama = type(build("llama"))
T, ALPHA = 2.0, 0.5


def after_head(function, register=lambda model: None):
    """A LLaMA that applies `function(model, logits)` to the logits of its head."""

    class Custom(Llama):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = function(self, outputs.logits)
            return outputs

    def make(seed: int):
        model = build("llama", seed)
        model.__class__ = Custom
        register(model)
        return model

    return make


class ScaledLinear(nn.Linear):
    """A product followed by a learned scale, as in linear layers of quantization-aware training."""

    def __init__(self, *size):
        super().__init__(*size, bias=False)
        self.scale = nn.Parameter(torch.linspace(0.2, 3, size[1]))

    def forward(self, x):
        return super().forward(x) * self.scale


class LowRankLinear(nn.Linear):
    """A LoRA layer as in loralib: equal to a plain linear layer until its second factor is trained."""

    def __init__(self, *size):
        super().__init__(*size, bias=False)
        self.a, self.b = nn.Parameter(torch.randn(2, size[0])), nn.Parameter(torch.zeros(size[1], 2))

    def forward(self, x):
        return super().forward(x) + x @ self.a.t() @ self.b.t()


def with_head(head_class):
    def make(seed: int):
        model = build("llama", seed)
        head = head_class(*model.lm_head.weight.shape[::-1])
        head.weight.data.copy_(model.lm_head.weight.data)
        model.lm_head = head
        return model

    return make


def patched(seed: int):
    model = build("llama", seed)
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * forward(x)
    return model


def hooked(seed: int):
    model = build("llama", seed)
    model.lm_head.register_forward_hook(lambda _module, _args, output: 3 * output)
    return model


def called_twice(seed: int):
    model = build("llama", seed)

    class Twice(Llama):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits + self.lm_head(self.get_input_embeddings()(kwargs["input_ids"]))
            return outputs

    model.__class__ = Twice
    return model


def small_soft_cap(seed: int):
    """A soft cap whose effect on the small logits of an untrained model is below rounding."""
    model = after_head(lambda _model, logits: 0.5 * torch.tanh(logits / 0.5))(seed)
    model.lm_head.weight.data.mul_(1e-4)
    return model


def trained_bias(model):
    model.bias = nn.Parameter(torch.zeros(VOCAB))


OTHER_HEADS = {
    "linear with its own forward": (with_head(ScaledLinear), "whose forward is not that of a linear layer"),
    "low-rank linear": (with_head(LowRankLinear), "whose forward is not that of a linear layer"),
    "patched forward": (patched, "was replaced on the instance"),
    "hook on the head": (hooked, "not the output of its output head"),
    "two calls": (called_twice, "calls the output head 2 times"),
    "soft cap": (after_head(lambda _model, z: 2 * torch.tanh(z / 2)), "not the output of its output head"),
    "soft cap, small logits": (small_soft_cap, "not the output of its output head"),
    "bias for each id": (
        after_head(lambda _model, z: z + torch.linspace(0, 6, VOCAB)),
        "not the output of its output head",
    ),
    "trained bias of zeros": (after_head(lambda model, z: z + model.bias, trained_bias), "trained parameter"),
    "scale of 1.005": (after_head(lambda _model, z: 1.005 * z), "not the output of its output head"),
    "masked ids": (
        after_head(lambda _model, z: z.masked_fill(torch.arange(VOCAB) == 1, -torch.inf)),
        "not the output of its output head",
    ),
}


def reference(student, teacher, batch) -> torch.Tensor:
    """alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross entropy, from materialized logits."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    is_target = labels != -100
    with torch.no_grad():
        q = torch.softmax(teacher(**inputs).logits[is_target].double() / T, -1)
    logits = student(**inputs).logits[is_target].double()
    log_p = torch.log_softmax(logits / T, -1)
    kl = torch.where(q > 0, q * (q.log() - log_p), 0).sum(-1)
    return ALPHA * T**2 * kl.mean() + (1 - ALPHA) * F.cross_entropy(logits, labels[is_target])


def assert_like_reference(student, teacher, batch):
    frozen = FrozenTeacher(copy.deepcopy(teacher))
    frozen.prepare(student, torch.device("cpu"))
    losses, gradients = [], []
    for make in (lambda: Distiller(objective(ALPHA, T))(student, frozen, batch).loss,
                 lambda: reference(student, teacher, batch)):  # fmt: skip
        student.zero_grad()
        losses.append(make())
        losses[-1].backward()
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0].double(), losses[1].double(), rtol=1e-5, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("kind", OTHER_HEADS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_operations_of_the_head_and_after_it_are_part_of_the_loss(kind, side, caplog):
    module.logger.warning_once.cache_clear()
    make, reason = OTHER_HEADS[kind]
    student, teacher = (make if who == side else lambda seed: build("llama", seed) for who in ("student", "teacher"))
    if kind == "masked ids" and side == "student":
        student = teacher = make  # KL is infinite if only the student masks an id
    student, teacher = student(0), teacher(1)
    assert_like_reference(student, teacher, collate(rows("llama", 5)))
    messages = [record.message for record in caplog.records if "are materialized" in record.message]
    adds_nothing = kind == "trained bias of zeros" and side == "teacher"  # a frozen teacher adds zeros
    assert len(messages) == (0 if adds_nothing else 1)
    assert all(reason in message and "MiB) for this batch" in message for message in messages)


def test_sliced_logits_are_materialized():
    make = after_head(lambda _model, logits: logits[..., :90])
    student, batch = make(0), collate(rows("llama", 5))
    batch["labels"][batch["labels"] >= 90] = 5
    student.config.vocab_size = 90
    output_head(student, {k: v for k, v in batch.items() if k != "labels"})
    assert "its logits have shape (2, 12, 90)" in known_output_head(student).reason


PLAIN = {
    **{kind: lambda kind=kind: build(kind) for kind in ("llama", "gpt2", "bert", "t5")},
    "bfloat16": lambda: build("llama").bfloat16(),
    "soft cap under another name": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(vocab_size=VOCAB, hidden_size=32, num_attention_heads=2, num_key_value_heads=1,
                             intermediate_size=64, num_hidden_layers=3, lru_width=32, attention_window_size=16)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_plain_heads_have_lazy_logits_and_measuring_does_not_change_the_model(kind, pad):
    model = PLAIN[kind]().train()
    model.get_input_embeddings().eval()  # a part that the user froze
    inputs = {k: v for k, v in collate(rows("llama", 5, pad=pad)).items() if k != "labels"}
    if kind == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    known = output_head(model, inputs)
    assert known.scaling == LogitScaling.of(model.config)
    assert not known.reason
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert "forward" not in vars(model.get_output_embeddings())
    assert not any(p.grad is not None for p in model.parameters())
    model.set_output_embeddings(with_head(ScaledLinear)(0).lm_head)
    assert output_head(model, inputs).scaling is None  # another head is measured again


def test_a_hook_that_only_moves_parameters_keeps_lazy_logits():
    model = build("llama")
    model.lm_head.register_forward_hook(lambda module, _args, _output: module.weight.clone().sum() and None)
    inputs = {k: v for k, v in collate(rows("llama", 5)).items() if k != "labels"}
    assert output_head(model, inputs).scaling == LogitScaling()


def masked_head(seed: int, ids: slice):
    """A head whose bias is -inf for some ids."""
    model = build("llama", seed)
    head = nn.Linear(*model.lm_head.weight.shape[::-1])
    head.weight.data.copy_(model.lm_head.weight.data)
    head.bias.data.zero_()[ids] = -torch.inf
    model.lm_head = head
    return model


@pytest.mark.parametrize("student_masks", [False, True])
def test_masked_ids_leave_the_loss_finite(student_masks):
    batch = collate(rows("llama", 5))
    batch["labels"][batch["labels"] >= 90] = 5
    student = masked_head(0, slice(95, None)) if student_masks else build("llama", 0)
    assert_like_reference(student, masked_head(1, slice(90, None)), batch)


DIVERGENCES = {
    "forward_kl": {},
    "js": {"beta": 0.3},
    "skew_kl": {"lam": 0.2},
    "skew_reverse_kl": {"lam": 0.2},
    "total_variation": {},
    "reverse_kl": {},
    "adaptive_kl": {},
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("fused", [True, False])
def test_masked_ids_do_not_change_a_divergence(name, fused):
    torch.manual_seed(0)
    hidden, weight, teacher_logits = torch.randn(6, 8), torch.randn(20, 8), torch.randn(6, 20)
    mask = torch.arange(20) >= 15
    labels = torch.randint(0, 15, (6,))
    loss, options = get_loss(name), DIVERGENCES[name] | {"temperature": 2.0}
    values = []
    for masked in (True, False):  # with ids that both models mask, and without these ids
        leaf = hidden.clone().requires_grad_()
        bias = torch.zeros(20).masked_fill(mask, -torch.inf) if masked else torch.zeros(15)
        teacher = teacher_logits.masked_fill(mask, -torch.inf) if masked else teacher_logits[:, :15]
        if fused:
            term = [t for t in objective(1.0, 2.0, {"name": name, **DIVERGENCES[name]}) if t.weight]
            chunked_loss = ChunkedLoss(
                DenseLogits(teacher), Targets.from_batch({"labels": labels}, False), term, statistics_every=1
            )
            total = chunked_loss.from_hidden(LazyLogits(leaf, weight[: len(bias)], bias)) / 4
            assert all(torch.isfinite(values_of_term).all() for values_of_term in chunked_loss.per_token.values())
        else:
            total = loss.function(leaf @ weight[: len(bias)].t() + bias, teacher, **options).mean()
        total.backward()
        values.append((total.detach(), leaf.grad))
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["reverse_kl", "adaptive_kl"])
def test_an_infinite_divergence_stays_infinite(name):
    teacher = torch.zeros(1, 4).index_fill(1, torch.tensor([3]), -torch.inf)
    assert get_loss(name).function(torch.zeros(1, 4), teacher).isinf().all()


@pytest.mark.parametrize("student", [torch.float32, torch.float64])
@pytest.mark.parametrize("teacher", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["llama", "sequence"])
def test_student_and_teacher_may_have_different_dtypes(make_trainer, kind, student, teacher):
    losses = {"losses": [{"name": "hidden_mse", "weight": 0.1, "layers": "last:1"}]} if kind == "llama" else {}
    trainer = make_trainer(kind, model=build(kind, 0).to(student), teacher=build(kind, 1).to(teacher), **losses)
    trainer.train()
    plain = make_trainer(kind, model=build(kind, 0), teacher=build(kind, 1), **losses)
    plain.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-5)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(plain.evaluate()["eval_kl"], rel=1e-4)


def test_the_self_check_measures_a_changed_weight_again(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.model.lm_head.weight.data.mul_(3)
    trainer.args.temperature = 3.0
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_hook_that_is_added_to_the_head_between_evaluations_is_part_of_the_loss(make_trainer, which):
    def losses(*, hook_first):
        models = {"student": build("llama", 0), "teacher": build("llama", 1)}
        trainer = make_trainer(model=models["student"], teacher=models["teacher"])
        if not hook_first:
            trainer.evaluate()
        handle = models[which].lm_head.register_forward_hook(lambda _module, _args, output: output * 0.5)
        with_hook = trainer.evaluate()["eval_soft_loss"]
        handle.remove()
        return with_hook, trainer.evaluate()["eval_soft_loss"]

    expected = losses(hook_first=True)
    assert losses(hook_first=False) == expected
    assert expected[0] != pytest.approx(expected[1], rel=0.1)
