"""Metrics of an evaluation by the type of the student, against sklearn and scipy on the predictions of the models."""

import numpy as np
import pytest
import torch
import transformers as tf
from huggingface_hub import ModelCard
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, jaccard_score
from tiny import build, rows

from hf_distill import DistillConfig
from hf_distill.losses.evaluation_metrics import class_counts, macro_f1, mean_iou, micro_f1, pearson, spearman
from hf_distill.losses.token_metrics import greater_is_better

BERT = dict(vocab_size=97, hidden_size=16, num_attention_heads=2, intermediate_size=32, initializer_range=0.5)
CLASSES = {
    "row": tf.BertForSequenceClassification,
    "token": tf.BertForTokenClassification,
    "choice": tf.BertForMultipleChoice,
    "labels": tf.BertForSequenceClassification,
    "number": tf.BertForSequenceClassification,
    "span": tf.BertForQuestionAnswering,
}
LENGTH = 6


def model(kind: str, seed: int):
    tf.set_seed(seed)
    options = {"number": {"num_labels": 1}, "labels": {"problem_type": "multi_label_classification"}}.get(kind, {})
    sizes = {"num_labels": 2} if kind == "span" else {"num_labels": 4}
    return CLASSES[kind](tf.BertConfig(**BERT, num_hidden_layers=1 + seed, **sizes | options)).eval()


def data(kind: str, n: int = 11) -> list[dict]:
    g = torch.Generator().manual_seed(3)
    out = []
    for _ in range(n):
        shape = (3, LENGTH) if kind == "choice" else (LENGTH,)
        row = {"input_ids": torch.randint(5, 97, shape, generator=g)}
        row["attention_mask"] = torch.ones(shape, dtype=torch.long)
        if kind == "span":
            row |= {f"{name}_positions": torch.randint(0, 3, (), generator=g) for name in ("start", "end")}
        elif kind == "token":
            row["labels"] = torch.randint(0, 3, (LENGTH,), generator=g)
            row["labels"][torch.rand(LENGTH, generator=g) < 0.3] = -100
        elif kind == "labels":
            row["labels"] = (torch.rand(4, generator=g) < 0.4).float()
        elif kind == "number":
            row["labels"] = torch.randint(0, 4, (), generator=g).float() + 1000  # ties, and far from 0
        else:
            row["labels"] = torch.randint(0, 3, (), generator=g)
        out.append(row)
    return out


