"""Regression models and rerankers: real values for each row."""

import pytest
import torch
from tiny import build, collate, one_step, rows
from transformers import Trainer

from hf_distill import DistillError
from hf_distill.core.logits import DenseLogits
from hf_distill.core.targets import Targets
from hf_distill.losses.fused import ChunkedLoss
from hf_distill.losses.objective import objective
from hf_distill.losses.token_metrics import greater_is_better


def model(seed: int, outputs: int = 1, problem: str | None = None, layers: int = 2, **options):
    with torch.random.fork_rng():
        regression = build("sequence", seed, layers=layers, **options)
        torch.manual_seed(seed)
        regression.classifier = torch.nn.Linear(32, outputs)
    regression.num_labels = regression.config.num_labels = outputs
    regression.config.problem_type = problem
    return regression


def data(n: int = 32, seed: int = 1, shape: tuple = ()) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [row | {"labels": torch.randn(shape, generator=generator)} for row in rows("sequence", n)]


@pytest.fixture
def regression(make_trainer):
    """`regression(alpha=0.3)`: a trainer of tiny regression models."""

    def make(kind: str = "sequence", outputs: int = 1, **options):
        shape, problem = ((), None) if outputs == 1 else ((outputs,), "regression")
        arguments = {
            "model": model(0, outputs, problem),
            "train_dataset": data(shape=shape),
            "eval_dataset": data(7, 5, shape),
        } | options
        if "cls" not in options and "teacher" not in options:
            arguments["teacher"] = model(1, outputs, problem, layers=3)
        return make_trainer(kind, **arguments)

    return make


def reference(student, teacher, batch, alpha):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    s, t = student(**inputs).logits, teacher(**inputs).logits.detach()
    soft, hard = (s - t).square().mean(), (s - batch["labels"].reshape(s.shape)).square().mean()
    return soft, hard, alpha * soft + (1 - alpha) * hard


@pytest.mark.parametrize(("outputs", "micro", "number"), [(1, 4, 2), (1, 1, 8), (3, 2, 4)])
def test_loss_and_gradient_equal_the_reference_for_any_micro_batches(regression, outputs, micro, number):
    options = dict(outputs=outputs, alpha=0.3, train_sampling_strategy="sequential")
    log, gradient = one_step(regression, "sequence", micro, number, **options)
    problem, shape = (None, ()) if outputs == 1 else ("regression", (outputs,))
    student, teacher = model(0, outputs, problem), model(1, outputs, problem, layers=3)
    soft, hard, total = reference(student, teacher, collate(data(shape=shape)[:8]), 0.3)
    total.backward()
    for name, value in (("soft_loss", soft), ("hard_loss", hard), ("loss", total)):
        assert log[name] == pytest.approx(value.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient[name], expected, rtol=1e-4, atol=1e-6)


STEPS = dict(max_steps=20, gradient_accumulation_steps=2, per_device_train_batch_size=2, logging_steps=5)


@pytest.mark.parametrize("options", [{"teacher": None}, {"alpha": 0.0}], ids=["no teacher", "alpha 0"])
def test_without_distillation_training_is_bit_identical_to_the_trainers(regression, options):
    results = []
    for arguments in ({"cls": Trainer}, options):
        trainer = regression(model=model(0, dropout=0.1), **STEPS, **arguments)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        results.append((losses, trainer.evaluate()["eval_loss"], trainer.model.state_dict()))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(results[0][2][name], value) for name, value in results[1][2].items())


def test_the_evaluation_is_over_all_rows_of_a_partial_batch(regression):
    metrics = regression(alpha=0.3, per_device_eval_batch_size=4).evaluate()
    soft, hard, total = reference(model(0), model(1, layers=3), collate(data(7, 5)), 0.3)
    for name, value in {"loss": total, "soft_loss": soft, "hard_loss": hard, "teacher_mse": soft}.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-5)
    assert not {"eval_kl", "eval_agreement", "eval_perplexity", "eval_student_entropy"} & {*metrics}
    assert greater_is_better("eval_teacher_mse") is False


