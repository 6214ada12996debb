"""A teacher per row: each teaches its own rows only, and other rows have their hard labels."""

import math

import pytest
import torch
from datasets import Dataset
from gpu_sync import reads_of_steps
from tiny import build, collate, rows

from hf_distill import DistillError
from hf_distill.cache import write_cache
from hf_distill.core.logits import DenseLogits, SparseLogProbs
from hf_distill.core.signals import Signals
from hf_distill.core.targets import Targets
from hf_distill.data.collator import Collator
from hf_distill.data.teacher_column import TeacherColumnCollator
from hf_distill.recipe.schema import Recipe
from hf_distill.runner.datasets import load_source
from hf_distill.teachers import (
    CachedTeacher,
    EMATeacher,
    FrozenTeacher,
    MTPTeacher,
    MultiTeacher,
    MultiViewTeacher,
    PeerTeacher,
    RoutedTeacher,
    Teacher,
)

NAMES = ("maths", "chat", "", "chat", "maths", None, "maths", "maths")  # of the rows of a batch
ALPHA = 0.6


def kl(teacher_logits, student_logits, temperature=2.0):
    p, q = (torch.log_softmax(x / temperature, -1) for x in (teacher_logits, student_logits))
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def named_rows(kind="llama", n=8, names=NAMES):
    return [row | {"teacher": names[i % len(names)]} for i, row in enumerate(rows(kind, n))]


def models():
    return {"maths": build("llama", 1, layers=3, width=48), "chat": build("llama", 2)}


def reference(kind, student, teachers, batch_rows, names):
    """The loss row by row: alpha * soft of the row's teacher + (1 - alpha) * cross entropy, over all target tokens."""
    soft, hard, count = {name: [] for name in (*teachers, None)}, [], 0
    shift = kind == "llama"
    for row, name in zip(batch_rows, names, strict=True):
        inputs = {key: value[None] for key, value in row.items() if key not in ("teacher", "source")}
        targets = Targets.from_batch(inputs, shift)
        call = {key: inputs[key] for key in ("input_ids", "attention_mask")} | (
            {"labels": inputs["labels"]} if kind == "t5" else {}
        )
        student_logits = targets.gather_logits(student(**call).logits)
        hard.append(torch.nn.functional.cross_entropy(student_logits, targets.labels, reduction="none"))
        if name:
            with torch.no_grad():
                teacher_logits = targets.gather_logits(teachers[name].eval()(**call).logits)
            soft[name].append(kl(teacher_logits, student_logits))
        count += len(targets)
    parts = {name: torch.cat(values) for name, values in soft.items() if values}
    total = ALPHA * sum(values.sum() for values in parts.values()) + (1 - ALPHA) * torch.cat(hard).sum()
    return total / count, parts, torch.cat(hard)


def routed_trainer(make_trainer, kind="llama", **options):
    fields = {"alpha": ALPHA, "per_device_train_batch_size": 8, "max_steps": 1, "max_grad_norm": 0.0}
    fields |= {"train_sampling_strategy": "sequential", "eval_dataset": named_rows(kind, 7)}
    return make_trainer(
        kind, **fields | {"teacher": RoutedTeacher(models()), "train_dataset": named_rows(kind)} | options
    )


