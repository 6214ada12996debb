"""The inputs of each model of a step, and its outputs by name."""

import pytest
import torch
import transformers as tf
from tiny import build
from torch.nn.functional import cross_entropy
from transformers.utils import ModelOutput

from hf_distill import DistillError, FrozenTeacher
from hf_distill.losses.objective import objective
from hf_distill.models.model_call import (
    accepted_inputs,
    input_names,
    named_outputs,
    prepare_inputs,
    without_foreign_inputs,
)
from hf_distill.trainer.distiller import Distiller

SEQ2SEQ = dict(
    vocab_size=97, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=1, eos_token_id=2, bos_token_id=0, decoder_start_token_id=2,
)  # fmt: skip
BATCH = {"input_ids": torch.tensor([[5, 6, 7, 2]]), "labels": torch.tensor([[8, 9, 2, -100]])}


def m2m():
    return tf.M2M100ForConditionalGeneration(tf.M2M100Config(**SEQ2SEQ)).eval()


def bart():
    return tf.BartForConditionalGeneration(tf.BartConfig(**SEQ2SEQ)).eval()


def mbart():
    return tf.MBartForConditionalGeneration(tf.MBartConfig(**SEQ2SEQ)).eval()


@pytest.mark.parametrize("make", [m2m, bart, mbart, lambda: build("t5").eval()])
def test_decoder_inputs_are_those_that_the_model_makes_from_labels(make):
    model = make()
    called = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: called.append(kwargs["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        expected = model(**BATCH).logits
        logits = model(**prepare_inputs(model, BATCH)).logits
    handle.remove()
    assert torch.equal(called[0], called[1])
    assert torch.equal(logits, expected)


def test_a_model_that_changes_labels_in_place_does_not_change_the_batch():
    sizes = {k: v for k, v in SEQ2SEQ.items() if k != "vocab_size"} | dict(src_vocab_size=97, tgt_vocab_size=89)
    model, other = (tf.FSMTForConditionalGeneration(tf.FSMTConfig(langs=["en", "de"], **sizes)).eval() for _ in "ab")
    batch = {"input_ids": BATCH["input_ids"], "labels": BATCH["labels"].clone()}
    inputs = prepare_inputs(model, batch)
    assert inputs["decoder_input_ids"].tolist() == [[2, 8, 9, 2]]
    assert torch.equal(batch["labels"], BATCH["labels"])
    teacher = FrozenTeacher(other)
    teacher.prepare(model, torch.device("cpu"))
    step = Distiller(objective(0.0, 1.0))(model, teacher, batch)
    logits = model(**inputs).logits
    torch.testing.assert_close(step.loss, cross_entropy(logits.flatten(0, 1), BATCH["labels"].flatten()))


def test_classes_are_no_decoder_inputs_of_an_encoder_decoder_classifier():
    config = tf.T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, num_labels=3)
    tokens = tf.T5ForTokenClassification(config)
    rows = tf.BartForSequenceClassification(tf.BartConfig(**SEQ2SEQ, num_labels=3))
    for model, labels in ((tokens, torch.tensor([[0, 1, 2, 0]])), (rows, torch.tensor([1]))):
        assert "decoder_input_ids" not in prepare_inputs(model, BATCH | {"labels": labels})


def test_a_missing_start_token_is_named():
    model = m2m()
    model.config.decoder_start_token_id = None
    with pytest.raises(DistillError, match="decoder_start_token_id is None"):
        prepare_inputs(model, BATCH)


def test_each_model_gets_the_inputs_that_its_forward_accepts():
    bert = build("sequence")
    distilbert = tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(vocab_size=97, dim=16, n_layers=1, n_heads=1, hidden_dim=16)
    )
    batch = {**BATCH, "token_type_ids": torch.zeros(1, 4), "unknown": torch.zeros(1)}
    assert set(accepted_inputs(bert, batch)) == {"input_ids", "labels", "token_type_ids"}
    assert set(accepted_inputs(distilbert, batch)) == {"input_ids", "labels"}
    bert_inputs = input_names(bert)
    assert set(without_foreign_inputs(distilbert, batch, bert_inputs)) == {"input_ids", "labels", "unknown"}


