"""Teachers with another processor: `teacher_<name>` of a batch is given to the teacher as `<name>`."""

import copy
import pickle

import numpy as np
import pytest
import torch
from datasets import Array3D, Dataset, Features, Value
from gpu_sync import reads_of_steps
from PIL import Image
from tiny import build, whisper
from tiny_vision import IMAGE_ID, vision_examples, vision_processor, vlm
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    default_data_collator,
    set_seed,
)
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hf_distill import (
    DistillConfig,
    DistillError,
    DistillSeq2SeqConfig,
    DistillSeq2SeqTrainer,
    DistillTrainer,
    DualProcessorCollator,
    FrozenTeacher,
)
from hf_distill.cache import write_cache
from hf_distill.core.teacher_inputs import teacher_inputs
from hf_distill.teachers import (
    CachedTeacher,
    EMATeacher,
    MultiTeacher,
    MultiViewTeacher,
    PeerTeacher,
    RoutedTeacher,
    Teacher,
)

WORDS = ["the", "cat", "dog", "owl", "sat", "ran", "on", "under", "a", "mat", "tree", "house", "red", "blue"]


def vit(seed: int, image_size: int, patch_size: int = 8) -> ViTForImageClassification:
    set_seed(seed)
    config = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=5)
    return ViTForImageClassification(
        ViTConfig(image_size=image_size, patch_size=patch_size, initializer_range=0.3, **config)
    )


def image_processor(size: int, mean: float = 0.5) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=[mean] * 3)


def image_rows(n: int = 16) -> list[dict]:
    g = np.random.default_rng(0)
    pixels = g.integers(0, 256, (n, 48, 40, 3)).astype("uint8")
    return [{"image": Image.fromarray(pixels[i]), "label": i % 5} for i in range(n)]


def tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer of words. That of seed 1 has other ids, splits words into letters, and returns `token_type_ids`."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = sorted({*WORDS, *(letter for word in WORDS for letter in word)})
    order = np.random.default_rng(seed).permutation(len(words))
    inner = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*special, *(words[j] for j in order)])}, unk_token="[UNK]")
    )
    letters = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Split("", "isolated")])
    inner.pre_tokenizer = letters if seed else pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    columns = ["input_ids", "attention_mask", *(["token_type_ids"] if seed else [])]
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=64)
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=columns, **names)


def text_rows(n: int = 16, pairs: bool = True) -> list[dict]:
    g = np.random.default_rng(0)
    texts = [" ".join(g.choice(WORDS, 2 + i % 4)) for i in range(2 * n)]
    return [{"text": texts[i], **({"text_pair": texts[n + i]} if pairs else {}), "label": i % 5} for i in range(n)]


def bert(seed: int, layers: int = 2, **options):
    return build("sequence", seed, layers=layers, vocab=len(tokenizer(0)), **options)


def kl(student, teacher, temperature: float):
    p, q = (torch.log_softmax(z / temperature, -1) for z in (teacher, student))
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def reference(student, teacher, batch, alpha: float = 0.5, temperature: float = 2.0):
    """The loss of a batch in ten lines: the teacher reads what begins with `teacher_`, the student the rest."""
    of_teacher = {k.removeprefix("teacher_"): v for k, v in batch.items() if k.startswith("teacher_")}
    of_student = {k: v for k, v in batch.items() if k != "labels" and not k.startswith("teacher_")}
    with torch.no_grad():
        y = teacher.eval()(**of_teacher).logits
    z = student(**of_student).logits
    return alpha * kl(z, y, temperature).mean() + (1 - alpha) * F.cross_entropy(z, batch["labels"])


PAIRS = {
    "images": (
        lambda: vit(0, 32),
        lambda: vit(1, 64),
        lambda: DualProcessorCollator(image_processor(32), image_processor(64, mean=0.3)),
        image_rows,
    ),
    "texts": (
        lambda: bert(0),
        lambda: bert(1, layers=3),
        lambda: DualProcessorCollator(tokenizer(0), tokenizer(1)),
        text_rows,
    ),
}


def of(kind: str):
    return (make() for make in PAIRS[kind])


