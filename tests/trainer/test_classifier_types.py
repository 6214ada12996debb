"""Classifiers of images, audio and videos, multiple choice and next sentence prediction: types, losses, cards."""

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers as tf
from tiny import VOCAB, collate, one_step
from torch.nn import functional as F
from transformers import Trainer

from hf_distill import DistillError
from hf_distill.models.model_types import model_type_of
from hf_distill.models.type_catalog import AUDIO, IMAGE, MULTIPLE_CHOICE, NEXT_SENTENCE, VIDEO

BERT = dict(vocab_size=VOCAB, intermediate_size=32, max_position_embeddings=64, num_attention_heads=2)
BERT |= dict(initializer_range=0.3)
SIZES = dict(num_attention_heads=2, intermediate_size=32, image_size=8, initializer_range=0.3)
SOUND = dict(num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8), conv_kernel=(4, 3), conv_stride=(4, 2))
SOUND |= dict(num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
SOUND |= dict(initializer_range=0.3, layerdrop=0.0, feat_proj_dropout=0.0, final_dropout=0.0, apply_spec_augment=False)


def build(kind: str, seed: int = 0, layers: int = 1, width: int = 16, dropout: float = 0.0, **labels):
    """A tiny model with 3 classes, or with as many choices as a row has."""
    tf.set_seed(seed)
    labels = {"num_labels": 3} | labels
    size = dict(hidden_size=width, num_hidden_layers=layers, hidden_dropout_prob=dropout)
    size |= dict(attention_probs_dropout_prob=dropout) if kind != "audio" else dict(hidden_dropout=dropout)
    if kind == "image":
        return tf.ViTForImageClassification(tf.ViTConfig(**SIZES, **size, **labels, patch_size=4))
    if kind == "video":
        config = tf.VideoMAEConfig(**SIZES, **size, **labels, patch_size=4, num_frames=2, tubelet_size=1)
        return tf.VideoMAEForVideoClassification(config)
    if kind == "audio":
        size.pop("hidden_dropout_prob")
        config = tf.Wav2Vec2Config(**SOUND, **size, **labels, attention_dropout=0.0, activation_dropout=0.0)
        return tf.Wav2Vec2ForSequenceClassification(config)
    cls = tf.BertForMultipleChoice if kind == "choice" else tf.BertForNextSentencePrediction
    return cls(tf.BertConfig(**BERT, **size, num_labels=5))  # num_labels is neither the number of choices nor 2


def data(kind: str, n: int = 16, seed: int = 1, pad: str = "right", choices: int = 3) -> list[dict]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        label = torch.tensor(int(torch.randint(0, 2 if kind == "sentence" else 3, (), generator=g)))
        if kind in ("choice", "sentence"):
            texts = []
            for c in range(choices if kind == "choice" else 1):
                size = 5 + (i + 2 * c) % 4
                side = (8 - size, 0) if pad == "left" else (0, 8 - size)
                ids = torch.randint(3, VOCAB, (size,), generator=g)
                texts.append((F.pad(ids, side), F.pad(torch.ones_like(ids), side)))
            ids, mask = (torch.stack(each) for each in zip(*texts, strict=True))
            row = {"input_ids": ids, "attention_mask": mask}
            out.append({k: v if kind == "choice" else v[0] for k, v in row.items()} | {"labels": label})
        elif kind == "audio":
            size = 60 + 20 * (i % 3)
            side = (100 - size, 0) if pad == "left" else (0, 100 - size)
            sound = F.pad(torch.randn(size, generator=g), side)
            out.append({"input_values": sound, "attention_mask": F.pad(torch.ones(size).long(), side), "labels": label})
        else:
            pixels = torch.randn(*((2,) if kind == "video" else ()), 3, 8, 8, generator=g)
            out.append({"pixel_values": pixels, "labels": label})
    return out


KINDS = ("image", "video", "audio", "choice", "sentence")


@pytest.fixture
def make(make_trainer):
    """`make("image", alpha=0.3)`: a trainer of tiny models of a kind."""

    def make(kind, **options):
        arguments = {"model": build(kind), "train_dataset": data(kind), "eval_dataset": data(kind, 7, 5)} | options
        if options.get("cls") is not Trainer and "teacher" not in options:
            arguments["teacher"] = build(kind, 1, layers=2, width=24)
        return make_trainer("sequence", **arguments)

    return make


def reference(student, teacher, batch, alpha=0.3, temperature=2.0):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    z, y = student(**inputs).logits, teacher.eval()(**inputs).logits.detach()
    log_p, log_q = (each.log_softmax(-1) for each in (z / temperature, y / temperature))
    soft = temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    hard = F.cross_entropy(z, batch["labels"])
    return {"soft_loss": soft, "hard_loss": hard, "loss": alpha * soft + (1 - alpha) * hard}


@pytest.mark.parametrize(
    ("kind", "model_type", "auto_class", "tag"),
    [
        ("image", IMAGE, "AutoModelForImageClassification", "image-classification"),
        ("video", VIDEO, "AutoModelForVideoClassification", "video-classification"),
        ("audio", AUDIO, "AutoModelForAudioClassification", "audio-classification"),
        ("choice", MULTIPLE_CHOICE, "AutoModelForMultipleChoice", "multiple-choice"),
        ("sentence", NEXT_SENTENCE, "AutoModelForNextSentencePrediction", "text-classification"),
    ],
)
def test_a_card_has_the_tag_of_its_type_and_a_teacher_by_path_its_class(
    make, tmp_path, kind, model_type, auto_class, tag
):
    assert model_type_of(build(kind)) is model_type
    assert (model_type.auto_class, model_type.pipeline) == (auto_class, tag)
    teacher = build(kind, 1, layers=2, width=24)
    teacher.config.architectures = None
    teacher.save_pretrained(tmp_path / "teacher")
    by_path = make(kind, teacher=str(tmp_path / "teacher"))
    assert by_path.evaluate()["eval_kl"] == pytest.approx(make(kind).evaluate()["eval_kl"], rel=1e-6)
    by_path.create_model_card()
    assert f"pipeline_tag: {tag}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_equal_the_reference_for_any_micro_batches(make, kind):
    for micro, number, pad in ((4, 2, "right"), (1, 8, "left")):
        rows = data(kind, 8, pad=pad)
        options = dict(alpha=0.3, temperature=2.0, train_sampling_strategy="sequential", train_dataset=rows)
        log, gradient = one_step(make, kind, micro, number, **options)
        student = build(kind)
        losses = reference(student.train(), build(kind, 1, layers=2, width=24), collate(rows))
        losses["loss"].backward()
        for name, value in losses.items():
            assert log[name] == pytest.approx(value.item(), rel=1e-5), name
        for name, parameter in student.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(gradient[name], expected, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"teacher": None}, {"alpha": 0.0}], ids=["no teacher", "alpha 0"])
