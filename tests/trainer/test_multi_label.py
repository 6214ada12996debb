"""Multi-label classifiers: an independent Bernoulli for each label; a target is a row."""

import pytest
import torch
from tiny import build, collate, one_step, rows
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import Trainer

from hf_distill import DistillError
from hf_distill.cache import write_cache
from hf_distill.losses.bernoulli import bernoulli_kl
from hf_distill.teachers import CachedTeacher, EMATeacher


def model(seed: int, layers: int = 2, problem: str | None = "multi_label_classification", **options):
    classifier = build("sequence", seed, layers=layers, **options)
    classifier.config.problem_type = problem
    return classifier


def data(n: int = 32, seed: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [row | {"labels": torch.randint(0, 2, (5,), generator=generator).float()} for row in rows("sequence", n)]


@pytest.fixture
def multi_label(make_trainer):
    """`multi_label(alpha=0.3)`: a trainer of tiny multi-label classifiers."""

    def make(kind: str = "sequence", **options):
        arguments = {"model": model(0), "train_dataset": data(), "eval_dataset": data(7, 5)} | options
        if "cls" not in options and "teacher" not in options:
            arguments["teacher"] = model(1, layers=3)
        return make_trainer(kind, **arguments)

    return make


def reference_kl(student, teacher, temperature):
    """Each label is a distribution over two classes, of which the other one has the logit 0."""
    two = [torch.stack([z / temperature, torch.zeros_like(z)], -1).log_softmax(-1) for z in (student, teacher)]
    return (two[1].exp() * (two[1] - two[0])).sum((-1, -2))


def reference(student, teacher, batch, alpha, temperature):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    z, y = student(**inputs).logits, teacher(**inputs).logits.detach()
    soft = temperature**2 * reference_kl(z, y, temperature).mean()
    hard = binary_cross_entropy_with_logits(z, batch["labels"])
    return soft, hard, alpha * soft + (1 - alpha) * hard


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_bernoulli_kl_equals_that_of_two_classes_and_its_gradient_is_right(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (4 * torch.randn(6, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    values = bernoulli_kl(student, teacher, temperature=temperature)
    torch.testing.assert_close(values, reference_kl(student, teacher, temperature))
    assert torch.equal(bernoulli_kl(student, student), torch.zeros(6, dtype=torch.float64))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: bernoulli_kl(z, teacher, temperature=temperature), student)


def test_bernoulli_kl_is_finite_for_certain_labels():
    far = torch.tensor([[1e4, -1e4]])
    assert bernoulli_kl(far, -far).tolist() == [2e4]


@pytest.mark.parametrize("pieces", [(4, 2), (2, 4), (1, 8)])
def test_loss_and_gradient_equal_the_reference_for_any_micro_batches(multi_label, pieces):
    options = dict(alpha=0.3, temperature=2.0, train_sampling_strategy="sequential")
    log, gradient = one_step(multi_label, "sequence", *pieces, **options)
    student, teacher = model(0), model(1, layers=3)
    soft, hard, total = reference(student, teacher, collate(data()[:8]), 0.3, 2.0)
    total.backward()
    for name, value in (("soft_loss", soft), ("hard_loss", hard), ("loss", total)):
        assert log[name] == pytest.approx(value.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient[name], expected, rtol=1e-4, atol=1e-6)


STEPS = dict(max_steps=20, gradient_accumulation_steps=2, per_device_train_batch_size=2, logging_steps=5)


@pytest.mark.parametrize("options", [{"teacher": None}, {"alpha": 0.0}], ids=["no teacher", "alpha 0"])
def test_without_distillation_training_is_bit_identical_to_the_trainers(multi_label, options):
    results = []
    for arguments in ({"cls": Trainer}, options):
        trainer = multi_label(model=model(0, dropout=0.1), **STEPS, **arguments)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        results.append((losses, trainer.evaluate()["eval_loss"], trainer.model.state_dict()))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(results[0][2][name], value) for name, value in results[1][2].items())


def test_the_evaluation_is_over_all_rows_of_a_partial_batch(multi_label):
    trainer = multi_label(alpha=0.3, per_device_eval_batch_size=4, compute_metrics=lambda p: {"rows": len(p.label_ids)})
    metrics = trainer.evaluate()
    batch = collate(data(7, 5))
    student, teacher = model(0), model(1, layers=3)
    soft, hard, total = reference(student, teacher, batch, 0.3, 2.0)
    batch.pop("labels")
    z, y = student(**batch).logits, teacher(**batch).logits
    expected = {"loss": total, "soft_loss": soft, "hard_loss": hard, "kl": reference_kl(z, y, 1.0).mean(), "rows": 7}
    expected["agreement"] = ((z.sigmoid() > 0.5) == (y.sigmoid() > 0.5)).double().mean()
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(torch.as_tensor(value).item(), rel=1e-5)
    assert not {"eval_accuracy", "eval_perplexity", "eval_student_entropy"} & {*metrics}


def test_training_resumes_from_a_checkpoint(multi_label, tmp_path):
    options = dict(max_steps=4, save_steps=2, save_strategy="steps")
    whole = multi_label(folder="whole", **options)
    whole.train()
    resumed = multi_label(folder="resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(value, resumed.model.state_dict()[n]) for n, value in whole.model.state_dict().items())


def test_features_a_moving_teacher_and_a_saved_teacher_work(multi_label, tmp_path):
    trainer = multi_label(losses=[{"name": "hidden_mse"}, {"name": "bernoulli_kl", "weight": 0.5, "temperature": 1.0}])
    trainer.train()
    assert {"hidden_mse_loss", "bernoulli_kl_loss"} <= trainer.state.log_history[0].keys()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "bernoulli_kl" in card.replace("\\", "")
    assert "binary cross entropy" in card
    multi_label(teacher=EMATeacher()).train()
    model(1).save_pretrained(tmp_path / "teacher")
    multi_label(teacher=str(tmp_path / "teacher"), max_steps=1).train()


def row(labels):
    return [each | {"labels": labels} for each in data(4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {"teacher": model(1, problem=None)}, "sequence classifier and the student a multi-.*problem_type"),
        (lambda: {"model": model(0, problem=None)}, "multi-label classifier and the student a seq.*problem_type"),
        (lambda: {"divergence": "js"}, "js is for a distribution over ids.*independent labels.*bernoulli_kl"),
        (lambda: {"divergence": "forward_kl"}, "forward_kl is for"),
        (lambda: {"losses": [{"name": "reverse_kl"}]}, "reverse_kl is for"),
        (lambda: {"label_smoothing_factor": 0.1}, "binary_cross_entropy has no label smoothing"),
        (lambda: {"train_dataset": row(torch.tensor(1))}, "has dtype torch.int64"),
        (lambda: {"train_dataset": row(torch.zeros(3))}, "5 labels"),
        (lambda: {"train_dataset": [{"input_ids": each["input_ids"]} for each in data(4)]}, "no `labels`"),
    ],
)
def test_wrong_arguments_and_labels_are_refused(multi_label, options, message):
    with pytest.raises(DistillError, match=message):
        multi_label(**options(), max_steps=1).train()


def test_label_names_that_differ_are_refused(multi_label):
    teacher = model(1)
    teacher.config.id2label = dict(enumerate("abcde"))
    student = model(0)
    student.config.id2label = dict(enumerate("abcdf"))
    with pytest.raises(DistillError, match="Class 4 is 'e' for the teacher and 'f'"):
        multi_label(model=student, teacher=teacher)


def test_a_single_label_student_refuses_the_loss_of_independent_labels(make_trainer):
    with pytest.raises(DistillError, match="bernoulli_kl is for independent labels"):
        make_trainer("sequence", divergence="bernoulli_kl")


def test_floating_point_labels_of_a_single_label_student_are_explained(make_trainer):
    with pytest.raises(DistillError, match="problem_type='multi_label_classification'"):
        make_trainer("sequence", train_dataset=data(), max_steps=1).train()


def test_caches_are_refused(multi_label, make_trainer, tmp_path):
    with pytest.raises(DistillError, match="multi-label classifier, and a cache stores"):
        write_cache(tmp_path / "cache", model(1), rows("sequence", 4), collator=collate)
    write_cache(tmp_path / "classes", build("sequence", 1), rows("sequence", 4), collator=collate, kind="sampled")
    with pytest.raises(DistillError, match="CachedTeacher has targets that are tokens or classes only"):
        multi_label(teacher=CachedTeacher(str(tmp_path / "classes")))


def test_a_row_whose_loss_is_not_finite_is_skipped_and_reported(multi_label, caplog):
    nan = [each | {"labels": torch.full((5,), torch.nan)} for each in data(4)]
    trainer = multi_label(train_dataset=nan, max_steps=1)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert "hard: not finite for 4 of 4 tokens; first for example" in caplog.text


def test_a_student_in_bfloat16_trains_although_its_own_loss_is_rounded(multi_label):
    trainer = multi_label(model=model(0).bfloat16(), max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    assert 0 < trainer.evaluate()["eval_hard_loss"] < 2


@pytest.mark.parametrize("value", [-100.0, -1.0, 2.0])
def test_a_label_that_is_no_probability_is_refused(multi_label, value):
    rows = data(8)
    rows[0]["labels"][2] = value
    with pytest.raises(DistillError, match=r"1 of the labels of this batch are below 0 or above 1.*Unknown labels"):
        multi_label(train_dataset=rows, max_steps=2).train()
    rows[0]["labels"][2] = 0.3
    multi_label(train_dataset=rows, max_steps=2).train()
