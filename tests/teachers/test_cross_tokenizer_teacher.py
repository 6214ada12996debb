"""A teacher with another tokenizer: its loss against a plain reference, in batches of every kind."""

import copy
from itertools import accumulate

import pytest
import torch
from gpu_sync import reads_of_steps
from tiny import build
from trained_tokenizers import trained
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.core.aligned_inputs import DEFAULT_KEYS
from hf_distill.data.alignment.collator import AlignedCollator
from hf_distill.errors import DistillError
from hf_distill.teachers import CrossTokenizerTeacher, FrozenTeacher, MultiTeacher, RoutedTeacher
from hf_distill.trainer.distiller import Distiller

TEXTS = [
    "The year 2024 has 366 days, and x = [1, 22, 333].",
    "Hello world: naïve café, 你好.",
    "import this  # 12345\n\tprint('ok')",
    "ok",
]


@pytest.fixture(scope="module")
def tokenizers():
    return trained("groups"), trained("digits")


@pytest.fixture(scope="module")
def models(tokenizers):
    student, teacher = (build("llama", seed=seed, vocab=len(t)) for seed, t in enumerate(tokenizers))
    for model in (student, teacher):
        model.config.max_position_embeddings = 512
        model.eval()
    return student, teacher


def rows_of(tokenizer, texts=TEXTS, labels_from=0):
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return [
        {"input_ids": each, "labels": [-100] * labels_from + each[labels_from:]}
        for each in ids
        if len(each) > labels_from
    ]


def collate(rows, tokenizer, packed=False):
    if packed:
        return DataCollatorWithFlattening(return_position_ids=True)(rows)
    width = max(len(row["input_ids"]) for row in rows)
    pad = 0

    def padded(name, value):
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", pad), "labels": padded("labels", -100), "attention_mask": mask}


def arguments(tmp_path, **options):
    defaults = {"cross_tokenizer": "alm", "report_to": [], "use_cpu": True, "logging_steps": 1, "max_steps": 2}
    defaults |= {"per_device_train_batch_size": 2, "output_dir": str(tmp_path / "out"), "save_strategy": "no"}
    return DistillConfig(**(defaults | options))