def test_the_loss_and_the_gradients_are_those_of_each_row_with_its_teacher(make_trainer):
    trainer = routed_trainer(make_trainer, learning_rate=1.0, optim="sgd")
    student, teachers = build("llama", 0), models()
    loss, soft, hard = reference("llama", student, teachers, trainer.train_dataset, NAMES)
    loss.backward()
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log["hard_loss"] == pytest.approx(hard.mean().item(), rel=1e-5)
    for name, values in soft.items():
        assert log[f"soft_loss_teacher_{name}"] == pytest.approx(values.mean().item(), rel=1e-5)
    for (name, before), after in zip(student.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(after, before - before.grad, rtol=1e-4, atol=1e-6, msg=name)
    without = [
        Targets.from_batch({k: v[None] for k, v in row.items() if k != "teacher"}, True)
        for row, name in zip(trainer.train_dataset, NAMES, strict=True)
        if not name
    ]
    assert log["tokens_without_teacher"] == sum(map(len, without)) > 0


@pytest.mark.parametrize("kind", ["t5", "sequence", "token"])
def test_models_without_next_tokens_are_routed(make_trainer, kind):
    teachers = {"maths": build(kind, 1), "chat": build(kind, 2)}
    trainer = routed_trainer(make_trainer, kind, teacher=RoutedTeacher(teachers))
    loss, _, _ = reference(kind, build(kind, 0).eval(), teachers, trainer.train_dataset, NAMES)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


class Recorder(FrozenTeacher):
    def forward(self, inputs, targets, feature_requests):
        self.calls.append((inputs["input_ids"].numel(), len(targets)))
        return super().forward(inputs, targets, feature_requests)


def test_each_teacher_runs_on_its_rows_only(make_trainer):
    teachers = {name: Recorder(model) for name, model in models().items()} | {"unused": Recorder(build("llama", 3))}
    for teacher in teachers.values():
        teacher.calls = []
    routed_trainer(make_trainer, teacher=RoutedTeacher(teachers)).train()
    length = len(rows("llama", 1)[0]["input_ids"])
    assert [calls[0] for calls in teachers["maths"].calls] == [4 * length]
    assert [calls[0] for calls in teachers["chat"].calls] == [2 * length]
    assert teachers["unused"].calls == []


def packed_rows(source_of=(0, 1, 2, 1)):
    documents = [{k: v[: int(row["attention_mask"].sum())] for k, v in row.items()} for row in rows("llama", 4)]
    return documents, [
        {
            "input_ids": torch.cat([documents[i]["input_ids"] for i in pair]).tolist(),
            "labels": torch.cat([documents[i]["labels"] for i in pair]).tolist(),
            "seq_lengths": [len(documents[i]["input_ids"]) for i in pair],
            "source": [source_of[i] for i in pair for _ in documents[i]["input_ids"]],
        }
        for pair in ((0, 1), (2, 3))
    ]


def test_packed_documents_have_the_teachers_of_their_sources(make_trainer):
    documents, packed = packed_rows()
    sources = {"maths": ["gsm"], "chat": ["ultrachat"]}
    trainer = routed_trainer(
        make_trainer,
        teacher=RoutedTeacher(models(), sources),
        train_dataset=packed,
        eval_dataset=packed,
        data_collator=Collator(0, ["gsm", "ultrachat", "web"]),
        per_device_train_batch_size=2,
        remove_unused_columns=False,
    )
    loss, soft, _ = reference("llama", build("llama", 0), models(), documents, ("maths", "chat", None, "chat"))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log["soft_loss_teacher_chat"] == pytest.approx(log["soft_loss_ultrachat"], rel=1e-6)
    assert log["soft_loss_teacher_maths"] == pytest.approx(soft["maths"].mean().item(), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] > 0


class Sparse(Teacher):
    has_full_logits = False

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def forward(self, inputs, targets, feature_requests):
        output = self.model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        log_probs, ids = targets.gather_logits(output.logits).log_softmax(-1).topk(8)
        return Signals(SparseLogProbs(ids, log_probs, (-log_probs.exp().sum(-1)).log1p()))


def test_statistics_compare_tokens_with_the_logits_of_their_teacher_where_it_has_all(make_trainer):
    teachers = models()
    routed = RoutedTeacher({"maths": teachers["maths"], "chat": Sparse(teachers["chat"])})
    trainer = routed_trainer(make_trainer, teacher=routed, temperature=1.0)
    metrics, student = trainer.evaluate(), build("llama", 0).eval()
    kls = []
    for row in trainer.eval_dataset:
        if row["teacher"] == "maths":
            batch = {k: v[None] for k, v in row.items() if k != "teacher"}
            targets = Targets.from_batch(batch, True)
            call = {k: batch[k] for k in ("input_ids", "attention_mask")}
            with torch.no_grad():
                p, q = (targets.gather_logits(m.eval()(**call).logits) for m in (teachers["maths"], student))
            kls.append(kl(p, q, 1.0))
    assert metrics["eval_kl"] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-4)


