"""Weights of rows, and losses that depend on the author of the target tokens, against naive references."""

import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from test_distiller import gradients, teacher_of
from test_synchronization import ONE_READ, reads_of_steps
from tiny import build, collate, one_step, rows
from transformers import DataCollatorWithFlattening, default_data_collator

from hf_distill import DistillConfig, DistillError, DistillTrainer, FrozenTeacher
from hf_distill.core.row_values import ORIGINS
from hf_distill.data import Collator, mix, pack, tokenize_dataset
from hf_distill.data.row_values import RowValuesCollator
from hf_distill.losses.objective import objective
from hf_distill.teachers import MTPTeacher, MultiTeacher, PeerTeacher, RoutedTeacher
from hf_distill.trainer.distiller import Distiller

BY_ORIGIN = {
    "teacher": {"divergence": {"name": "skew_kl", "lam": 0.1}, "alpha": 0.9},
    "student": {"divergence": "reverse_kl", "alpha": 1.0},
}


def naive_loss(student, teacher, batch, alpha=0.5, temperature=2.0, by_origin=None):
    """Sum over target tokens of weight * objective of their origin, over their number, in a loop with dense logits."""
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    s = student(**inputs).logits
    with torch.no_grad():
        t = teacher(**inputs).logits
    total, count = 0.0, 0
    for row in range(len(s)):
        weight = batch["weight"][row] if "weight" in batch else 1.0
        spec = (by_origin or {}).get(ORIGINS[batch["origin"][row]] if "origin" in batch else None, {})
        of_row, name = spec.get("alpha", alpha), spec.get("divergence", "forward_kl")
        for position in range(s.shape[1] - 1):
            label = batch["labels"][row, position + 1]
            if label == -100 or batch["attention_mask"][row, position] == 0:
                continue
            p, q = (logits[row, position].div(temperature).softmax(-1) for logits in (s, t))
            if name == "forward_kl":
                soft = (q * (q / p).log()).sum()
            elif name == "reverse_kl":
                soft = (p * (p / q).log()).sum()
            else:
                mixed = name["lam"] * q + (1 - name["lam"]) * p
                soft = (q * (q / mixed).log()).sum()
            hard = F.cross_entropy(s[row, position], label)
            total = total + weight * (of_row * temperature**2 * soft + (1 - of_row) * hard)
            count += 1
    return total / count


def batch_of(n=5, origin=False, weight=True):
    batch = collate(rows("llama", n))
    generator = torch.Generator().manual_seed(0)
    if weight:
        batch["weight"] = torch.rand(n, generator=generator) * 3
        batch["weight"][1] = 0.0
    if origin:
        batch["origin"] = torch.arange(n) % 3
    return batch


def models():
    return build("llama", 0).double(), build("llama", 1, layers=3, width=48).double()


def assert_equal_gradients(ours, naive, **tolerance):
    assert ours.keys() == naive.keys()
    for name, gradient in naive.items():
        torch.testing.assert_close(ours[name], gradient, **(tolerance or {"rtol": 1e-9, "atol": 1e-12}))


@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("origin", [False, True])
def test_loss_and_gradients_equal_those_of_a_naive_loop(keep_logits, origin):
    student, teacher = models()
    batch = batch_of(origin=origin)
    by_origin = BY_ORIGIN if origin else None
    terms = DistillConfig("unused", by_origin=by_origin).terms()
    step = Distiller(terms, chunk_tokens=3)(
        student, teacher_of(teacher, student), batch, keep_logits=keep_logits, statistics_every=1
    )
    naive = naive_loss(student, teacher, batch, by_origin=by_origin)
    assert step.loss.item() == pytest.approx(naive.item(), rel=1e-9)
    assert_equal_gradients(gradients(student, step.loss), gradients(student, naive))
    weighted = sum(term.weight * step.per_token[term.name].sum() for term in terms) / len(step.targets)
    assert origin or step.loss.item() == pytest.approx(weighted.item(), rel=1e-6)


def test_several_teachers_and_origins_equal_a_naive_loop():
    student, teacher = models()
    batch = batch_of(origin=True)
    other = build("llama", 2).double()
    terms = DistillConfig("unused", by_origin=BY_ORIGIN).terms()
    terms = [terms[0].with_share("soft_a", "a", 0.25), terms[0].with_share("soft_b", "b", 0.75), *terms[1:]]
    group = MultiTeacher({"a": FrozenTeacher(teacher), "b": FrozenTeacher(other)})
    group.prepare(student, torch.device("cpu"))
    step = Distiller(terms)(student, group, batch)
    parts = [
        share * naive_loss(student, each, batch, by_origin=BY_ORIGIN)
        for share, each in ((0.25, teacher), (0.75, other))
    ]
    assert step.loss.item() == pytest.approx(sum(parts).item(), rel=1e-9)