def test_without_distillation_training_is_bit_identical_to_the_trainers(make, kind, options):
    steps = dict(max_steps=20, gradient_accumulation_steps=2, per_device_train_batch_size=2, logging_steps=5)
    results = []
    for arguments in ({"cls": Trainer}, options):
        trainer = make(kind, model=build(kind, dropout=0.1), **steps, **arguments)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        results.append((losses, trainer.evaluate()["eval_loss"], trainer.model.state_dict()))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(results[0][2][name], value) for name, value in results[1][2].items())


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_those_of_all_rows(make, kind):
    metrics = make(kind, alpha=0.3, per_device_eval_batch_size=4).evaluate()
    batch = collate(data(kind, 7, 5))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    z, y = build(kind).eval()(**inputs).logits, build(kind, 1, layers=2, width=24).eval()(**inputs).logits
    log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
    assert metrics["eval_kl"] == pytest.approx((log_q.exp() * (log_q - log_p)).sum(-1).mean().item(), rel=1e-4)
    assert metrics["eval_agreement"] == pytest.approx((z.argmax(-1) == y.argmax(-1)).float().mean().item())
    assert "eval_perplexity" not in metrics


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_problem_type_decides_what_a_classifier_of_any_input_predicts(make, kind, problem):
    options = {"num_labels": 3, "problem_type": problem}
    rows = [row | {"labels": torch.tensor([1.0, 0.0, float(i % 2)])} for i, row in enumerate(data(kind, 4))]
    student, teacher = build(kind, **options), build(kind, 1, layers=2, **options)
    metrics = make(kind, model=student, teacher=teacher, eval_dataset=rows, alpha=0.3).evaluate()
    batch = collate(rows)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    z, y = student(**inputs).logits, teacher(**inputs).logits
    if problem == "regression":
        soft, hard = (z - y).square().mean(), (z - batch["labels"]).square().mean()
    else:
        p, q = torch.sigmoid(z / 2), torch.sigmoid(y / 2)
        soft = 4 * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).sum(-1).mean()
        hard = F.binary_cross_entropy_with_logits(z, batch["labels"])
    assert metrics["eval_soft_loss"] == pytest.approx(soft.item(), rel=1e-4)
    assert metrics["eval_hard_loss"] == pytest.approx(hard.item(), rel=1e-5)


