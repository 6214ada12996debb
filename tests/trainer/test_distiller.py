"""`Distiller`: loss, gradients and statistics against naive references, and errors."""

import pytest
import torch
import torch.nn.functional as F
from tiny import KINDS, build, collate, rows
from transformers import BertForSequenceClassification, MixtralConfig, MixtralForCausalLM

from hf_distill import DistillError, FrozenTeacher
from hf_distill.losses.objective import objective
from hf_distill.models.model_types import model_type_of
from hf_distill.teachers import MultiTeacher
from hf_distill.trainer.distiller import Distiller


def naive_loss(student, teacher, batch, alpha, temperature, kind):
    """Mean over the target tokens, in a loop, with dense logits."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if kind == "t5":
        inputs["decoder_input_ids"] = F.pad(batch["labels"].masked_fill(batch["labels"] == -100, 0), (1, 0))[:, :-1]
    s = student(**inputs).logits
    with torch.no_grad():
        t = teacher(**inputs).logits
    labels = batch["labels"]
    if kind in ("llama", "gpt2"):
        predicted_from_padding = batch["attention_mask"][:, :-1] == 0
        s, t, labels = s[:, :-1], t[:, :-1], labels[:, 1:].masked_fill(predicted_from_padding, -100)
    total, count = 0.0, 0
    for s_row, t_row, label in zip(s.flatten(0, -2), t.flatten(0, -2), labels.flatten(), strict=True):
        if label == -100:
            continue
        v = min(len(s_row), len(t_row))
        log_s, log_t = (s_row[:v] / temperature).log_softmax(-1), (t_row[:v] / temperature).log_softmax(-1)
        soft = temperature**2 * (log_t.exp() * (log_t - log_s)).sum()
        total = total + alpha * soft + (1 - alpha) * F.cross_entropy(s_row, label)
        count += 1
    return total / count


def teacher_of(model, student):
    teacher = FrozenTeacher(model)
    teacher.prepare(student, torch.device("cpu"))
    return teacher


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("vocabularies", [(97, 97), (97, 101), (101, 97)])
def test_loss_and_gradients_equal_those_of_a_naive_loop(kind, pad, vocabularies):
    classes = kind in ("sequence", "token")
    v_student, v_teacher = (97, 97) if classes else vocabularies
    student = build(kind, 0, vocab=v_student).double()
    teacher = build(kind, 1, layers=3, width=48, vocab=v_teacher).double()
    batch = collate(rows(kind, 5, pad=pad))
    step = Distiller(objective(0.3, 2.0))(student, teacher_of(teacher, student), batch)
    expected = naive_loss(student, teacher, batch, 0.3, 2.0, kind)
    torch.testing.assert_close(step.loss, expected, rtol=1e-12, atol=0)
    got, reference = gradients(student, step.loss), gradients(student, expected)
    assert got.keys() == reference.keys()
    for name in got:
        torch.testing.assert_close(got[name], reference[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_gets_no_gradient_and_is_in_eval_mode(kind):
    student, model = build(kind, 0), build(kind, 1, dropout=0.5).train()
    teacher = teacher_of(model, student)
    Distiller(objective(0.5, 2.0))(student, teacher, collate(rows(kind, 3))).loss.backward()
    assert not model.training
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_target_tokens_has_loss_zero_and_a_graph(kind):
    student = build(kind, 0)
    batch = collate(rows(kind, 3))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    step = Distiller(objective(0.5, 2.0))(student, teacher_of(build(kind, 1), student), batch, statistics_every=True)
    assert step.loss.item() == 0
    step.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_the_output_head_runs_on_target_tokens_only_and_is_restored(monkeypatch):
    from hf_distill.losses.fused import ChunkedLoss

    student, batch, shapes = build("llama", 0), collate(rows("llama", 4)), []
    original = ChunkedLoss.from_hidden
    monkeypatch.setattr(
        ChunkedLoss,
        "from_hidden",
        lambda chunked_loss, head: shapes.append(head.hidden.shape) or original(chunked_loss, head),
    )
    step = Distiller(objective(0.5, 2.0))(student, teacher_of(build("llama", 1), student), batch)
    assert shapes == [(len(step.targets), 32)]
    assert "forward" not in vars(student.lm_head)
    assert not student.lm_head._forward_hooks
    assert student(input_ids=batch["input_ids"]).logits.shape == (4, 12, 97)


def test_keep_logits_returns_the_logits_of_the_model_and_does_not_change_the_loss():
    student, batch = build("llama", 0), collate(rows("llama", 4))
    teacher, distiller = teacher_of(build("llama", 1), student), Distiller(objective(0.5, 2.0))
    without_logits, with_logits = (
        distiller(student, teacher, batch),
        distiller(student, teacher, batch, keep_logits=True),
    )
    torch.testing.assert_close(without_logits.loss, with_logits.loss, rtol=1e-6, atol=0)
    expected = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(with_logits.outputs.logits, expected)


@pytest.mark.parametrize(("alpha", "unweighted"), [(1.0, "hard"), (0.0, "soft")])
def test_a_term_of_weight_zero_is_reported_but_has_no_gradient(alpha, unweighted):
    student, batch = build("llama", 0), collate(rows("llama", 4))
    step = Distiller(objective(alpha, 2.0))(student, teacher_of(build("llama", 1), student), batch)
    other = {"hard": "soft", "soft": "hard"}[unweighted]
    assert step.per_token[unweighted].mean() > 0
    torch.testing.assert_close(step.loss, step.per_token[other].mean())


def test_the_load_balancing_loss_of_a_router_is_added():
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    torch.manual_seed(0)
    student, batch = MixtralForCausalLM(config), collate(rows("llama", 4))
    teacher, distiller = teacher_of(build("llama", 1), student), Distiller(objective(0.0, 1.0))
    expected = student(**batch).loss
    torch.testing.assert_close(distiller(student, teacher, batch).loss, expected, rtol=1e-6, atol=1e-6)


def test_additional_losses_use_their_weight_and_temperature():
    student, batch = build("llama", 0), collate(rows("llama", 4))
    teacher = teacher_of(build("llama", 1), student)
    plain = Distiller(objective(0.5, 2.0))(student, teacher, batch).loss
    more = objective(0.5, 2.0, losses=[{"name": "forward_kl", "weight": 0.25, "temperature": 3.0}])
    extra = Distiller(objective(1.0, 3.0))(student, teacher, batch).loss
    torch.testing.assert_close(Distiller(more)(student, teacher, batch).loss, plain + 0.25 * extra)


def test_a_loss_that_returns_a_scalar_raises_an_error():
    from hf_distill.losses import LOSSES, loss

    @loss("reduced", compares=())
    def reduced(student, teacher, targets):
        return student.logits.project().sum()

    student, batch = build("llama", 0), collate(rows("llama", 4))
    try:
        with pytest.raises(DistillError, match="one number for each target token"):
            Distiller(objective(0.5, 2.0, losses=[{"name": "reduced"}]))(
                student, teacher_of(build("llama", 1), student), batch
            )
    finally:
        del LOSSES["reduced"]


def test_the_error_names_all_problems_of_an_objective():
    with pytest.raises(DistillError) as caught:
        objective(1.5, -1.0, "forwrd_kl", [{"name": "cross_entropy", "temperature": 2}, {"weight": 1}])
    for message in (
        "alpha is 1.5",
        "temperature is -1",
        "did you mean 'forward_kl'",
        "no option 'temperature'",
        "must be a mapping",
    ):
        assert message in str(caught.value)


def test_statistics_equal_those_of_dense_logits():
    student, teacher, batch = build("llama", 0), build("llama", 1, layers=3), collate(rows("llama", 6))
    step = Distiller(objective(0.5, 2.0))(student, teacher_of(teacher, student), batch, statistics_every=True)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    is_target = batch["labels"][:, 1:] != -100
    s, t = (m(**inputs).logits[:, :-1][is_target] for m in (student, teacher))
    labels = batch["labels"][:, 1:][is_target]
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    expected = {
        "teacher_entropy": -(log_t.exp() * log_t).sum(-1),
        "student_entropy": -(log_s.exp() * log_s).sum(-1),
        "kl": F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1),
        "agreement": (s.argmax(-1) == t.argmax(-1)).float(),
        "accuracy": (s.argmax(-1) == labels).float(),
        "student_ce": F.cross_entropy(s, labels, reduction="none"),
        "teacher_ce": F.cross_entropy(t, labels, reduction="none"),
    }
    for name, values in expected.items():
        torch.testing.assert_close(step.per_token[name], values.detach(), rtol=1e-4, atol=1e-5)


def test_labels_outside_the_students_vocabulary_raise_an_error():
    student, batch = build("llama", 0), collate(rows("llama", 4))
    batch["labels"][0, 3] = 500
    with pytest.raises(DistillError, match="first: 500"):
        Distiller(objective(0.5, 2.0))(student, teacher_of(build("llama", 1), student), batch)


def test_models_without_a_distribution_raise_an_error():
    from transformers import BertConfig, BertForPreTraining, BertForTokenClassification

    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    with pytest.raises(DistillError, match="BertForPreTraining cannot be distilled without `model_type`"):
        model_type_of(BertForPreTraining(BertConfig(**small)))
    with pytest.raises(DistillError, match="token classifier and is configured for regression"):
        model_type_of(BertForTokenClassification(BertConfig(**small, problem_type="regression")))


class TwoLogits(BertForSequenceClassification):
    """Returns logits of two classes although its config has five, as ShieldGemma 2 does."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask)
        outputs["logits"] = outputs.logits[:, 1:3]
        return outputs