@pytest.mark.parametrize("losses", [[], [{"name": "hidden_mse", "weight": 0.1}]], ids=["logits", "features"])
def test_weights_of_one_change_no_bit(make_trainer, losses):
    plain, ones = rows("llama", 8), [row | {"weight": torch.tensor(1.0)} for row in rows("llama", 8)]
    results = [
        one_step(make_trainer, "llama", 4, 2, train_dataset=data, losses=losses, remove_unused_columns=False)
        for data in (plain, ones)
    ]
    assert results[0][0]["loss"] == results[1][0]["loss"]
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


@pytest.mark.parametrize("teacher", ["frozen", "peer", "mtp", "routed"])
def test_a_weight_multiplies_the_gradient_of_its_row_with_every_kind_of_teacher(make_trainer, teacher):
    """The gradient is linear in the weights: that of (2, 0) and of (0, 3) sum to that of (2, 3)."""

    def gradient(*weights):
        data = [row | {"weight": torch.tensor(w)} for row, w in zip(rows("llama", 2), weights, strict=True)]
        a, b = build("llama", 1, layers=3, width=48), build("llama", 2)
        made = {
            "frozen": lambda: FrozenTeacher(a),
            "peer": lambda: PeerTeacher(b),
            "mtp": lambda: MTPTeacher(1),
            "routed": lambda: RoutedTeacher({"a": a, "b": b}),
        }[teacher]()
        if teacher == "routed":
            data = [row | {"teacher_index": torch.tensor(i)} for i, row in enumerate(data)]
        alpha = 0.0 if teacher == "mtp" else 0.5
        return one_step(
            make_trainer, "llama", 2, 1, train_dataset=data, teacher=made, alpha=alpha, remove_unused_columns=False
        )[1]

    first, second, both = gradient(2.0, 0.0), gradient(0.0, 3.0), gradient(2.0, 3.0)
    for name in both:
        torch.testing.assert_close(first[name] + second[name], both[name], rtol=1e-4, atol=1e-6)
        assert first[name].abs().sum() > 0 or both[name].abs().sum() == 0, name


def data_rows(n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        ids = torch.randint(3, 97, (4 + i % 7,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]], "weight": 0.25 * (i % 5), "origin": i % 3})
    return Dataset.from_list(made)


def train_step(folder, data, size, pieces):
    student, teacher = models()
    config = DistillConfig(
        str(folder), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=pieces, optim="sgd",
        learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
        report_to="none", dataloader_pin_memory=False, remove_unused_columns=False, by_origin=BY_ORIGIN,
    )  # fmt: skip
    trainer = DistillTrainer(student, config, teacher=teacher, train_dataset=data, data_collator=Collator(0))
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    trainer.train()
    return trainer.state.log_history[0], {n: before[n] - p.detach() for n, p in student.named_parameters()}


def test_micro_batches_and_packing_change_neither_loss_nor_gradient(tmp_path):
    data = data_rows()
    batch = Collator(0)(list(data))
    batch["attention_mask"] = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    student, teacher = models()
    naive = naive_loss(student, teacher, batch, by_origin=BY_ORIGIN)
    expected = gradients(student, naive)
    packed = pack(data, 24)
    layouts = {"one": (data, 12, 1), "four": (data, 3, 4), "packed": (packed, len(packed), 1)}
    for name, (part, size, pieces) in layouts.items():
        log, gradient = train_step(tmp_path / name, part, size, pieces)
        assert log["loss"] == pytest.approx(naive.item(), rel=1e-4), name  # logs are rounded
        assert_equal_gradients(gradient, expected, rtol=1e-5, atol=1e-7)
        for origin in ORIGINS:
            assert log[f"soft_loss_origin_{origin}"] >= 0


def test_evaluation_is_unweighted_and_its_loss_has_the_alpha_of_each_origin(make_trainer):
    data = [
        row | {"weight": torch.tensor(5.0), "origin": torch.tensor(i % 3)} for i, row in enumerate(rows("llama", 6))
    ]
    teacher = build("llama", 1, layers=3, width=48)
    trainer = make_trainer(
        "llama", eval_dataset=data, teacher=teacher, by_origin=BY_ORIGIN, remove_unused_columns=False
    )
    metrics = trainer.evaluate()
    batch = collate([{k: v for k, v in row.items() if k != "weight"} for row in data])
    naive = naive_loss(trainer.model, teacher, batch, by_origin=BY_ORIGIN)
    assert metrics["eval_loss"] == pytest.approx(naive.item(), rel=1e-5)
    without = [{k: v for k, v in row.items() if k not in ("weight", "origin")} for row in data]
    as_data = naive_loss(trainer.model, teacher, collate(without))
    assert trainer.evaluate(without)["eval_loss"] == pytest.approx(as_data.item(), rel=1e-5)