def test_training_resumes_from_a_checkpoint(regression, tmp_path):
    options = dict(max_steps=4, save_steps=2, save_strategy="steps")
    whole = regression(folder="whole", **options)
    whole.train()
    resumed = regression(folder="resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(value, resumed.model.state_dict()[n]) for n, value in whole.model.state_dict().items())


def test_the_card_names_the_losses_of_regression(regression, tmp_path):
    trainer = regression(max_steps=1)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "0.5 · mse + 0.5 · squared error, averaged" in card


@pytest.mark.parametrize("chunk_tokens", [None, 1, 5])
def test_margin_mse_compares_the_margins_of_pairs_for_any_chunk_size(chunk_tokens):
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(14, 1, dtype=torch.float64, generator=generator) for _ in range(2))
    targets = Targets.of_rows(torch.zeros(14))
    terms = objective(1.0, 2.0, "margin_mse", hard_loss="squared_error")
    loss = ChunkedLoss(DenseLogits(t), targets, terms, chunk_tokens=chunk_tokens)
    leaf = s.clone().requires_grad_()
    value = loss.from_logits(DenseLogits(leaf))
    (gradient,) = torch.autograd.grad(value, leaf)
    plain = s.clone().requires_grad_()
    pairs_s, pairs_t = plain.reshape(7, 2), t.reshape(7, 2)
    expected = torch.nn.functional.mse_loss(pairs_s[:, 0] - pairs_s[:, 1], pairs_t[:, 0] - pairs_t[:, 1])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, plain)[0])


def test_margin_mse_trains_a_reranker_and_its_self_check_passes(regression):
    trainer = regression(divergence="margin_mse", max_steps=1, per_device_train_batch_size=4, alpha=1.0,
                         train_sampling_strategy="sequential", chunk_tokens=3)  # fmt: skip
    trainer.train()
    batch = collate(data()[:4])
    batch.pop("labels")
    s, t = (net(**batch).logits.reshape(2, 2) for net in (model(0), model(1, layers=3)))
    expected = ((s[:, 0] - s[:, 1]) - (t[:, 0] - t[:, 1])).square().mean()
    assert trainer.state.log_history[0]["soft_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {"temperature": 3.0}, "temperature is 3.0, and .* real values"),
        (lambda: {"temperature": 2.0}, "temperature is 2.0, and .* real values"),
        (lambda: {"divergence": "js"}, "js is for a distribution .* real values: use mse or margin_mse"),
        (lambda: {"divergence": "bernoulli_kl"}, "bernoulli_kl is for independent labels"),
        (lambda: {"label_smoothing_factor": 0.1}, "squared_error has no label smoothing"),
        (lambda: {"teacher": build("sequence", 1)}, "sequence classifier and the student a regression model"),
        (lambda: {"teacher": model(1, 3, "regression")}, "3 classes and the student 1"),
        (lambda: {"divergence": "margin_mse", "per_device_train_batch_size": 3}, "a batch has 3 rows"),
        (lambda: {"divergence": "margin_mse", "outputs": 3}, "the models have 3: use mse"),
        (lambda: {"train_dataset": data(shape=(2,))}, "1 numbers"),
        (lambda: {"train_dataset": rows("sequence", 4)}, "has dtype torch.int64"),
    ],
)
def test_wrong_arguments_and_labels_are_refused(regression, options, message):
    with pytest.raises(DistillError, match=message):
        regression(**options(), max_steps=1).train()


def test_one_class_of_a_single_label_classifier_is_no_regression(make_trainer):
    student, teacher = (model(i, 1, "single_label_classification") for i in range(2))
    one = [row | {"labels": torch.tensor(0)} for row in rows("sequence", 4)]
    trainer = make_trainer("sequence", model=student, teacher=teacher, train_dataset=one, max_steps=1)
    assert [term.loss.name for term in trainer.distiller.terms] == ["forward_kl", "cross_entropy"]
