"""A teacher with the full vocabulary of a trimmed student: losses and gradients against a plain reference."""

import copy

import pytest
import torch
from servers.hidden_server import HiddenServer
from servers.teacher_servers import TeacherServer
from tiny import build
from torch.testing import assert_close
from trained_tokenizers import CORPUS, trained
from transformers import AutoModelForCausalLM, Gemma2Config

from hf_distill import DistillConfig, DistillError, DistillTrainer, trim_vocabulary
from hf_distill.cache import write_cache
from hf_distill.data import Collator
from hf_distill.teachers import (
    CachedTeacher,
    EMATeacher,
    FrozenTeacher,
    MultiTeacher,
    RemoteTeacher,
    RoutedTeacher,
    TrimmedVocabularyTeacher,
)
from hf_distill.trainer.distiller import Distiller
from hf_distill.trainer.terms import build_objective

TEXTS = [text[:80] for text in CORPUS[:3]]
REFERENCE = {
    "forward_kl": lambda p, q: (q.exp() * (q - p)).sum(-1),
    "reverse_kl": lambda p, q: (p.exp() * (p - q)).sum(-1),
}


def with_bias(model):
    """The model, whose output head has a bias."""
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, model.lm_head.out_features))
    return model


def gemma2(vocab):
    config = Gemma2Config(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=5.0, initializer_range=0.3,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def tokenizer():
    return trained("digits")


@pytest.fixture(scope="module")
def trimmed(tokenizer):
    """A student, its tokenizer and the ids that it keeps; the teacher's vocabulary is padded."""
    ids = {index for text in TEXTS[:2] for index in tokenizer(text)["input_ids"]}
    student, *rest = trim_vocabulary(build("llama", vocab=len(tokenizer)), tokenizer, ids)
    return student.eval(), *rest


@pytest.fixture
def student(trimmed):
    return copy.deepcopy(trimmed[0])


@pytest.fixture(scope="module")
def teacher(tokenizer):
    return build("llama", seed=1, layers=3, width=48, vocab=len(tokenizer) + 20).eval()


def rows_of(tokenizer, texts=TEXTS):
    ids = [tokenizer(text)["input_ids"][:60] for text in texts]
    return [{"input_ids": each, "labels": [-100] * 2 + each[2:]} for each in ids]


def batch_of(tokenizer, **options):
    return Collator(len(tokenizer) - 1)(rows_of(tokenizer))  # padding with any id, which is masked


def step(student, teacher, batch, trimmed_tokenizer, tmp_path, **options):
    """Loss, metrics and gradients of one batch."""
    args = DistillConfig(str(tmp_path), **options)
    if isinstance(teacher, torch.nn.Module):
        teacher = FrozenTeacher(teacher)
    teacher.prepare(student, torch.device("cpu"), trimmed_tokenizer)
    student.zero_grad()
    result = Distiller(args.terms(), 7)(student, teacher, dict(batch))
    result.loss.backward()
    return result.loss.item(), {name: p.grad.clone() for name, p in student.named_parameters()}


def plain(student, teacher, kept_ids, batch, divergence, temperature, alpha):
    """The loss from full logits, with the teacher's softmax over the kept ids."""
    kept, ids = torch.tensor(kept_ids), batch["input_ids"]
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    is_target = labels != -100
    teacher_ids = kept[ids.where(batch["attention_mask"] == 1, 0)]
    mask = {"attention_mask": batch["attention_mask"]}
    z = student(ids, **mask).logits[is_target]
    with torch.no_grad():
        z_t = teacher(teacher_ids, **mask).logits[is_target][:, kept]
    p, q = torch.log_softmax(z / temperature, -1), torch.log_softmax(z_t / temperature, -1)
    soft = REFERENCE[divergence](p, q) * temperature**2
    hard = torch.nn.functional.cross_entropy(z, labels[is_target], reduction="none")
    return (alpha * soft + (1 - alpha) * hard).mean()


@pytest.mark.parametrize("divergence", REFERENCE)
@pytest.mark.parametrize(
    "make",
    [lambda t: t, lambda t: with_bias(copy.deepcopy(t)), lambda t: gemma2(720).eval()],
    ids=["plain", "bias", "cap"],
)
def test_loss_and_gradients_equal_a_plain_reference(student, teacher, tokenizer, trimmed, tmp_path, divergence, make):
    _, small, kept_ids = trimmed
    teacher, batch = make(teacher), batch_of(small)
    options = {"divergence": divergence, "temperature": 2.0, "alpha": 0.6}
    expected = plain(student, teacher, kept_ids, batch, **options)
    gradients = torch.autograd.grad(expected, student.parameters())
    wrapped = TrimmedVocabularyTeacher(teacher, processing_class=tokenizer)
    loss, actual = step(student, wrapped, batch, small, tmp_path, **options)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for gradient, own in zip(gradients, actual.values(), strict=True):
        assert_close(own, gradient, rtol=1e-4, atol=1e-6)


def test_hidden_states_are_those_of_the_same_tokens(student, teacher, tokenizer, trimmed, tmp_path):
    _, small, kept_ids = trimmed
    wrapped, batch = TrimmedVocabularyTeacher(teacher, processing_class=tokenizer), batch_of(small)
    trainer = DistillTrainer(
        student,
        DistillConfig(str(tmp_path), losses=[{"name": "hidden_mse", "weight": 1.0}], max_steps=1, report_to="none"),
        teacher=wrapped,
        train_dataset=rows_of(small),
        data_collator=Collator(0),
        processing_class=small,
    )
    trainer.train()
    from hf_distill.core.signals import FeatureKey
    from hf_distill.core.targets import Targets

    targets = Targets.from_batch(batch, shift=True)
    key = FeatureKey("hidden", 1)
    feature = wrapped(batch, targets, {key: targets}).features[key]
    full_ids = torch.tensor(kept_ids)[batch["input_ids"].where(batch["attention_mask"] == 1, 0)]
    hidden = teacher(full_ids, attention_mask=batch["attention_mask"], output_hidden_states=True).hidden_states[2]
    assert_close(feature, targets.gather(hidden), rtol=1e-5, atol=1e-6)


def cached(teacher, tokenizer, rows, folder, **options):
    write_cache(
        folder,
        teacher,
        rows,
        collator=Collator(0),
        processing_class=tokenizer,
        dtype="float32",
        teacher_name={"model": "t"},
        **options,
    )
    return CachedTeacher(str(folder))


def test_a_cache_of_hidden_states_over_all_ids_teaches_a_trimmed_student(
    student, teacher, tokenizer, trimmed, tmp_path
):
    _, small, kept_ids = trimmed
    rows = [{name: [kept_ids[i] if i >= 0 else i for i in row[name]] for name in row} for row in rows_of(small)]
    batch = batch_of(small)
    expected = step(student, TrimmedVocabularyTeacher(teacher, processing_class=tokenizer), batch, small, tmp_path)
    from_cache = TrimmedVocabularyTeacher(cached(teacher, tokenizer, rows, tmp_path / "c"), processing_class=tokenizer)
    actual = step(student, from_cache, batch, small, tmp_path)
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        assert_close(actual[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_a_cache_that_was_written_over_the_kept_ids_needs_no_wrapper(
    student, teacher, tokenizer, trimmed, tmp_path, kind
):
    _, small, kept_ids = trimmed
    wrapped = TrimmedVocabularyTeacher(teacher, processing_class=tokenizer)
    wrapped.prepare(student, torch.device("cpu"), small)
    k = {"k": len(kept_ids)} if kind == "top_k" else {}
    written = cached(wrapped, small, rows_of(small), tmp_path / "c", kind=kind, **k)
    assert written.manifest.vocab_size == len(kept_ids)
    batch = batch_of(small)
    expected = step(student, wrapped, batch, small, tmp_path)
    actual = step(student, written, batch, small, tmp_path)
    assert actual[0] == pytest.approx(expected[0], rel=2e-3 if kind == "top_k" else 1e-5)


def test_a_server_of_hidden_states_teaches_a_trimmed_student(student, teacher, tokenizer, trimmed, tmp_path):
    _, small, _ = trimmed
    batch = batch_of(small)
    expected = step(student, TrimmedVocabularyTeacher(teacher, processing_class=tokenizer), batch, small, tmp_path)
    with HiddenServer(copy.deepcopy(teacher), tmp_path / "server", tokenizer=tokenizer) as server:
        remote = RemoteTeacher(server.url, api="hidden")
        wrapped = TrimmedVocabularyTeacher(remote, processing_class=tokenizer)
        actual = step(student, wrapped, batch, small, tmp_path)
        remote.close()
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        assert_close(actual[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_several_teachers_and_teachers_of_rows(student, teacher, tokenizer, trimmed, tmp_path):
    _, small, _ = trimmed
    batch, other = batch_of(small), build("llama", seed=2, layers=3, width=48, vocab=len(tokenizer)).eval()

    def wrapped(model):
        return TrimmedVocabularyTeacher(model, processing_class=tokenizer)

    alone = [step(student, wrapped(model), batch, small, tmp_path, alpha=1.0)[0] for model in (teacher, other)]
    routed = RoutedTeacher({"a": wrapped(teacher), "b": wrapped(other)})
    rows = {name: value[:1] for name, value in batch.items()}
    first = step(student, wrapped(other), rows, small, tmp_path, alpha=1.0)[0]
    by_row = step(student, routed, {**rows, "teacher_index": torch.tensor([1])}, small, tmp_path, alpha=1.0)[0]
    assert by_row == pytest.approx(first, rel=1e-5)
    args = DistillConfig(str(tmp_path), alpha=1.0)
    both = MultiTeacher({"a": wrapped(teacher), "b": wrapped(other)}, {"a": 3.0, "b": 1.0})
    both.prepare(student, torch.device("cpu"), small)
    loss = Distiller(build_objective(args, both).student)(student, both, batch).loss.item()
    assert loss == pytest.approx(0.75 * alone[0] + 0.25 * alone[1], rel=1e-5)


def test_a_change_of_the_teachers_head_reaches_the_student(student, teacher, tokenizer, trimmed, tmp_path):
    _, small, _ = trimmed
    teacher, batch = copy.deepcopy(teacher), batch_of(small)
    wrapped = TrimmedVocabularyTeacher(teacher, processing_class=tokenizer)
    before = step(student, wrapped, batch, small, tmp_path)[0]
    teacher.lm_head.weight.data.mul_(2.0)
    after = step(student, wrapped, batch, small, tmp_path)[0]
    assert after != pytest.approx(before, rel=1e-3)
    fresh = TrimmedVocabularyTeacher(copy.deepcopy(teacher), processing_class=tokenizer)
    assert after == pytest.approx(step(student, fresh, batch, small, tmp_path)[0], rel=1e-6)


def test_wrong_combinations_are_refused(student, teacher, tokenizer, trimmed, tmp_path):
    _, small, _ = trimmed
    batch = batch_of(small)
    top_k = cached(teacher, tokenizer, rows_of(tokenizer), tmp_path / "c", kind="top_k", k=8)
    with pytest.raises(DistillError, match="share of the removed"):
        TrimmedVocabularyTeacher(top_k, processing_class=tokenizer)
    with TeacherServer(teacher) as server, pytest.raises(DistillError, match="share of the removed"):
        TrimmedVocabularyTeacher(RemoteTeacher(server.url, model="teacher"), processing_class=tokenizer)
    with pytest.raises(DistillError, match="EMATeacher has the student's vocabulary"):
        TrimmedVocabularyTeacher(EMATeacher())
    for wrapped, small_tokenizer, message in (
        (TrimmedVocabularyTeacher(student, processing_class=tokenizer), small, "same object"),
        (TrimmedVocabularyTeacher(teacher, processing_class=trained("gemma")), small, "trimmed one of the teacher's"),
        (TrimmedVocabularyTeacher(copy.deepcopy(student), processing_class=tokenizer), small, "rows, for the ids"),
        (TrimmedVocabularyTeacher(teacher, processing_class=tokenizer), tokenizer, "its output head"),
        (TrimmedVocabularyTeacher(teacher), small, "of the teacher is not known"),
        (TrimmedVocabularyTeacher(teacher, processing_class=tokenizer), None, "of the student is not known"),
        (FrozenTeacher(teacher, processing_class=tokenizer), small, "TrimmedVocabularyTeacher"),
        (cached(teacher, tokenizer, rows_of(tokenizer), tmp_path / "h"), small, "another tokenizer"),
    ):
        with pytest.raises(DistillError, match=message):
            step(student, wrapped, batch, small_tokenizer, tmp_path)