def trainer_of(tmp_path, student, teacher, collator, rows, cls=DistillTrainer, **options):
    fields = dict(max_steps=1, per_device_train_batch_size=8, train_sampling_strategy="sequential", optim="sgd")
    fields |= dict(learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant", logging_steps=1)
    fields |= dict(save_strategy="no", dataloader_pin_memory=False, per_device_eval_batch_size=5, report_to="none")
    extra = {k: options.pop(k) for k in list(options) if k not in DistillSeq2SeqConfig.__dataclass_fields__}
    config = DistillSeq2SeqConfig if cls is DistillSeq2SeqTrainer else DistillConfig
    args = config(str(tmp_path / "out"), **fields | options)
    return cls(student, args, collator, rows, eval_dataset=rows, teacher=teacher, **extra)


def step(trainer):
    """The log and the gradient of one SGD step with learning rate 1."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    return trainer.state.log_history[0], {name: before[name] - after[name].detach() for name in before}


def assert_gradient(gradient, student):
    for name, parameter in student.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient[name], expected, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("workers", [0, 2])
def test_loss_and_gradient_are_those_of_a_teacher_on_its_inputs(tmp_path, kind, workers):
    student, teacher, collator, rows = of(kind)
    for data, micro in ((rows, 8), (Dataset.from_list(rows), 2)):
        trained = copy.deepcopy(student)
        options = dict(per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro)
        trainer = trainer_of(
            tmp_path, trained, teacher, collator, data, dataloader_num_workers=workers, self_check=True, **options
        )
        log, gradient = step(trainer)
        plain = copy.deepcopy(student)
        loss = reference(plain, teacher, collator(rows[:8]))
        loss.backward()
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert_gradient(gradient, plain)


@pytest.mark.parametrize("kind", PAIRS)
def test_evaluation_and_predictions_read_both_inputs(tmp_path, kind):
    student, teacher, collator, rows = of(kind)
    trainer = trainer_of(tmp_path, student, teacher, collator, rows)
    batch, metrics = collator(rows), trainer.evaluate()
    z, y = reference_logits(student, teacher, batch)
    assert metrics["eval_loss"] == pytest.approx(reference(student.eval(), teacher, batch).item(), rel=1e-5)
    assert metrics["eval_kl"] == pytest.approx(kl(z, y, 1.0).mean().item(), rel=1e-5)
    labelled = trainer.predict(rows)
    unlabelled = trainer.predict([{k: v for k, v in row.items() if k != "label"} for row in rows])
    for output in (labelled, unlabelled):
        np.testing.assert_allclose(output.predictions, z.numpy(), rtol=1e-4, atol=1e-5)
    assert "test_kl" in labelled.metrics
    assert trainer.floating_point_ops(batch) == trainer.floating_point_ops(
        {k: v for k, v in batch.items() if not k.startswith("teacher_")}
    )


def reference_logits(student, teacher, batch):
    with torch.no_grad():
        return (
            student.eval()(**{k: v for k, v in batch.items() if k != "labels" and not k.startswith("teacher_")}).logits,
            teacher.eval()(**teacher_kwargs(batch)).logits,
        )


def teacher_kwargs(batch):
    return {k.removeprefix("teacher_"): v for k, v in batch.items() if k.startswith("teacher_")}


@pytest.mark.parametrize("wrap", ["ema", "peer", "several", "routed", "cached", "custom", "path"])
def test_every_kind_of_teacher_reads_its_inputs(tmp_path, wrap):
    student, teacher, collator, rows = of("texts")
    plain, options, other = copy.deepcopy(student), {}, copy.deepcopy(teacher)

    class Custom(Teacher):
        def forward(self, inputs, targets, feature_requests):
            from hf_distill.core.logits import DenseLogits
            from hf_distill.core.signals import Signals

            assert "text" not in inputs
            assert inputs["token_type_ids"].shape == inputs["input_ids"].shape
            with torch.no_grad():
                names = ("input_ids", "attention_mask", "token_type_ids")
                return Signals(DenseLogits(other.eval()(**{name: inputs[name] for name in names}).logits))

    if wrap == "ema":  # the student itself, before another image of the same size
        student, _, collator, rows = (
            vit(0, 32),
            None,
            DualProcessorCollator(*map(image_processor, (32, 32))),
            image_rows(),
        )
        collator.teacher.image_mean = [0.1] * 3
        plain, other, made = copy.deepcopy(student), copy.deepcopy(student), EMATeacher(0.5)
    elif wrap == "peer":
        made = PeerTeacher(teacher)
    elif wrap == "several":
        made = MultiTeacher({"a": teacher, "b": copy.deepcopy(teacher)})
    elif wrap == "routed":
        rows = [row | {"teacher": name} for row, name in zip(rows, "ab" * 8, strict=True)]
        made = RoutedTeacher({"a": teacher, "b": copy.deepcopy(teacher)})
    elif wrap == "cached":
        options = dict(kind="top_k", k=5, temperature=2.0, batch_size=3)
        write_cache(tmp_path / "c", teacher, rows, collator=collator, **options)
        made, options = CachedTeacher(str(tmp_path / "c")), {}
    elif wrap == "path":
        teacher.save_pretrained(tmp_path / "teacher")
        tokenizer(1).save_pretrained(tmp_path / "teacher")
        made, options = str(tmp_path / "teacher"), {"processing_class": tokenizer(0)}
    else:
        made = Custom()
    log, gradient = step(trainer_of(tmp_path, student, made, collator, rows, **options))
    batch = collator([{k: v for k, v in row.items() if k != "teacher"} for row in rows[:8]])
    loss = reference(plain.train(), other, batch)
    loss.backward()
    of_student = 0.5 * log["soft_loss"] + 0.5 * log["hard_loss"] if wrap == "peer" else log["loss"]
    assert of_student == pytest.approx(loss.item(), rel=5e-3 if wrap == "cached" else 1e-5)  # a cache stores 16 bits
    if wrap not in ("peer", "cached"):
        assert_gradient(gradient, plain)


def test_a_cache_is_keyed_by_the_inputs_of_the_teacher(tmp_path):
    student, teacher, collator, rows = of("images")
    write_cache(tmp_path / "c", teacher, rows, collator=collator, kind="top_k", k=5, temperature=2.0)
    live = step(trainer_of(tmp_path, copy.deepcopy(student), teacher, collator, rows))[0]["loss"]
    cached = CachedTeacher(str(tmp_path / "c"))
    log, _ = step(trainer_of(tmp_path, copy.deepcopy(student), cached, collator, rows))
    assert log["loss"] == pytest.approx(live, rel=1e-3)  # stored in 16 bits
    other_student = DualProcessorCollator(image_processor(32, mean=0.1), image_processor(64, mean=0.3))
    step(trainer_of(tmp_path, copy.deepcopy(student), cached, other_student, rows))  # the key has none of the student's
    other_teacher = DualProcessorCollator(image_processor(32), image_processor(64, mean=0.4))
    with pytest.raises(DistillError, match="examples of a batch are not in"):
        trainer_of(tmp_path, student, cached, other_teacher, rows).train()


def test_a_cache_of_another_tokenizer_needs_its_tokens(tmp_path):
    student, teacher, collator, rows = of("texts")
    options = dict(collator=collator, kind="top_k", k=5, temperature=2.0, processing_class=tokenizer(1))
    write_cache(tmp_path / "c", teacher, rows, **options)
    cached = CachedTeacher(str(tmp_path / "c"))
    step(trainer_of(tmp_path, student, cached, collator, rows, processing_class=tokenizer(0)))
    tokens = [dict(tokenizer(0)(row["text"])) | {"label": row["label"]} for row in rows]
    with pytest.raises(DistillError, match=r"was written with another tokenizer .*hf_distill.DualProcessorCollator"):
        trainer_of(tmp_path, student, cached, None, tokens, processing_class=tokenizer(0))


@pytest.mark.parametrize("source", ["columns", "transform"])
def test_columns_of_the_teacher_survive_the_removal_of_unused_columns(tmp_path, source):
    student, teacher, collator, rows = of("images")
    batch = collator(rows)
    expected = reference(copy.deepcopy(student), teacher, {k: v[:8] for k, v in batch.items()}).item()
    options = {}
    if source == "columns":
        shapes = {"pixel_values": (3, 32, 32), "teacher_pixel_values": (3, 64, 64)}
        features = {name: Array3D(shape, "float32") for name, shape in shapes.items()} | {"labels": Value("int64")}
        columns = {name: value.numpy() for name, value in batch.items()} | {"note": ["x"] * 16}
        data = Dataset.from_dict(columns, features=Features(features | {"note": Value("string")}))
    else:
        data = Dataset.from_list([row | {"note": "x"} for row in rows])
        data.set_transform(
            lambda part: dict(collator([dict(zip(part, row, strict=True)) for row in zip(*part.values(), strict=True)]))
        )
        options["remove_unused_columns"] = False  # as for Trainer: `image` is no input of a model
    log, _ = step(trainer_of(tmp_path, student, teacher, default_data_collator, data, **options))
    assert log["loss"] == pytest.approx(expected, rel=1e-5)


def test_pretokenized_columns_are_padded_by_each_collator(tmp_path):
    rows = text_rows()
    own, other = tokenizer(0), tokenizer(1)
    data = [
        dict(own(r["text"], r["text_pair"]))
        | {f"teacher_{k}": v for k, v in other(r["text"], r["text_pair"]).items()}
        | {"label": r["label"]}
        for r in rows
    ]
    collator = DualProcessorCollator(DataCollatorWithPadding(own), DataCollatorWithPadding(other))
    raw = DualProcessorCollator(own, other)
    first, second = collator(data), raw(rows)
    assert {*first} == {*second}
    assert all(torch.equal(first[key], second[key]) for key in second)
    losses = [
        step(trainer_of(tmp_path, bert(0), bert(1), one, each))[0]["loss"]
        for one, each in ((collator, Dataset.from_list(data)), (raw, rows))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_token_classifiers_with_two_tokenizers_compare_one_token_of_each_word(tmp_path):
    own, other, labels = tokenizer(0), tokenizer(1), np.random.default_rng(0)

    def tokens(each, words, tags):
        encoded = each(words, is_split_into_words=True)
        ids = encoded.word_ids()
        first = [i for i, word in enumerate(ids) if word is not None and word not in ids[:i]]
        return dict(encoded) | {"labels": [tags[ids[i]] if i in first else -100 for i in range(len(ids))]}

    data = []
    for row in text_rows():
        words = row["text"].split()
        tags = labels.integers(0, 5, len(words)).tolist()
        data.append(tokens(own, words, tags) | {f"teacher_{k}": v for k, v in tokens(other, words, tags).items()})
    collator = DualProcessorCollator(*map(DataCollatorForTokenClassification, (own, other)))
    vocab = len(own)
    student, teacher = build("token", 0, vocab=vocab), build("token", 1, vocab=vocab)
    plain = copy.deepcopy(student)
    log, gradient = step(trainer_of(tmp_path, student, teacher, collator, Dataset.from_list(data)))
    batch = collator(data[:8])
    of_teacher = teacher_kwargs(batch)
    y = teacher(**{k: v for k, v in of_teacher.items() if k != "labels"}).logits[of_teacher["labels"] != -100].detach()
    z = plain(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[batch["labels"] != -100]
    loss = 0.5 * kl(z, y, 2.0).mean() + 0.5 * F.cross_entropy(z, batch["labels"][batch["labels"] != -100])
    loss.backward()
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_gradient(gradient, plain)


def speech_model(seed: int, mels: int, **options) -> WhisperForConditionalGeneration:
    config = whisper().config
    config.num_mel_bins, config.max_source_positions = mels, 50
    set_seed(seed)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = whisper().generation_config
    return model


def extractor(mels: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=mels, chunk_length=1)


def audio_rows(n: int = 8) -> list[dict]:
    g = np.random.default_rng(0)
    return [
        {"audio": {"array": g.normal(size=4000 + 500 * i), "sampling_rate": 16000}, "labels": [*range(4, 7 + i % 5)]}
        for i in range(n)
    ]


@pytest.mark.parametrize("cls", [DistillTrainer, DistillSeq2SeqTrainer])
def test_whisper_with_another_feature_extractor_shares_the_labels(tmp_path, cls):
    student, teacher, rows = speech_model(0, 8), speech_model(1, 16), audio_rows()
    collator, plain = DualProcessorCollator(extractor(8), extractor(16)), copy.deepcopy(student)
    options = {"predict_with_generate": True} if cls is DistillSeq2SeqTrainer else {}
    trainer = trainer_of(tmp_path, student, teacher, collator, rows, cls=cls, **options)
    assert trainer.evaluate()["eval_kl"] > 0
    log, gradient = step(trainer)
    batch = collator(rows)
    is_target, labels = batch["labels"] != -100, batch["labels"]
    with torch.no_grad():
        y = teacher(input_features=batch["teacher_input_features"], labels=labels).logits[is_target]
    z = plain(input_features=batch["input_features"], labels=labels).logits[is_target]
    loss = 0.5 * kl(z, y, 2.0).mean() + 0.5 * F.cross_entropy(z, labels[is_target])
    loss.backward()
    logs = next(each for each in trainer.state.log_history if "loss" in each)
    assert log is not None
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_gradient(gradient, plain)


@pytest.mark.parametrize(
    ("student", "teacher", "missing", "expected"),
    [
        (  # image: the mask belongs to it
            {"pixel_values": 0, "pixel_mask": 1, "labels": 2},
            {"pixel_values": 3},
            None,
            {"pixel_values": 3, "labels": 2},
        ),
        (  # tokens: with everything that is as long as they are
            {"input_ids": 0, "attention_mask": 1, "token_type_ids": 2, "labels": 3},
            {"input_ids": 4, "attention_mask": 5},
            None,
            {"input_ids": 4, "attention_mask": 5, "labels": 3},
        ),
        (  # another prompt, and the same image
            {"input_ids": 0, "attention_mask": 1, "pixel_values": 2, "labels": 3},
            {"input_ids": 4, "attention_mask": 5, "labels": 6},
            None,
            {"input_ids": 4, "attention_mask": 5, "pixel_values": 2, "labels": 6},
        ),
        (  # another image, and the same tokens
            {"input_ids": 0, "attention_mask": 1, "pixel_values": 2, "labels": 3},
            {"pixel_values": 4},
            None,
            {"input_ids": 0, "attention_mask": 1, "pixel_values": 4, "labels": 3},
        ),
        (  # audio: without tokens, the mask is that of the audio
            {"input_values": 0, "attention_mask": 1, "labels": 2, "decoder_input_ids": 3},
            {"input_features": 4},
            None,
            {"input_features": 4, "labels": 2, "decoder_input_ids": 3},
        ),
        (  # only another mask
            {"input_values": 0, "labels": 1},
            {"attention_mask": 2},
            None,
            {"input_values": 0, "attention_mask": 2, "labels": 1},
        ),
        (  # decoder inputs follow from the labels
            {"input_ids": 0, "labels": 1, "shift_labels": 1, "decoder_input_ids": 2},
            {"input_ids": 3, "labels": 4},
            None,
            {"input_ids": 3, "labels": 4},
        ),
        (  # a student that reads text: the mask of its tokens is not that of the teacher's audio
            {"input_ids": 0, "attention_mask": 1, "labels": 2},
            {"input_values": 3},
            {"input_values", "attention_mask"},
            {"input_values": 3, "labels": 2},
        ),
    ],
)
def test_inputs_of_the_teacher_replace_those_of_the_same_kind(student, teacher, missing, expected):
    batch = student | {f"teacher_{name}": value for name, value in teacher.items()}
    assert teacher_inputs(batch, missing) == expected
    assert teacher_inputs(student, missing) == student


def test_labels_and_batches_of_the_collator_equal_those_of_the_processors():
    rows, (own, other) = text_rows(5), (tokenizer(0), tokenizer(1))
    texts, pairs = [r["text"] for r in rows], [r["text_pair"] for r in rows]
    collator = pickle.loads(pickle.dumps(DualProcessorCollator(own, other, teacher_kwargs={"max_length": 12})))
    batch = collator(rows)
    for prefix, each, options in (("", own, {}), ("teacher_", other, {"max_length": 12, "truncation": True})):
        for name, value in each(texts, pairs, padding=True, return_tensors="pt", **options).items():
            assert torch.equal(batch[f"{prefix}{name}"], value)
    assert batch["teacher_input_ids"].shape[1] == 12
    assert batch["labels"].tolist() == [row["label"] for row in rows]

    single = DualProcessorCollator(own, other)(text_rows(5, pairs=False))
    assert torch.equal(single["input_ids"], own(texts, padding=True, return_tensors="pt")["input_ids"])

    audio = audio_rows(4)
    waves = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    batch = DualProcessorCollator(waves, extractor(16))(audio)
    lengths = [len(row["audio"]["array"]) for row in audio]
    assert batch["input_values"].shape == batch["attention_mask"].shape == (4, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["teacher_input_features"].shape == (4, 16, 100)
    assert batch["labels"].shape == (4, 6)
    assert batch["labels"][0].tolist() == [4, 5, 6, -100, -100, -100]

    floats = [{"text": "cat", "labels": [1.0, 0.0]}, {"text": "dog", "labels": [0.0, 0.5]}]
    assert DualProcessorCollator(own, other)(floats)["labels"].tolist() == [[1.0, 0.0], [0.0, 0.5]]


def test_a_processor_reads_the_column_that_the_rows_have():
    joint = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer(0))
    audio, texts = audio_rows(3), [{"text": row["text"]} for row in text_rows(3)]
    for rows, name in ((audio, "input_values"), (texts, "input_ids")):
        assert len(DualProcessorCollator(joint, joint)(rows)[f"teacher_{name}"]) == 3
    both = [a | t for a, t in zip(audio, texts, strict=True)]
    with pytest.raises(
        DistillError, match=r"reads `audio` or `text`, and the rows have .*pass the part of the processor"
    ):
        DualProcessorCollator(joint, joint)(both)


def test_functions_take_the_place_of_processors():
    rows = image_rows(3)

    def make(size, rows):
        images = torch.tensor([[float(np.asarray(row["image"])[0, 0, 0])] * size for row in rows])
        return {"pixel_values": images, "labels": torch.tensor([row["label"] for row in rows])}

    batch = DualProcessorCollator(lambda rows: make(2, rows), lambda rows: make(3, rows))(rows)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "pixel_values": (3, 2),
        "labels": (3,),
        "teacher_pixel_values": (3, 3),
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DualProcessorCollator("vit", image_processor(8)), "student of a DualProcessorCollator is 'vit': give"),
        (
            lambda: DualProcessorCollator(image_processor(8), ViTImageProcessor),
            "teacher of a Dual.* give an image proc",
        ),
        (
            lambda: DualProcessorCollator(default_data_collator, tokenizer(0), student_kwargs={"max_length": 2}),
            r"student_kwargs \['max_length'\] are for calls of a processor",
        ),
        (lambda: DualProcessorCollator(tokenizer(0), tokenizer(1), columns="text"), "columns is 'text': give a list"),
        (
            lambda: DualProcessorCollator(tokenizer(0), tokenizer(1))([{"sentence": "cat", "label": 1}]),
            r"student's .* reads the column `text`, and row 0 of the batch has `sentence`, `label`: rename",
        ),
        (
            lambda: DualProcessorCollator(tokenizer(0), tokenizer(1))([{"text": "cat"}, {"text": None}]),
            "row 1 of the batch has",
        ),
        (
            lambda: DualProcessorCollator(tokenizer(0), tokenizer(1))([{"text": "cat", "label": "animal"}]),
            "`label` has 'animal' .*class_encode_column",
        ),
        (
            lambda: DualProcessorCollator(extractor(8), Wav2Vec2FeatureExtractor(sampling_rate=8000))(audio_rows(2)),
            r"rate of 16000 Hz, and the teacher's Wav2Vec2.* reads 8000: .*Audio\(sampling_rate=8000\)",
        ),
        (
            lambda: DualProcessorCollator(DataCollatorWithPadding(tokenizer(0)), DataCollatorWithPadding(tokenizer(1)))(
                [{"input_ids": [4, 5], "label": 0}]
            ),
            "teacher's collator, a DataCollatorWithPadding, reads columns named teacher_<name>",
        ),
    ],
)
def test_wrong_arguments_and_rows_of_the_collator_are_refused(make, message):
    with pytest.raises(DistillError, match=message):
        make()


def changed(collator, change):
    """A collator whose batches are changed."""

    def collate_changed(rows):
        batch = dict(collator(rows))
        change(batch)
        return batch

    return collate_changed


def renamed(old, new):
    return lambda batch: batch.update({new: batch.pop(old)})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "images",
            lambda b: b.pop("teacher_pixel_values"),
            r"cannot read `pixel_values` of the student: image_size is 64 for the teacher and 32 .*"
            r"Give it `teacher_pixel_values`.*DualProcessorCollator",
        ),
        (
            "images",
            renamed("teacher_pixel_values", "teacher_pixels"),
            "has teacher_pixels, .* reads no pixels. It reads",
        ),
        (
            "images",
            lambda b: b.update(teacher_pixel_values=b["teacher_pixel_values"][:3]),
            r"8 rows and 3 rows for the teacher \(teacher_pixel_values\)",
        ),
        (
            "images",
            lambda b: (b.update(other=b.pop("pixel_values")), b.pop("teacher_pixel_values")),
            r"a ViTForImageClassification, reads `pixel_values`, .* the collator returned labels, other.* Give",
        ),
        (
            "texts",
            lambda b: b["teacher_input_ids"][0].fill_(99),
            r"teacher_input_ids has the token id 99, and the teacher's embedding has",
        ),
        ("texts", lambda b: b.pop("teacher_attention_mask"), "has teacher_input_ids, but lacks teacher_attention_mask"),
        (
            "texts",
            lambda b: b.update(teacher_image_sizes=b["labels"]),
            "has teacher_image_sizes, .*reads no image_sizes",
        ),
        (
            "texts",
            lambda b: b.update({k: v[1:] for k, v in b.items() if k.startswith("teacher_")}),
            r"8 rows and 7 rows for the teacher \(teacher_input_ids\)",
        ),
    ],
)
def test_wrong_inputs_of_the_teacher_are_refused(tmp_path, kind, change, message):
    student, teacher, collator, rows = of(kind)
    options = {"remove_unused_columns": False}
    with pytest.raises(DistillError, match=message):
        trainer_of(tmp_path, student, teacher, changed(collator, change), rows, **options).train()


def test_keys_of_a_teacher_without_a_teacher_are_refused_and_dropped_with_alpha_0(tmp_path):
    student, teacher, collator, rows = of("images")
    options = {"remove_unused_columns": False}
    with pytest.raises(DistillError, match="has teacher_pixel_values, inputs of a teacher, and there is no teacher"):
        trainer_of(tmp_path, copy.deepcopy(student), None, collator, rows).train()
    control = trainer_of(tmp_path, copy.deepcopy(student), teacher, collator, rows, alpha=0.0)
    plain = trainer_of(tmp_path, copy.deepcopy(student), None, changed(collator, drop_teacher_keys), rows, **options)
    assert step(control)[0]["loss"] == step(plain)[0]["loss"]
    assert control.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def drop_teacher_keys(batch):
    for name in [name for name in batch if name.startswith("teacher_")]:
        del batch[name]


def test_another_tokenizer_needs_the_tokens_of_the_teacher(tmp_path):
    rows = [dict(tokenizer(0)(row["text"], padding="max_length", max_length=9)) | {"label": 1} for row in text_rows()]
    message = "ids mean different tokens .*hf_distill.DualProcessorCollator"
    for data in (rows, Dataset.from_list(rows)):  # nothing can make the tokens, so the trainer is refused at once
        known = FrozenTeacher(bert(1), processing_class=tokenizer(1))
        with pytest.raises(DistillError, match=message):
            trainer_of(tmp_path, bert(0), known, default_data_collator, data, processing_class=tokenizer(0))
    known = FrozenTeacher(bert(1), processing_class=tokenizer(1))
    collator = changed(default_data_collator, lambda batch: None)
    with pytest.raises(DistillError, match=f"{message}.*The batch has attention_mask, input_ids, labels"):
        trainer_of(tmp_path, bert(0), known, collator, rows, processing_class=tokenizer(0)).train()
    teachers = {"a": FrozenTeacher(bert(1), processing_class=tokenizer(1)), "b": bert(2)}
    teachers["b"] = FrozenTeacher(bert(2), processing_class=tokenizer(0))
    with pytest.raises(
        DistillError, match="The teachers a have another tokenizer than the student, and the teachers a, b"
    ):
        trainer_of(tmp_path, bert(0), MultiTeacher(teachers), collator, rows, processing_class=tokenizer(0))
    words = BertConfig(vocab_size=len(tokenizer(0)), hidden_size=16, num_attention_heads=2, intermediate_size=32)
    known = FrozenTeacher(BertForQuestionAnswering(words), processing_class=tokenizer(1))
    with pytest.raises(DistillError, match="Use a teacher with the student's tokenizer: start and end"):
        trainer_of(tmp_path, BertForQuestionAnswering(words), known, collator, rows, processing_class=tokenizer(0))


def test_a_misspelt_column_is_not_removed_in_silence(tmp_path):
    rows = [{"input_ids": [4, 5], "teacher_input_id": [4], "labels": 1}]
    for data in (rows, Dataset.from_list(rows)):
        with pytest.raises(DistillError, match=r"has the column teacher_input_id, .* rename it to teacher_input_ids"):
            trainer_of(tmp_path, bert(0), bert(1), default_data_collator, data)
    rows = [{"input_ids": [4, 5], "attention_mask": [1, 1], "teacher_comment": "x", "labels": i % 2} for i in range(8)]
    trainer_of(tmp_path, bert(0), bert(1), default_data_collator, Dataset.from_list(rows)).train()  # as Trainer does


@pytest.mark.parametrize("kind", ["view", "peer"])
def test_teachers_that_read_the_students_batch_refuse_other_inputs(tmp_path, kind):
    student, teacher, collator, rows = of("texts")
    made, change = PeerTeacher(teacher), lambda b: b.update(teacher_labels=b["labels"])
    if kind == "view":
        made, change = MultiViewTeacher({"token_dropout": 0.1}, processing_class=tokenizer(0)), lambda b: None
    options = {"remove_unused_columns": False}
    with pytest.raises(DistillError, match="reads the student's batch"):
        trainer_of(tmp_path, student, made, changed(collator, change), rows, **options).train()


def test_hidden_states_are_compared_where_both_models_have_as_many_positions(tmp_path):
    losses = [{"name": "hidden_mse", "layers": [[1, 1]]}]
    collator, rows = DualProcessorCollator(image_processor(32), image_processor(64)), image_rows()
    student, teacher = vit(0, 32, patch_size=8), vit(1, 64, patch_size=16)
    log, _ = step(trainer_of(tmp_path, copy.deepcopy(student), teacher, collator, rows, losses=losses))
    batch = collator(rows[:8])
    hidden = [
        model(pixel_values, output_hidden_states=True).hidden_states[2]
        for model, pixel_values in ((student, batch["pixel_values"]), (teacher, batch["teacher_pixel_values"]))
    ]
    expected = F.mse_loss(*hidden).item()
    assert log["hidden_mse_loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DistillError, match="hidden states of shape"):
        trainer_of(tmp_path, student, vit(1, 64), collator, rows, losses=losses).train()
    student, teacher, collator, rows = of("texts")
    with pytest.raises(DistillError, match="rows have different numbers of tokens"):
        trainer_of(tmp_path, student, teacher, collator, rows, losses=losses).train()


def test_an_encoder_decoder_model_shares_the_labels_after_another_input(tmp_path):
    student, teacher, g = build("t5", 0), build("t5", 1, layers=3), torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": torch.randint(3, 90, (6,), generator=g),
            "attention_mask": torch.ones(6, dtype=torch.long),
            "labels": torch.randint(3, 90, (5,), generator=g).where(torch.arange(5) < 3 + i % 3, -100),
            "teacher_input_ids": torch.randint(3, 90, (9,), generator=g),
            "teacher_attention_mask": (torch.arange(9) < 7 + i % 3).long(),
        }
        for i in range(8)
    ]
    losses, plain = [{"name": "hidden_mse", "stack": "decoder", "layers": [[0, 0]]}], copy.deepcopy(student)
    log, _ = step(trainer_of(tmp_path, copy.deepcopy(student), teacher, default_data_collator, rows, losses=losses))
    batch = default_data_collator(rows)
    labels, is_target, found = batch["labels"], batch["labels"] != -100, []
    with torch.no_grad():
        for model, inputs in ((teacher.eval(), teacher_kwargs(batch)), (plain, batch)):
            names = ("input_ids", "attention_mask")
            given = {name: inputs[name] for name in names}
            outputs = model(**given, labels=labels, output_hidden_states=True)
            found.append((outputs.logits[is_target], outputs.decoder_hidden_states[1][is_target]))
    (y, hidden_t), (z, hidden_s) = found
    loss = 0.5 * kl(z, y, 2.0).mean() + 0.5 * F.cross_entropy(z, labels[is_target])
    assert log["soft_loss"] * 0.5 + log["hard_loss"] * 0.5 == pytest.approx(loss.item(), rel=1e-5)
    assert log["hidden_mse_loss"] == pytest.approx(F.mse_loss(hidden_s, hidden_t).item(), rel=1e-5)
    losses = [losses[0] | {"stack": "encoder"}]
    with pytest.raises(DistillError, match="rows have different numbers of tokens"):
        trainer_of(tmp_path, student, teacher, default_data_collator, rows, losses=losses).train()


def test_a_model_outside_transformers_reads_its_inputs(tmp_path):
    class Sums(PreTrainedModel):
        """Its classes are sums of its input `x`; `main_input_name` is the default of transformers."""

        config_class = PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.scale = torch.nn.Linear(3, 5)
            self.post_init()

        def forward(self, x):
            return {"logits": self.scale(x)}

    set_seed(0)
    student, teacher = (Sums(PretrainedConfig(num_labels=5)) for _ in range(2))
    rows = [{"x": torch.rand(3), "teacher_x": torch.rand(3), "labels": torch.tensor(i % 5)} for i in range(8)]
    plain = copy.deepcopy(student)
    log, _ = step(trainer_of(tmp_path, student, teacher, default_data_collator, rows, model_type="classification"))
    batch = default_data_collator(rows)
    z, y = plain(batch["x"])["logits"], teacher(batch["teacher_x"])["logits"].detach()
    loss = 0.5 * kl(z, y, 2.0).mean() + 0.5 * F.cross_entropy(z, batch["labels"])
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_regression_models_with_two_tokenizers(tmp_path):
    student, teacher = (bert(seed) for seed in (0, 1))
    for model in (student, teacher):
        model.config.problem_type = "regression"
    rows = [row | {"label": [i / 4 + j for j in range(5)]} for i, row in enumerate(text_rows())]
    collator, plain = DualProcessorCollator(tokenizer(0), tokenizer(1)), copy.deepcopy(student)
    log, gradient = step(trainer_of(tmp_path, student, teacher, collator, rows, alpha=0.3))
    batch = collator(rows[:8])
    y = teacher(**teacher_kwargs(batch)).logits.detach()
    z = plain(batch["input_ids"], batch["attention_mask"]).logits
    loss = 0.3 * F.mse_loss(z, y) + 0.7 * F.mse_loss(z, batch["labels"])
    loss.backward()
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_gradient(gradient, plain)


class HalfPrecisionCollator(DualProcessorCollator):
    """Gives the teacher's audio in another half precision than that of the teacher, as DeepSpeed does."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        return {name: value.half() if name.startswith("teacher_input") else value for name, value in batch.items()}


@pytest.mark.parametrize("collator_class", [DualProcessorCollator, HalfPrecisionCollator])
def test_a_teacher_in_half_precision_reads_its_audio(tmp_path, collator_class):
    teacher, rows = speech_model(1, 16), audio_rows()
    in_half_precision = copy.deepcopy(teacher).to(torch.bfloat16)
    logs = [
        step(trainer_of(tmp_path, speech_model(0, 8), model, collator(extractor(8), extractor(16)), rows))[0]
        for collator, model in ((DualProcessorCollator, teacher), (collator_class, in_half_precision))
    ]
    assert logs[1]["soft_loss"] == pytest.approx(logs[0]["soft_loss"], rel=0.05)


def test_a_step_still_reads_once_for_each_micro_batch(tmp_path):
    student, teacher, collator, rows = of("texts")
    options = {"per_device_train_batch_size": 1, "max_steps": 4, "gradient_accumulation_steps": 2, "logging_steps": 100}
    _, micro, _ = reads_of_steps(trainer_of(tmp_path, student, teacher, collator, rows, **options), 2)
    assert micro == {("tolist", "core/targets.py:_read"): 1}


@pytest.mark.parametrize("larger", [False, True])
def test_a_vision_language_teacher_reads_other_images(tmp_path, larger):
    """With other pixels only, the tokens are shared; a larger image has more tokens, at which the text is elsewhere."""
    collate = DataCollatorForVisionLanguageModeling(vision_processor("qwen"))

    def both(rows):
        batch = dict(collate(copy.deepcopy(rows)))
        if not larger:
            images = {"pixel_values": 0.5 * batch["pixel_values"], "image_grid_thw": batch["image_grid_thw"]}
            return batch | {f"teacher_{name}": value for name, value in images.items()}
        sizes = [row | {"images": [image.resize((32, 16)) for image in row["images"]]} for row in rows]
        return batch | {f"teacher_{name}": value for name, value in collate(copy.deepcopy(sizes)).items()}

    student, teacher, rows = vlm("qwen", 0), vlm("qwen", 1, layers=3, width=24), vision_examples(8)
    plain, batch = copy.deepcopy(student), both(rows)
    assert (len(batch["teacher_pixel_values"]) > len(batch["pixel_values"])) == larger
    options = dict(remove_unused_columns=False, processing_class=vision_processor("qwen"), learning_rate=1e-3)
    trainer = trainer_of(tmp_path, student, teacher, both, rows, **options)
    log, _ = step(trainer)
    of_student = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
    found = []
    for model, inputs in ((plain, of_student), (teacher.eval(), of_student | teacher_kwargs(batch))):
        labels = inputs["labels"][:, 1:].masked_fill(inputs["labels"][:, 1:] == IMAGE_ID, -100)
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, :-1]
        found.append((logits[labels != -100].detach(), labels[labels != -100]))
    (z, labels), (y, labels_of_teacher) = found
    assert torch.equal(labels, labels_of_teacher)
    loss = 0.5 * kl(z, y, 2.0).mean() + 0.5 * F.cross_entropy(z, labels)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