def test_hidden_states_of_all_texts_of_a_row_are_compared_for_multiple_choice(make):
    rows = data("choice", 4)
    teacher = build("choice", 1, layers=2)
    losses = [{"name": "hidden_mse", "layers": "last:1"}]
    log = make("choice", teacher=teacher, alpha=0.0, losses=losses, eval_dataset=rows).evaluate()
    batch = collate(rows)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    states = [
        net.eval()(**inputs, output_hidden_states=True).hidden_states[-1].unflatten(0, (4, 3))
        for net in (build("choice"), teacher)
    ]
    errors = (states[0] - states[1]).square().mean(-1)
    expected = torch.stack([errors[i][mask.bool()].mean() for i, mask in enumerate(batch["attention_mask"])])
    assert log["eval_hidden_mse_loss"] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_labels_outside_the_choices_of_a_row_are_refused(make):
    rows = [row | {"labels": torch.tensor(4)} for row in data("choice", 4)]  # num_labels of the config is 5
    with pytest.raises(DistillError, match=r"labels are outside the student's 3 classes.*from 0 to 2"):
        make("choice", eval_dataset=rows).evaluate()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_integer_labels_of_any_dtype_are_classes(make, dtype):
    losses = []
    for as_dtype in (torch.long, dtype):
        rows = [row | {"labels": torch.as_tensor(row["labels"]).clamp(max=1).to(as_dtype)} for row in data("image", 4)]
        trainer = make("image", train_dataset=rows, eval_dataset=rows, data_collator=collate, max_steps=1)
        trainer.train()
        losses.append([trainer.state.log_history[0]["loss"], trainer.evaluate()["eval_loss"]])
    assert losses[0] == losses[1]


def test_a_missing_label_is_reported_for_classifiers_too(make):
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in data("image", 4)]
    with pytest.raises(DistillError, match=r"has no `labels`.*name the column of the data `labels`"):
        make("image", train_dataset=rows).train()


@pytest.mark.parametrize("losses", [[{"name": "hidden_mse"}], []])
def test_blocks_that_the_config_does_not_describe_are_refused_for_losses_on_features_only(make, losses):
    student, teacher = (
        tf.ResNetForImageClassification(
            tf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
        )
        for _ in range(2)
    )
    refused = pytest.raises(DistillError, match=r"has no `num_hidden_layers`.*use losses on logits")
    with refused if losses else nullcontext():
        make("image", model=student, teacher=teacher, losses=losses, max_steps=1).train()


def test_types_and_label_maps_that_differ_are_refused(make):
    with pytest.raises(DistillError, match="teacher is a video classifier and the student an image classifier"):
        make("image", teacher=build("video", 1))
    with pytest.raises(DistillError, match=r"teacher is a multi-label image classifier.*same problem_type"):
        make("image", teacher=build("image", 1, problem_type="multi_label_classification"))
    with pytest.raises(DistillError, match="4 classes and the student 3"):
        make("image", teacher=build("image", 1, num_labels=4))
    names = [dict(enumerate("abc")), dict(enumerate("acb"))]
    maps = [{"id2label": each, "label2id": {n: i for i, n in each.items()}} for each in names]
    with pytest.raises(DistillError, match="Class 1 is 'c' for the teacher and 'b'"):
        make("image", model=build("image", **maps[0]), teacher=build("image", 1, **maps[1]))


def test_the_type_of_a_custom_classifier_is_that_of_its_class_or_its_main_input():
    class Keywords(tf.Wav2Vec2ForSequenceClassification):
        pass

    class PicturesForSequenceClassification(tf.ViTPreTrainedModel):
        main_input_name = "pixel_values"

    assert model_type_of(Keywords(copy.deepcopy(build("audio").config))) is AUDIO
    assert model_type_of(PicturesForSequenceClassification(build("image").config)) is IMAGE