@pytest.mark.parametrize("is_multi_teacher", [False, True])
def test_classifiers_with_different_numbers_of_classes_raise_an_error(is_multi_teacher):
    student, batch = build("sequence", 0), collate(rows("sequence", 4))
    two_class_model = TwoLogits(student.config)
    distiller, teacher = Distiller(objective(0.5, 2.0)), FrozenTeacher(two_class_model)
    if is_multi_teacher:
        teacher = MultiTeacher({"good": FrozenTeacher(build("sequence", 1)), "bad": teacher})
    teacher.prepare(student, torch.device("cpu"))
    with pytest.raises(DistillError, match="returns logits of 2 classes and the student of 5"):
        distiller(student, teacher, batch)
    if not is_multi_teacher:
        teacher = teacher_of(student, two_class_model)
        batch["labels"] %= 2
        with pytest.raises(DistillError, match="The teacher returns logits of 5 classes and the student of 2"):
            distiller(two_class_model, teacher, batch)


def test_a_wrapper_that_casts_the_output_of_the_head_does_not_round_the_loss():
    """FSDP2 with bf16 casts what its modules return, and the output head returns the loss."""
    student, teacher, batch = build("llama", 0), FrozenTeacher(build("llama", 1)), collate(rows("llama", 4))
    results = []
    for casts in (False, True):
        hook = student.lm_head.register_forward_hook(lambda *call: call[2].bfloat16()) if casts else None
        student.zero_grad()
        loss = Distiller(objective(0.5, 2.0))(student, teacher, dict(batch)).loss
        loss.backward()
        results.append((loss.detach(), student.model.embed_tokens.weight.grad.clone()))
        if hook is not None:
            hook.remove()
    assert results[1][0].dtype == torch.float32
    assert results[1][0] == results[0][0]
    assert torch.equal(results[1][1], results[0][1])
