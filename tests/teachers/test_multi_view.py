"""The student on another view of the batch is the teacher."""

from types import SimpleNamespace

import pytest
import torch
from tiny import KINDS, build, collate, rows
from transformers import TrainerCallback

from hf_distill import DistillError
from hf_distill.core.targets import Targets
from hf_distill.teachers import MultiViewTeacher
from hf_distill.teachers.multi_view import BatchView

TOKENIZER = SimpleNamespace(mask_token_id=7)


def teacher(view_for="student", **view) -> MultiViewTeacher:
    return MultiViewTeacher(view or {"token_dropout": 0.3}, view_for=view_for, processing_class=TOKENIZER)


def kl(teacher_logits, student_logits, temperature=2.0):
    p, q = (torch.log_softmax(x / temperature, -1) for x in (teacher_logits, student_logits))
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("changed", ["student", "teacher"])
@pytest.mark.parametrize(
    "view",
    [
        {"token_dropout": 0.3},
        {"span_deletion": 0.5},
        {"prepend_context_tokens": 4},
        {"token_dropout": 0.2, "prepend_context_tokens": 3},
    ],
)
def test_the_loss_compares_both_views_token_by_token(make_trainer, view, changed):
    data = rows("llama", 8, length=30)
    for row in data:
        row["labels"][:20] = -100  # a context, which span_deletion needs
        row["labels"][-3:] = row["input_ids"][-3:]
    options = dict(max_steps=1, train_sampling_strategy="sequential", train_dataset=data)
    trainer = make_trainer(teacher=teacher(changed, **view), **options)
    batch = collate(trainer.train_dataset[:4])
    targets = Targets.from_batch(batch, shift=True)
    view_batch, view_targets = BatchView(**view)(batch, targets, 0, 7)
    both = [(batch, targets), (view_batch, view_targets)]
    student, other = both[::-1] if changed == "student" else both
    model = build("llama", 0).eval()
    student_logits, teacher_logits = (
        t.gather(model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits)
        for b, t in (student, other)
    )
    hard = torch.nn.functional.cross_entropy(student_logits, targets.labels)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["soft_loss"] == pytest.approx(kl(teacher_logits, student_logits).mean().item(), rel=1e-4)
    assert log["hard_loss"] == pytest.approx(hard.item(), rel=1e-4)
    assert log["soft_loss"] > 1e-4