def token_log_probs(model, ids):
    """Log-probability of each token but the first, and the logits before it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    log_probs = logits.log_softmax(-1)
    return [None, *(float(log_probs[i - 1, ids[i]]) for i in range(1, len(ids)))], logits


def byte_ends(tokenizer, ids):
    """The number of bytes of the text up to the end of each token: a character of a byte-level token is a byte."""
    return list(accumulate(len(token) for token in tokenizer.convert_ids_to_tokens(ids)))


def plain_chunks(student_ids, student_ends, teacher_ids, teacher_ends):
    """(start, end) of the tokens of each chunk on both sides, without those that contain a first token."""
    common = sorted({*student_ends} & {*teacher_ends})
    chunks, before = [], (0, 0)
    for end in common:
        after = student_ends.index(end) + 1, teacher_ends.index(end) + 1
        if before[0] > 0 and before[1] > 0:
            chunks.append((slice(before[0], after[0]), slice(before[1], after[1])))
        before = after
    return chunks


def plain_alm(student, teacher, tokenizers, texts, tau=100.0):
    """The sum over chunks of tau * KL of two Bernoulli distributions, in Python and float64."""
    total, count = 0.0, 0
    for text in texts:
        ids = [tokenizer(text)["input_ids"] for tokenizer in tokenizers]
        ends = [byte_ends(t, each) for t, each in zip(tokenizers, ids, strict=True)]
        log_probs = [token_log_probs(m, each)[0] for m, each in zip((student, teacher), ids, strict=True)]
        for of_student, of_teacher in plain_chunks(ids[0], ends[0], ids[1], ends[1]):
            a = torch.tensor(sum(log_probs[1][of_teacher]) / tau, dtype=torch.float64).exp()
            b = torch.tensor(sum(log_probs[0][of_student]) / tau, dtype=torch.float64).exp()
            total += tau * float(a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log())
        count += len(ids[0]) - 1
    return total / count


@pytest.mark.parametrize("packed", [False, True])
def test_alm_equals_a_plain_reference(models, tokenizers, tmp_path, packed):
    student, teacher = models
    args = arguments(tmp_path, alpha=1.0)
    wrapped = CrossTokenizerTeacher(FrozenTeacher(teacher, processing_class=tokenizers[1]))
    wrapped.prepare(student, torch.device("cpu"), tokenizers[0])
    batch = collate(rows_of(tokenizers[0]), tokenizers[0], packed)
    batch |= wrapped.row_maker(batch)
    step = Distiller(args.terms())(student, wrapped, batch)
    expected = plain_alm(student, teacher, tokenizers, TEXTS)
    assert step.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["alm", "projected_kl", "uld"])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 5])
def test_chunk_size_and_micro_batches_do_not_change_loss_and_gradients(
    models, tokenizers, tmp_path, loss, chunk_tokens
):
    student, teacher = models
    args = arguments(tmp_path, cross_tokenizer=loss)
    wrapped = CrossTokenizerTeacher(FrozenTeacher(teacher, processing_class=tokenizers[1]))
    wrapped.prepare(student, torch.device("cpu"), tokenizers[0])
    rows = rows_of(tokenizers[0], labels_from=2)
    total = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)

    def gradients(chunk_tokens, batches):
        student.zero_grad()
        losses = []
        for each in batches:
            batch = collate(each, tokenizers[0])
            step = Distiller(args.terms(), chunk_tokens)(student, wrapped, batch, num_items=total)
            step.loss.backward()
            losses.append(step.loss.item())
        return sum(losses), [p.grad.clone() for p in student.parameters()]

    expected_loss, expected = gradients(None, [rows])
    actual_loss, actual = gradients(chunk_tokens, [[row] for row in rows])
    assert actual_loss == pytest.approx(expected_loss, rel=1e-5)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()) + 1e-7)


def test_identical_tokenizers_give_forward_kl(models, tokenizers, tmp_path):
    student, _ = models
    teacher = build("llama", seed=7, vocab=len(tokenizers[0])).eval()
    batch = collate(rows_of(tokenizers[0]), tokenizers[0])
    frozen = FrozenTeacher(teacher, processing_class=tokenizers[0])
    frozen.prepare(student, torch.device("cpu"), tokenizers[0])
    plain = arguments(tmp_path, cross_tokenizer=None, temperature=2.0)
    expected = Distiller(plain.terms())(student, frozen, batch)
    wrapped = CrossTokenizerTeacher(FrozenTeacher(teacher, processing_class=tokenizers[0]))
    wrapped.prepare(student, torch.device("cpu"), tokenizers[0])
    args = arguments(tmp_path, cross_tokenizer="projected_kl", temperature=2.0)
    actual = Distiller(args.terms())(student, wrapped, batch)
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


def train(model, teacher, tokenizers, tmp_path, texts=TEXTS, **options):
    args = arguments(tmp_path, **options)
    student_tokenizer = tokenizers[0]
    data = [{"input_ids": row["input_ids"]} for row in rows_of(student_tokenizer, texts)]
    student_tokenizer.pad_token = student_tokenizer.pad_token or student_tokenizer.eos_token
    trainer = DistillTrainer(
        model=model,
        teacher=teacher,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=student_tokenizer,
        data_collator=DataCollatorForLanguageModeling(student_tokenizer, mlm=False),
    )
    return trainer


@pytest.mark.parametrize("loss", ["alm", "projected_kl", "uld"])
def test_a_trainer_trains_and_reports_bits_per_byte(tokenizers, tmp_path, loss):
    student, teacher = (build("llama", seed=s, vocab=len(t)) for s, t in enumerate(tokenizers))
    frozen = FrozenTeacher(teacher, processing_class=tokenizers[1])
    trainer = train(
        student, frozen, tokenizers, tmp_path, cross_tokenizer=loss, max_steps=6, alpha=1.0, learning_rate=3e-3
    )
    assert isinstance(trainer.data_collator, AlignedCollator)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_soft_loss"] < before["eval_soft_loss"]
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert 0 < log["aligned_tokens"] <= 1
    assert log["tokens_per_chunk"] >= 1
    nats = sum(sum(x for x in token_log_probs(teacher.eval(), tokenizers[1](t)["input_ids"])[0] if x) for t in TEXTS)
    assert after["eval_teacher_bits_per_byte"] > 0
    assert after["eval_bits_per_byte"] > 0
    assert nats < 0
    assert 0 <= after["eval_chunk_agreement"] <= 1
    assert after["eval_chunk_kl"] > 0
    assert "eval_kl" not in after
    assert "eval_agreement" not in after


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cross_tokenizer": "projected_kl"}, "with T = 1,"),
        ({"cross_tokenizer": {"name": "uld", "temperature": 1.5}}, "with T = 1.5,"),
        ({"cross_tokenizer": "projected_kl", "temperature": 2.0}, "with T = 2,"),
        ({"cross_tokenizer": "alm"}, "cross entropy, averaged"),
    ],
)
def test_a_card_has_the_temperature_of_the_soft_loss(tokenizers, tmp_path, options, text):
    student, teacher = (build("llama", seed=s, vocab=len(t)) for s, t in enumerate(tokenizers))
    frozen = FrozenTeacher(teacher, processing_class=tokenizers[1])
    trainer = train(student, frozen, tokenizers, tmp_path, max_steps=1, **options)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert text in card
    assert "`cross_tokenizer`" not in card


def test_a_different_tokenizer_is_an_error_that_names_the_option(tokenizers, tmp_path):
    student, teacher = (build("llama", seed=s, vocab=len(t)) for s, t in enumerate(tokenizers))
    frozen = FrozenTeacher(teacher, processing_class=tokenizers[1])
    with pytest.raises(DistillError, match="cross_tokenizer='alm'"):
        train(student, frozen, tokenizers, tmp_path, cross_tokenizer=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "js"}, "divergence is 'js' and cross_tokenizer is 'alm'"),
        ({"cross_tokenizer": "js"}, "compares ids of one tokenizer"),
        ({"cross_tokenizer": "almm"}, "cross_tokenizer is 'almm', which names no known loss: use one of alm, proj"),
        ({"cross_tokenizer": {"tau": 2.0}}, "cross_tokenizer is .'tau': 2.0., which names no known loss: use one of"),
        ({"cross_tokenizer": "hidden_mse"}, "'hidden_mse', which does not compare text: use one of alm, projected_kl"),
        ({"cross_tokenizer": "cross_entropy"}, "'cross_entropy', which does not compare text: use one of alm, pro"),
        ({"cross_tokenizer": None, "divergence": "alm"}, "cross_tokenizer is not set"),
        ({"cross_tokenizer": {"name": "alm", "tao": 1}}, "tau"),
        (
            {"cross_tokenizer": 3},
            "cross_tokenizer is 3, which names no known loss: use one of alm, projected_kl, uld, or",
        ),
        ({"cross_tokenizer": ""}, "cross_tokenizer is '', which names no known loss"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(DistillError, match=message):
        arguments(tmp_path, **options)


def test_losses_on_tokens_are_refused(tokenizers, tmp_path):
    student, teacher = (build("llama", seed=s, vocab=len(t)) for s, t in enumerate(tokenizers))
    frozen = FrozenTeacher(teacher, processing_class=tokenizers[1])
    losses = [{"name": "hidden_mse", "weight": 1.0}, {"name": "reverse_kl", "weight": 1.0}]
    with pytest.raises(DistillError, match=r"hidden_mse(.|\n)*reverse_kl"):
        train(student, frozen, tokenizers, tmp_path, losses=losses)


def test_a_missing_tokenizer_is_refused(tokenizers, tmp_path):
    student, teacher = (build("llama", seed=s, vocab=len(t)) for s, t in enumerate(tokenizers))
    wrapped = CrossTokenizerTeacher(FrozenTeacher(teacher))
    with pytest.raises(DistillError, match="teacher's tokenizer"):
        wrapped.prepare(student, torch.device("cpu"), tokenizers[0])
    with pytest.raises(DistillError, match="processing_class=tokenizer"):
        CrossTokenizerTeacher(FrozenTeacher(teacher, processing_class=tokenizers[1])).prepare(
            student, torch.device("cpu"), None
        )


def test_two_teachers_of_different_tokenizers_teach_all_tokens(tokenizers, tmp_path):
    gemma = trained("gemma")
    student, one, other = (build("llama", seed=s, vocab=len(t)) for s, t in enumerate((*tokenizers, gemma)))
    teachers = {
        "digits": FrozenTeacher(one, processing_class=tokenizers[1]),
        "gemma": FrozenTeacher(other, processing_class=gemma),
    }
    trainer = train(student, MultiTeacher(teachers), tokenizers, tmp_path)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["soft_digits_loss"] > 0
    assert log["soft_gemma_loss"] > 0


def test_rows_have_teachers_of_different_tokenizers(tokenizers, tmp_path):
    gemma = trained("gemma")
    student, one, other = (build("llama", seed=s, vocab=len(t)) for s, t in enumerate((*tokenizers, gemma)))
    teachers = {
        "digits": FrozenTeacher(one, processing_class=tokenizers[1]),
        "gemma": FrozenTeacher(other, processing_class=gemma),
    }
    args = arguments(tmp_path, alpha=1.0)
    routed = RoutedTeacher(teachers)
    trainer = train(student, routed, tokenizers, tmp_path, alpha=1.0)
    batch = collate(rows_of(tokenizers[0], TEXTS[:2]), tokenizers[0]) | {"teacher_index": torch.tensor([0, 1])}
    step = Distiller(args.terms())(student.eval(), trainer.teacher, batch)
    expected = 0.0
    for text, model, tokenizer in ((TEXTS[0], one, tokenizers[1]), (TEXTS[1], other, gemma)):
        alone = CrossTokenizerTeacher(FrozenTeacher(model, processing_class=tokenizer))
        alone.prepare(student, torch.device("cpu"), tokenizers[0])
        row = collate(rows_of(tokenizers[0], [text]), tokenizers[0])
        part = Distiller(args.terms())(student, alone, row, num_items=1)
        expected += part.loss.item()
    assert step.loss.item() * len(step.targets) == pytest.approx(expected, rel=1e-4)


def test_the_keys_of_the_batch_are_removed_for_the_student(models, tokenizers):
    assert {*CrossTokenizerTeacher(models[1]).input_names()} >= {*DEFAULT_KEYS}


@pytest.mark.parametrize("loss", ["alm", "projected_kl", "uld"])
def test_a_step_reads_the_device_once_for_each_micro_batch(tokenizers, tmp_path, loss):
    student, teacher = (build("llama", seed=s, vocab=len(t)) for s, t in enumerate(tokenizers))
    frozen = FrozenTeacher(teacher, processing_class=tokenizers[1])
    options = {"per_device_train_batch_size": 1, "max_steps": 4, "gradient_accumulation_steps": 2, "logging_steps": 100}
    trainer = train(student, frozen, tokenizers, tmp_path, texts=TEXTS[:2] * 2, cross_tokenizer=loss, **options)
    _, micro, _ = reads_of_steps(trainer, 2)
    assert micro == {("tolist", "core/targets.py:_read"): 1}


def prepared(models, tokenizers, given, stored=None):
    """A teacher that reads the tokens of `given`, and whose model is stored with the tokenizer `stored`."""
    teacher = CrossTokenizerTeacher(FrozenTeacher(models[1], processing_class=stored), processing_class=given)
    teacher.prepare(models[0], torch.device("cpu"), tokenizers[0])
    return teacher


def test_the_teachers_tokenizer_is_compared_with_its_own_and_not_with_the_students(models, tokenizers, monkeypatch):
    from hf_distill.teachers import compatibility

    warnings = []
    monkeypatch.setattr(compatibility.logger, "warning_once", warnings.append)
    prepared(models, tokenizers, tokenizers[1])
    stored, given = copy.deepcopy(tokenizers[1]), copy.deepcopy(tokenizers[1])
    stored.chat_template, given.chat_template = (f"{{{{ messages[0].content }}}} {i}" for i in range(2))
    prepared(models, tokenizers, given, stored)
    assert not warnings
    with pytest.raises(DistillError, match="ids mean other tokens in the tokenizer that is given for the teacher"):
        prepared(models, tokenizers, trained("gemma"), tokenizers[1])


def test_an_id_that_the_teacher_has_no_embedding_for_is_refused(models, tokenizers):
    """The teacher has more ids than the student has, but fewer than its tokenizer."""
    given = copy.deepcopy(tokenizers[1])
    student = build("llama", vocab=len(given) - 8)
    given.add_tokens(["<added>"])
    teacher = CrossTokenizerTeacher(models[1], processing_class=given)
    teacher.prepare(student, torch.device("cpu"), tokenizers[0])
    batch = {"input_ids": torch.tensor([[1, len(given) - 1, 2]]), "labels": torch.tensor([[1, 1, 2]])}
    with pytest.raises(DistillError, match=f"teacher's rows have the token id {len(given) - 1}, and its embedding has"):
        teacher.teacher._limits.readable(batch)