def test_inputs_of_kwargs_are_accepted():
    class Anything(tf.BertForSequenceClassification):
        def forward(self, input_ids=None, labels=None, **kwargs):
            assert "bbox" in kwargs
            return super().forward(input_ids, token_type_ids=kwargs["token_type_ids"])

    model = Anything(build("sequence").config)
    batch = {**BATCH, "token_type_ids": torch.ones(1, 4, dtype=torch.long), "bbox": torch.zeros(1, 4, 4)}
    model(**prepare_inputs(model, accepted_inputs(model, batch)))
    # A classifier of transformers whose class names neither, and whose base model names `token_type_ids`.
    config = tf.Gemma3TextConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        intermediate_size=16, head_dim=16, num_labels=3,
    )  # fmt: skip
    assert "position_ids" in input_names(tf.Gemma3TextForSequenceClassification(config))


@pytest.mark.parametrize(
    "outputs",
    [
        ModelOutput(logits=torch.ones(1, 2, 3)),
        {"logits": torch.ones(1, 2, 3), "hidden_states": None},
        (torch.ones(1, 2, 3), torch.zeros(2)),
        (torch.zeros(()), torch.ones(1, 2, 3)),
        torch.ones(1, 2, 3),
    ],
)
def test_logits_are_read_from_all_forms_of_outputs(outputs):
    named = named_outputs(outputs, build("bert"))
    assert torch.equal(named.logits, torch.ones(1, 2, 3))
    named["loss"] = torch.zeros(())
    assert named.get("loss") == 0


@pytest.mark.parametrize("outputs", [{"scores": torch.ones(1)}, (), (None,), 3])
def test_outputs_without_logits_are_refused(outputs):
    with pytest.raises(DistillError, match="returns no `logits`"):
        named_outputs(outputs, build("bert"))


def distilbert(labels=5):
    torch.manual_seed(0)
    small = dict(vocab_size=97, dim=16, n_layers=1, n_heads=1, hidden_dim=16, num_labels=labels)
    off = dict(dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0)
    return tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**small, **off)).eval()


@pytest.mark.parametrize("how", ["frozen", "by name", "peer"])
def test_only_the_teacher_gets_token_types_that_only_it_accepts(make_trainer, how):
    from datasets import Dataset

    from hf_distill.teachers import PeerTeacher

    student, teacher = distilbert(), build("sequence", 1).eval()
    teacher.bert.embeddings.token_type_embeddings.weight.data *= 5  # so that they change the logits
    rows = [
        {"input_ids": [2, 9 + i, 8, 3, 40 + i, 7], "token_type_ids": [0, 0, 0, 1, 1, 1], "labels": i} for i in range(4)
    ]
    ids, types = (torch.tensor([row[key] for row in rows]) for key in ("input_ids", "token_type_ids"))
    with torch.no_grad():
        student_logits, teacher_logits = student(ids).logits / 2, teacher(ids, token_type_ids=types).logits / 2
        logits_without_types = teacher(ids).logits / 2
    kl = torch.nn.functional.kl_div
    right, wrong = (
        float(4 * kl(student_logits.log_softmax(-1), logits.softmax(-1), reduction="batchmean"))
        for logits in (teacher_logits, logits_without_types)
    )
    teachers = {
        "frozen": lambda: {"teacher": teacher},
        "by name": lambda: {"teachers": {"one": teacher, "other": build("sequence", 1)}},
        "peer": lambda: {"teacher": PeerTeacher(teacher)},
    }[how]()
    trainer = make_trainer(
        "sequence", model=student, train_dataset=Dataset.from_list(rows), data_collator=None, max_steps=1,
        learning_rate=0.0, **({"teacher": None} | teachers),
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["soft_one_loss" if how == "by name" else "soft_loss"] == pytest.approx(right, rel=1e-4)
    assert abs(right - wrong) > 0.01


class AsTuple(tf.BertForMaskedLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).to_tuple()


class AsDict(tf.BertForMaskedLM):
    def forward(self, *args, **kwargs):
        return dict(super().forward(*args, **kwargs))


@pytest.mark.parametrize("how", ["config", "tuple", "dict"])
def test_tuples_and_dicts_of_outputs_have_the_loss_of_a_model_output(make_trainer, how):
    def loss(named: bool):
        student, teacher = build("bert", 0), build("bert", 1, layers=3, width=48)
        if how == "config":
            student.config.return_dict = teacher.config.return_dict = named
        elif not named:
            student.__class__ = teacher.__class__ = {"tuple": AsTuple, "dict": AsDict}[how]
        trainer = make_trainer("bert", model=student, teacher=teacher, max_steps=2, losses=[{"name": "hidden_mse"}])
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history[:2]]

    assert loss(True) == loss(False)