def test_chunks_do_not_change_the_loss(make_trainer):
    losses = []
    for chunk_tokens in (None, 3):
        trainer = routed_trainer(make_trainer, chunk_tokens=chunk_tokens, max_steps=3, num_train_epochs=3)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_batch_without_target_tokens_or_with_one_teacher_trains(make_trainer):
    empty = [row | {"labels": torch.full_like(row["labels"], -100)} for row in named_rows(n=8)]
    only = named_rows(n=8, names=("chat",))
    trainer = routed_trainer(make_trainer, train_dataset=[*empty, *only], max_steps=2)
    trainer.train()
    empty_log, log = trainer.state.log_history[:2]
    assert (empty_log["grad_norm"], math.isnan(empty_log["loss"])) == (0, True)
    assert log["soft_loss"] == pytest.approx(log["soft_loss_teacher_chat"])


def test_a_step_reads_once_for_each_micro_batch(make_trainer):
    trainer = routed_trainer(
        make_trainer,
        train_dataset=named_rows(n=64),
        per_device_train_batch_size=4,
        max_steps=4,
        gradient_accumulation_steps=2,
        logging_steps=100,
    )
    _, micro, _ = reads_of_steps(trainer, 2)
    assert {place: count for place, count in micro.items() if "input_limits" not in place[1]} == {
        ("tolist", "core/targets.py:_read"): 1
    }


@pytest.mark.parametrize("group", [RoutedTeacher, MultiTeacher])
def test_a_cache_of_one_teacher_gives_the_losses_of_that_teacher(make_trainer, tmp_path, group):
    data = rows("llama", 32)
    write_cache(tmp_path / "cache", build("llama", 2), data, collator=collate, kind="hidden", dtype="float32")
    options = {"train_dataset": named_rows(n=32), "eval_dataset": named_rows(n=32), "max_steps": 4}
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    if group is MultiTeacher:
        options |= {"train_dataset": data, "eval_dataset": data}
    losses = []
    for chat in (build("llama", 2), CachedTeacher(str(tmp_path / "cache"))):
        teacher = group({"maths": build("llama", 1), "chat": chat})
        trainer = routed_trainer(make_trainer, teacher=teacher, **options)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not chat._started
    trainer.evaluate()


def test_a_run_resumes_exactly(make_trainer):
    def train(folder, **options):
        trainer = routed_trainer(
            make_trainer,
            folder=folder,
            teacher=RoutedTeacher({"maths": models()["maths"], "chat": EMATeacher(0.5)}),
            train_dataset=named_rows(n=32),
            per_device_train_batch_size=4,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            learning_rate=0.01,
        )
        trainer.train(**options)
        return trainer

    whole = train("whole")
    resumed = train("whole", resume_from_checkpoint=str(whole.args.output_dir + "/checkpoint-2"))
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("build_teacher", "message"),
    [
        (lambda m: RoutedTeacher({"maths": m["maths"]}), "has 1 entries: give two or more, or one with `sources`"),
        (lambda m: RoutedTeacher(m, {"maths": ["gsm"], "chat": ["gsm"]}), "'gsm' has two teachers, maths and chat"),
        (lambda m: RoutedTeacher(m, {"maths": ["gsm"]}), "chat has no sources"),
        (lambda m: RoutedTeacher(m, {"maths": ["a"], "chat": ["b"], "chatt": ["c"]}), "did you mean 'chat'"),
        (lambda m: RoutedTeacher({"a": PeerTeacher(m["chat"]), "b": m["maths"]}), "a is a PeerTeacher, which teaches"),
        (lambda m: RoutedTeacher({"a": MTPTeacher(1), "b": m["maths"]}), "a is a MTPTeacher, which teaches"),
        (lambda m: RoutedTeacher({"a": MultiTeacher(m), "b": m["maths"]}), "a is a MultiTeacher, which teaches"),
        (
            lambda m: RoutedTeacher({"a": MultiViewTeacher({"token_dropout": 0.1}), "b": m["maths"]}),
            "a is a MultiViewTeacher, which teaches",
        ),
        (lambda m: RoutedTeacher({"a b": m["chat"], "b": m["maths"]}), "the name 'a b'"),
    ],
)
def test_teachers_that_cannot_be_routed_are_refused(build_teacher, message):
    with pytest.raises(DistillError, match=message):
        build_teacher(models())


def test_losses_on_features_are_refused_when_the_trainer_is_created(make_trainer):
    with pytest.raises(DistillError, match="hidden_mse compares features, which teachers of single rows do not return"):
        routed_trainer(make_trainer, losses=[{"name": "hidden_mse"}])