def test_sources_of_a_mixture_named_as_origins_are_the_origins(tmp_path):
    plain = data_rows(24).remove_columns(["weight", "origin"])
    parts = {"data": plain.select(range(12)), "teacher": plain.select(range(12, 24))}
    mixed = mix(parts, {"data": 1.0, "teacher": 1.0}, seed=0)
    by_source = mixed.map(lambda row: {"origin": 2 if row["source"] == 0 else 0}).remove_columns("source")
    results = []
    for name, data, collator in (("a", mixed, Collator(0, ("data", "teacher"))), ("b", by_source, Collator(0))):
        student, teacher = models()
        config = DistillConfig(
            str(tmp_path / name), max_steps=1, per_device_train_batch_size=8, logging_steps=1, save_strategy="no",
            report_to="none", dataloader_pin_memory=False, by_origin=BY_ORIGIN, remove_unused_columns=False,
        )  # fmt: skip
        trainer = DistillTrainer(student, config, teacher=teacher, train_dataset=data, data_collator=collator)
        trainer.train()
        results.append(trainer.state.log_history[0])
    assert results[0]["loss"] == results[1]["loss"]
    assert results[0]["soft_loss_origin_teacher"] == results[1]["soft_loss_origin_teacher"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"techer": {"alpha": 1}}, "by_origin has 'techer', which is no origin; did you mean 'teacher'"),
        ({"teacher": {"beta": 1}}, r"by_origin\['teacher'\] is .* keys divergence, alpha"),
        ({"teacher": {}}, r"by_origin\['teacher'\] is"),
        ({"teacher": {"alpha": 2}}, r"by_origin\['teacher'\]: alpha is 2"),
        ({"data": {"divergence": "forwad_kl"}}, r"by_origin\['data'\]: .*did you mean 'forward_kl'"),
        ("{", "by_origin is not JSON"),
    ],
)
def test_wrong_values_of_by_origin_are_named(value, message):
    with pytest.raises(DistillError, match=message):
        DistillConfig("unused", by_origin=value)


def test_by_origin_does_not_work_with_other_tokenizers_trained_or_routed_teachers(make_trainer):
    with pytest.raises(DistillError, match=r"by_origin chooses .* cross_tokenizer is set"):
        DistillConfig("unused", by_origin=BY_ORIGIN, cross_tokenizer="alm")
    routed = RoutedTeacher({"a": build("llama", 1), "b": build("llama", 2)})
    for teacher, reason in (
        (PeerTeacher(build("llama", 2)), "the"),
        (routed, "different rows have different teachers"),
    ):
        with pytest.raises(DistillError, match=f"by_origin is set, and {reason}"):
            make_trainer("llama", teacher=teacher, by_origin=BY_ORIGIN)
    with pytest.raises(DistillError, match="generates no text"):
        make_trainer("token", teacher=build("token", 1), by_origin=BY_ORIGIN)


def test_training_rows_without_an_origin_are_refused(make_trainer):
    trainer = make_trainer("llama", by_origin=BY_ORIGIN)
    with pytest.raises(DistillError, match="by_origin is set, and the batch has no `origin`"):
        trainer.train()


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, None, "1", True])
def test_wrong_weights_are_refused(weight):
    rows_of = [{"input_ids": [5, 6], "labels": [5, 6], "weight": w} for w in (1.0, weight)]
    with pytest.raises(DistillError, match="column weight: it must be a finite number of at least 0"):
        Collator(0)(rows_of)


def test_rows_without_a_weight_and_unknown_origins_are_refused():
    row = {"input_ids": [5, 6], "labels": [5, 6]}
    with pytest.raises(DistillError, match=r"column weight: .* found None"):
        Collator(0)([row | {"weight": 1.0}, row])
    with pytest.raises(DistillError, match=r"column origin: .* found 'techer', which is no origin; did you mean"):
        Collator(0)([row | {"origin": "techer"}])
    part = Dataset.from_list([row])
    with pytest.raises(DistillError, match="The sources b have no column `weight`, but the others do"):
        mix({"a": part.add_column("weight", [1.0]), "b": part}, {"a": 1, "b": 1}, seed=0)


def test_terms_without_origins_are_those_of_before():
    assert DistillConfig("unused").terms() == objective(0.5, 2.0)