def outputs(kind: str, seed: int) -> np.ndarray:
    batch = {k: torch.stack([row[k] for row in data(kind)]) for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        result = model(kind, seed)(**batch)
    return torch.stack([result.start_logits, result.end_logits], 1).numpy() if kind == "span" else result.logits.numpy()


def expected(kind: str) -> dict[str, float]:
    student, teacher = outputs(kind, 0), outputs(kind, 1)
    names = ("start_positions", "end_positions") if kind == "span" else ("labels",)
    labels = np.stack([np.stack([row[name].numpy() for name in names], -1) for row in data(kind)])
    out = {}
    for prefix, values in (("", student), ("teacher_", teacher)):
        if kind == "span":
            out[f"{prefix}exact_match"] = (values.argmax(-1) == labels).all(-1).mean()
        elif kind == "number":
            out[f"{prefix}pearson"] = stats.pearsonr(values[:, 0], labels[:, 0]).statistic
            out[f"{prefix}spearman"] = stats.spearmanr(values[:, 0], labels[:, 0]).statistic
        elif kind == "labels":
            out[f"{prefix}f1"] = f1_score(labels[..., 0], values > 0, average="micro")
        else:
            counts = labels[..., 0] != -100
            y, p = labels[..., 0][counts], values.argmax(-1)[counts]
            out[f"{prefix}accuracy"] = accuracy_score(y, p)
            out |= {} if kind == "choice" else {f"{prefix}f1": f1_score(y, p, average="macro")}
    if kind == "number":
        for measure in (stats.pearsonr, stats.spearmanr):
            name = measure.__name__.removesuffix("r")
            out[f"agreement_{name}"] = measure(student[:, 0], teacher[:, 0]).statistic
    return out


NAMES = ("accuracy", "f1", "pearson", "spearman", "exact_match", "perplexity")


@pytest.fixture
def make(make_trainer):
    """`make("row")`: a trainer of tiny models of a kind."""

    def make(kind, **options):
        arguments = {"model": model(kind, 0), "teacher": model(kind, 1), "train_dataset": data(kind)}
        arguments |= {"eval_dataset": data(kind), "per_device_eval_batch_size": 4}  # the last batch has 3 rows
        return make_trainer("sequence", **arguments | options)

    return make


@pytest.mark.parametrize("kind", CLASSES)
def test_the_metrics_of_an_evaluation_equal_sklearn_and_scipy(make, kind):
    metrics = make(kind).evaluate()
    of_type = {k.removeprefix("eval_"): v for k, v in metrics.items() if k.endswith(NAMES)}
    assert of_type == pytest.approx(expected(kind), abs=1e-5)


@pytest.mark.parametrize("kind", ["row", "number"])
def test_rows_repeated_to_fill_the_last_batch_do_not_count(make, kind):
    trainer = make(kind)
    gather = trainer.accelerator.gather_for_metrics

    def gather_from_two_processes(table):  # the second process has the same rows, and the last batch is not full
        is_last = trainer.accelerator.gradient_state.end_of_dataloader
        return torch.cat([table, table])[: None if not is_last else len(table)] if table.dim() == 2 else gather(table)

    trainer.accelerator.gather_for_metrics = gather_from_two_processes
    metrics = trainer.evaluate()
    order = [*range(4), *range(4), *range(4, 8), *range(4, 8), *range(8, 11)]
    student, labels = outputs(kind, 0)[order], np.stack([row["labels"].numpy() for row in data(kind)])[order]
    if kind == "row":
        assert metrics["eval_f1"] == pytest.approx(f1_score(labels, student.argmax(-1), average="macro"))
    else:
        assert metrics["eval_spearman"] == pytest.approx(stats.spearmanr(student[:, 0], labels).statistic)


def test_f1_and_iou_leave_out_classes_that_do_not_occur_and_targets_that_are_not_measured():
    g = torch.Generator().manual_seed(0)
    labels, predictions = (torch.randint(0, 4, (30,), generator=g) for _ in range(2))
    measured = torch.arange(30) < 25
    tables = class_counts(labels, predictions.float(), measured.float(), torch.arange(30) // 3, 10, 6)
    counts = {name: table.sum(0) for name, table in tables.items()}
    y, p = labels[measured], predictions[measured]
    assert macro_f1(counts) == pytest.approx(f1_score(y, p, average="macro"))
    assert mean_iou(counts) == pytest.approx(jaccard_score(y, p, average="macro"))


def test_a_metric_of_the_user_is_kept(make):
    metrics = make("row", compute_metrics=lambda p: {"f1": 7.0, "mine": 8.0}).evaluate()
    assert (metrics["eval_f1"], metrics["eval_mine"]) == (7.0, 8.0)
    assert metrics["eval_accuracy"] == pytest.approx(expected("row")["accuracy"])


def test_undefined_metrics_are_left_out(make):
    constant = [row | {"labels": torch.tensor(2.0)} for row in data("number")]
    metrics = make("number", eval_dataset=constant).evaluate()
    assert {k for k in metrics if k.endswith(("pearson", "spearman"))} == {
        "eval_agreement_pearson",
        "eval_agreement_spearman",
    }
    numbers = torch.tensor([1.0, 2.0, 2.0, 5.0])
    for undefined in (torch.ones(4), torch.tensor([1.0, 2.0, torch.nan, 3.0])):
        assert pearson(numbers, undefined) is None
        assert spearman(numbers, undefined) is None
    assert pearson(numbers[:1], numbers[:1]) is None
    zeros = torch.zeros(3)
    assert macro_f1({"true_positives": zeros, "predicted": zeros, "labeled": zeros}) is None
    assert micro_f1(0.0, 0.0, 0.0) is None


def test_a_language_model_has_perplexity_and_no_accuracy(make_trainer):
    trainer = make_trainer("llama", teacher=build("llama", 1), eval_dataset=rows("llama", 4))
    assert {k for k in trainer.evaluate() if k.endswith(NAMES)} == {"eval_perplexity", "eval_teacher_perplexity"}


def test_training_logs_have_no_sums_of_predictions(make):
    for kind in ("row", "labels", "number", "span"):
        trainer = make(kind, max_steps=1, logging_steps=1)
        trainer.train()
        log = next(log for log in trainer.state.log_history if "soft_loss" in log)
        assert not {k for k in log if "prediction" in k or "label" in k or "positives" in k or k == "predicted"}


@pytest.mark.parametrize("metric", ["accuracy", "teacher_f1", "pearson", "agreement_spearman", "exact_match"])
def test_the_greatest_value_is_the_best(metric, tmp_path):
    assert greater_is_better(f"eval_{metric}") is True
    assert DistillConfig(str(tmp_path), metric_for_best_model=metric).greater_is_better is True


@pytest.mark.parametrize(("kind", "unit"), [("row", "nats/row"), ("number", None), ("span", "nats/position")])
def test_cards_have_the_metrics_and_the_unit_of_the_type(make, kind, unit, tmp_path):
    trainer = make(kind, max_steps=1)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    ids = {"row": ["accuracy", "f1"], "number": ["pearsonr", "spearmanr"], "span": ["exact_match"]}[kind]
    assert card.data.metrics == ids
    assert set(ids) <= {result.metric_type for result in card.data.eval_results}
    assert "token" not in card.text.partition("Arguments that differ")[0]
    assert unit is None or unit in card.text