def test_wrong_data_is_refused(make_trainer):
    trainer = routed_trainer(make_trainer, train_dataset=named_rows(names=("math",)))
    with pytest.raises(DistillError, match="the teacher 'math', which is none of the teachers; did you mean 'maths'"):
        trainer.train()
    trainer = routed_trainer(make_trainer, train_dataset=rows("llama", 8))
    with pytest.raises(DistillError, match="does not say which teacher its rows have: add a column `teacher`"):
        trainer.train()
    sources = {"maths": ["gsm"], "chat": ["ultrachatt"]}
    _, packed = packed_rows()
    options = {"data_collator": Collator(0, ["gsm", "ultrachat", "web"]), "remove_unused_columns": False}
    trainer = routed_trainer(make_trainer, teacher=RoutedTeacher(models(), sources), train_dataset=packed, **options)
    with pytest.raises(DistillError, match=r"chat has the source 'ultrachatt', .*did you mean 'ultrachat'"):
        trainer.train()
    trainer = routed_trainer(make_trainer, teacher=RoutedTeacher(models(), sources))
    with pytest.raises(DistillError, match="the batches have no column `source`"):
        trainer.train()
    _, packed = packed_rows()
    packing = TeacherColumnCollator(Collator(0), ("maths", "chat"))
    with pytest.raises(DistillError, match=r"it packs them\. Turn packing off"):
        packing([{k: v for k, v in row.items() if k != "source"} | {"teacher": "chat"} for row in packed])


@pytest.mark.parametrize(
    ("train", "evaluation", "message"),
    [
        (named_rows(), rows("llama", 4), "eval_dataset has no column `teacher`, which train_dataset has"),
        (named_rows(), named_rows(names=("math",)), "of eval_dataset .* 'math', .*did you mean 'maths'"),
    ],
)
def test_wrong_names_in_data_sets_are_refused_when_the_trainer_is_created(make_trainer, train, evaluation, message):
    data = {"train_dataset": Dataset.from_list([*train]), "eval_dataset": Dataset.from_list([*evaluation])}
    with pytest.raises(DistillError, match=message):
        routed_trainer(make_trainer, **data)


@pytest.mark.parametrize("kind", ["list", "dataset", "stream"])
def test_rows_that_name_their_teacher_are_not_taught_by_all_teachers(make_trainer, kind):
    data = [*named_rows()]
    data = data if kind == "list" else Dataset.from_list(data)
    data = data.to_iterable_dataset() if kind == "stream" else data
    with pytest.raises(DistillError, match=r"names of teachers \(maths, chat\), but each .* teaches all rows: pass"):
        routed_trainer(make_trainer, teacher=MultiTeacher(models()), train_dataset=data, eval_dataset=None)
    other = [row | {"teacher": "gpt"} for row in named_rows()]
    assert routed_trainer(make_trainer, teacher=MultiTeacher(models()), train_dataset=other, eval_dataset=None)


def test_recipes_refuse_rows_that_name_a_teacher(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "1", "completion": "2", "teacher": "chat"}\n')
    teachers = [{"name": name, "model": "smoke:llama/teacher"} for name in ("maths", "chat")]
    data = {"task": {"path": str(tmp_path / "x.jsonl")}, "eval": {"holdout": 0.1}}
    values = {"student": {"model": "smoke:llama/student"}, "teachers": teachers, "data": data}
    recipe = Recipe.model_validate(values | {"train": {"output_dir": "x", "max_steps": 1}})
    with pytest.raises(DistillError, match=r"data.task has the column `teacher` .* give the teachers `sources`"):
        load_source(recipe, "task")


def test_dense_logits_are_routed(make_trainer):
    class Dense(Teacher):
        def __init__(self, model):
            self.model = model

        @torch.no_grad()
        def forward(self, inputs, targets, feature_requests):
            output = self.model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            return Signals(DenseLogits(targets.gather_logits(output.logits)))

    one = routed_trainer(make_trainer)
    two = routed_trainer(make_trainer, teacher=RoutedTeacher({name: Dense(model) for name, model in models().items()}))
    one.train(), two.train()
    assert one.state.log_history[0]["loss"] == pytest.approx(two.state.log_history[0]["loss"], rel=1e-6)