@pytest.mark.parametrize("kind", ["bert", "t5", "sequence", "token"])
def test_weights_multiply_the_losses_of_every_model_type(make_trainer, kind):
    """Also those on features of all tokens of a row, for which targets are not the compared tokens."""
    losses = [{"name": "value_relation", "weight": 0.1, **({"stack": "encoder"} if kind == "t5" else {})}]

    def gradient(*weights):
        data = [row | {"weight": torch.tensor(w)} for row, w in zip(rows(kind, 2), weights, strict=True)]
        return one_step(make_trainer, kind, 2, 1, train_dataset=data, losses=losses, remove_unused_columns=False)[1]

    first, second, both = gradient(2.0, 0.0), gradient(0.0, 3.0), gradient(2.0, 3.0)
    for name in both:
        torch.testing.assert_close(first[name] + second[name], both[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(first[name], both[name]) for name in both)


@pytest.mark.parametrize("teacher", [None, "llama"])
def test_labels_alone_are_weighted_without_the_help_of_a_teacher(make_trainer, teacher):
    data = [row | {"weight": torch.tensor(float(i))} for i, row in enumerate(rows("llama", 4))]
    options = {"alpha": 0.0, "teacher": None if teacher is None else build(teacher, 1)}
    log, gradient = one_step(make_trainer, "llama", 2, 2, train_dataset=data, **options)
    student = build("llama", 0)
    naive = naive_loss(student, build("llama", 1), collate(data), alpha=0.0)
    assert log["loss"] == pytest.approx(naive.item(), rel=1e-4)
    assert_equal_gradients(gradient, gradients(student, naive), rtol=1e-4, atol=1e-6)


def test_a_trainer_without_a_teacher_refuses_weights_that_it_did_not_see(make_trainer):
    def add_weight(batch):
        return collate(batch) | {"weight": torch.ones(len(batch))}

    trainer = make_trainer("llama", alpha=0.0, data_collator=add_weight)
    with pytest.raises(DistillError, match="The batch has `weight`, and the trainer has no teacher"):
        trainer.train()


def test_a_collator_that_does_not_know_the_columns_gets_them_added(tmp_path):
    data = data_rows(6)
    batches = {}
    for name, collator in {
        "padded": default_data_collator,
        "flat": DataCollatorWithFlattening(),
    }.items():
        equal = [{k: v[:4] if isinstance(v, list) else v for k, v in row.items()} for row in data]
        batches[name] = RowValuesCollator(collator)(equal)
    assert batches["padded"]["weight"].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0, 0.0]
    assert batches["flat"]["origin"].tolist() == [[i % 3 for i in range(6) for _ in range(4)]]
    with pytest.raises(DistillError, match="The collator made labels of shape"):
        RowValuesCollator(lambda rows: {"labels": torch.zeros(3, 5)})(list(data))


def test_tokenized_rows_keep_weights_and_origins(smollm2_tokenizer):
    examples = [
        {"prompt": f"Question {i}?", "completion": f" Answer {i}.", "weight": i / 2, "origin": ORIGINS[i % 3]}
        for i in range(4)
    ]
    made = tokenize_dataset(Dataset.from_list(examples), smollm2_tokenizer, 32)
    assert made["weight"] == [0.0, 0.5, 1.0, 1.5]
    assert made["origin"] == [0, 1, 2, 0]
    for column, value, message in (
        ("weight", -1.0, "row 1 .*column weight: .* found -1.0"),
        ("weight", None, "row 1 .*column weight: .* found None"),
        ("origin", "human", "row 1 .*column origin: .* found 'human', which is no origin; known: data, student"),
    ):
        wrong = [*examples]
        wrong[1] = examples[1] | {column: value}
        with pytest.raises(DistillError, match=message):
            tokenize_dataset(Dataset.from_list(wrong), smollm2_tokenizer, 32)
    with pytest.raises(DistillError, match=r"is text, .* has the column weight, which belongs to a row"):
        tokenize_dataset(Dataset.from_list([{"text": "Some text.", "weight": 1.0}]), smollm2_tokenizer, 2)


def test_a_step_with_weights_and_origins_reads_once_for_each_micro_batch(make_trainer):
    data = [
        row | {"weight": torch.tensor(0.5), "origin": torch.tensor(i % 3)} for i, row in enumerate(rows("llama", 64))
    ]
    options = {"max_steps": 4, "logging_steps": 100, "gradient_accumulation_steps": 2, "remove_unused_columns": False}
    trainer = make_trainer("llama", train_dataset=data, by_origin=BY_ORIGIN, **options)
    _, micro, _ = reads_of_steps(trainer, 2)
    assert micro == ONE_READ