@pytest.mark.parametrize("changed", ["student", "teacher"])
@pytest.mark.parametrize("view", [{"token_dropout": 0.3}, {"span_deletion": 0.5}, {"prepend_context_tokens": 4}])
def test_hidden_states_are_compared_token_by_token(make_trainer, view, changed):
    data = rows("llama", 8, length=30)
    for row in data:
        row["labels"][:20] = -100
    losses = [{"name": "hidden_mse", "weight": 1.0, "layers": [[1, 1]]}]
    options = dict(max_steps=1, train_sampling_strategy="sequential", train_dataset=data, losses=losses)
    trainer = make_trainer(teacher=teacher(changed, **view), eval_dataset=data[:4], learning_rate=0.0, **options)
    trainer.train()
    batch = collate(data[:4])
    targets = Targets.from_batch(batch, shift=True)
    view_batch, view_targets = BatchView(**view)(batch, targets, 0, 7)
    model = build("llama", 0).eval()
    outputs: list = []
    model.model.layers[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    for b in (batch, view_batch):
        model.model(input_ids=b["input_ids"], attention_mask=b["attention_mask"])
    one, other = (
        t.gather(h if isinstance(h, torch.Tensor) else h[0])
        for t, h in zip((targets, view_targets), outputs, strict=True)
    )
    expected = (one - other).square().mean(-1).mean().item()
    assert expected > 1e-3
    assert trainer.state.log_history[0]["hidden_mse_loss"] == pytest.approx(expected, rel=1e-4)
    assert trainer.evaluate()["eval_hidden_mse_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "view", "loss", "refused"),
    [
        ("llama", {"prepend_context_tokens": 4}, "value_relation", True),
        ("llama", {"token_dropout": 0.3}, "value_relation", False),
        ("sequence", {"span_deletion": 0.3}, "hidden_mse", True),
        ("sequence", {"token_dropout": 0.3}, "hidden_mse", False),
        ("token", {"span_deletion": 0.3}, "hidden_mse", False),
    ],
)
def test_features_of_other_tokens_are_refused(make_trainer, kind, view, loss, refused):
    options = dict(losses=[{"name": loss, "weight": 1.0}], max_steps=1)
    if refused:
        with pytest.raises(DistillError, match=f"{loss} compares every token of a row"):
            make_trainer(kind, teacher=teacher(**view), **options)
        both = {"view": teacher(**view), "other": build(kind, 1)}
        with pytest.raises(DistillError, match=f"view: {loss} compares every token of a row"):
            make_trainer(kind, teacher=both, **options)
    else:
        make_trainer(kind, teacher=teacher(**view), **options).train()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sequence"])
def test_every_kind_of_model_trains(make_trainer, kind):
    trainer = make_trainer(kind, teacher=teacher())
    trainer.train()
    assert trainer.state.log_history[0]["soft_loss"] > 0


def test_evaluation_uses_the_original_batch_and_measures_the_effect_of_the_view(make_trainer):
    trainer = make_trainer(teacher=teacher())
    metrics, again = trainer.evaluate(), trainer.evaluate()
    clean = make_trainer(teacher=build("llama", 1), folder="clean").evaluate()
    assert metrics["eval_perplexity"] == pytest.approx(clean["eval_perplexity"], rel=1e-5)
    assert metrics["eval_kl"] == again["eval_kl"] > 1e-3


def test_a_resumed_run_equals_an_uninterrupted_run(make_trainer):
    options = dict(max_steps=6, save_strategy="steps", save_steps=3, learning_rate=1e-2)
    straight = make_trainer(teacher=teacher(), folder="straight", **options)
    straight.train()
    again = make_trainer(teacher=teacher(), folder="again", **options)
    again.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-3")
    assert all(torch.equal(p, q) for p, q in zip(straight.model.parameters(), again.model.parameters(), strict=True))


def test_no_gradient_passes_through_the_teacher(make_trainer):
    class Watch(TrainerCallback):
        grads = None

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.grads = self.grads or [p.grad.clone() for p in model.parameters()]

    watch = Watch()
    options = dict(max_steps=1, max_grad_norm=0, train_sampling_strategy="sequential", alpha=1.0)
    trainer = make_trainer(teacher=teacher(), callbacks=[watch], **options)
    batch = collate(trainer.train_dataset[:4])
    trainer.train()
    targets = Targets.from_batch(batch, shift=True)
    view_batch, view_targets = BatchView(token_dropout=0.3)(batch, targets, 0, 7)
    model = build("llama", 0)
    with torch.no_grad():
        teacher_logits = targets.gather(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        )
    student_logits = view_targets.gather(
        model(input_ids=view_batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    )
    kl(teacher_logits, student_logits).mean().backward()
    for grad, p in zip(watch.grads, model.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-6)


def test_bad_options_are_refused(make_trainer):
    with pytest.raises(DistillError, match="view_for is 'both'; it must be 'student' or 'teacher'"):
        teacher("both")
    with pytest.raises(DistillError, match="view does not change the batch"):
        MultiViewTeacher({})
    with pytest.raises(DistillError, match="token_dropout needs a tokenizer"):
        make_trainer(teacher=MultiViewTeacher({"token_dropout": 0.1}))
    long = make_trainer(teacher=teacher(prepend_context_tokens=60), train_dataset=rows("llama", 8, length=60))
    long.train_dataset = [{k: torch.cat([v, v, v, v, v])[:60] for k, v in row.items()} for row in rows("llama", 8)]
    with pytest.raises(DistillError, match="lower prepend_context_tokens"):
        long.train()
