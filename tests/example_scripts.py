"""What the example scripts of transformers pass to their trainers, with tiny models and made-up data.

Each function returns the arguments of one script's trainer: `model` is a function of a seed and a number of layers,
`fields` are the arguments that the script needs in its training arguments, and all others go to the trainer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import transformers as tf
from datasets import Dataset, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import hf_distill

WORDS = [
    "the",
    "cat",
    "dog",
    "owl",
    "sat",
    "ran",
    "on",
    "under",
    "a",
    "mat",
    "tree",
    "house",
    "red",
    "green",
    "blue",
    "is",
    "was",
    "not",
    "and",
    "or",
    "very",
    "who",
    "where",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ENCODER = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, initializer_range=0.3)
DROPOUT = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


@dataclass
class Situation:
    """The arguments of a script's trainer.

    model:    returns the model of a seed and a number of layers
    trainer:  arguments of the trainer besides the model and its arguments
    fields:   fields of the training arguments
    base:     "Trainer" or "Seq2SeqTrainer"
    subclass: returns the script's own subclass of a trainer class
    """

    model: Callable[..., Any]
    trainer: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    base: str = "Trainer"
    subclass: Callable[[type], type] = lambda cls: cls


@cache
def tokenizer() -> tf.PreTrainedTokenizerFast:
    """A tokenizer of words with the special tokens of BERT."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(names, SPECIAL, strict=True)),
    )


def sentence(i: int, length: int | None = None) -> str:
    """The i-th sentence, of 3 to 9 words."""
    draw = np.random.default_rng(i)
    return " ".join(draw.choice(WORDS, length or int(draw.integers(3, 10))))


def split(data: Any, held_out: int = 7) -> dict[str, Any]:
    """Training and evaluation rows of a data set."""
    cut = len(data) - held_out
    return {"train_dataset": data.select(range(cut)), "eval_dataset": data.select(range(cut, len(data)))}


def built(cls: type, config: Any, seed: int = 0) -> tf.PreTrainedModel:
    """A random model."""
    tf.set_seed(seed)
    return cls(config)


def bert(cls: type, seed: int = 0, layers: int = 2, **options: Any) -> tf.PreTrainedModel:
    """A random BERT with dropout."""
    size = dict(vocab_size=len(tokenizer()), num_hidden_layers=layers, max_position_embeddings=64)
    return built(cls, tf.BertConfig(**size, **ENCODER, **DROPOUT, **options), seed)


def accuracy(prediction: tf.EvalPrediction) -> dict[str, float]:
    """Accuracy, as the scripts of classifiers compute it."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy_of_script": float((logits.argmax(-1) == prediction.label_ids).mean())}


def text_pairs(label: Callable[[int], Any], padding: bool | str = False) -> Dataset:
    """Tokenized pairs of sentences with their raw columns, as `run_glue.py` has them."""
    rows = {name: [sentence(2 * i + j) for i in range(31)] for j, name in enumerate(("sentence1", "sentence2"))}
    data = Dataset.from_dict(rows | {"label": [label(i) for i in range(31)], "idx": list(range(31))})
    return data.map(
        lambda row: tokenizer()(row["sentence1"], row["sentence2"], max_length=16, truncation=True, padding=padding)
    )


def glue() -> Situation:
    """run_glue.py: pairs of sentences into three classes."""
    data = split(text_pairs(lambda i: i % 3))
    data |= {"compute_metrics": accuracy, "data_collator": tf.DataCollatorWithPadding(tokenizer())}
    return Situation(partial(bert, tf.BertForSequenceClassification, num_labels=3), data)


def glue_sts_b() -> Situation:
    """run_glue.py with STS-B: the similarity of two sentences."""

    def mse(prediction: tf.EvalPrediction) -> dict[str, float]:
        return {"mse_of_script": float(((prediction.predictions.squeeze() - prediction.label_ids) ** 2).mean())}

    data = split(text_pairs(lambda i: float(i % 6)).cast_column("label", Value("float32")))
    data |= {"compute_metrics": mse, "data_collator": tf.DataCollatorWithPadding(tokenizer())}
    return Situation(partial(bert, tf.BertForSequenceClassification, num_labels=1), data)


def multi_label() -> Situation:
    """run_classification.py with several labels for each text."""
    data = text_pairs(lambda i: [float(i % 2), float(i % 3 == 0), 0.0, 1.0])
    data = split(data.cast_column("label", Features({"label": [Value("float32")]})["label"]))
    model = partial(bert, tf.BertForSequenceClassification, num_labels=4, problem_type="multi_label_classification")
    return Situation(model, data | {"data_collator": tf.DataCollatorWithPadding(tokenizer())})


def ner() -> Situation:
    """run_ner.py: a class for each word, and -100 for special tokens."""

    def tokenize(row: dict) -> dict:
        encoded = tokenizer()(row["tokens"], is_split_into_words=True)
        words = encoded.word_ids()
        return encoded | {"labels": [-100 if word is None else row["ner_tags"][word] for word in words]}

    def f1(prediction: tf.EvalPrediction) -> dict[str, float]:
        counted = prediction.label_ids != -100
        right = prediction.predictions.argmax(-1)[counted] == prediction.label_ids[counted]
        return {"accuracy_of_script": float(right.mean())}

    words = [sentence(i).split() for i in range(31)]
    data = Dataset.from_dict({"tokens": words, "ner_tags": [[len(w) % 5 for w in row] for row in words]}).map(tokenize)
    trainer = split(data) | {
        "compute_metrics": f1,
        "processing_class": tokenizer(),
        "data_collator": tf.DataCollatorForTokenClassification(tokenizer(), pad_to_multiple_of=8),
    }
    return Situation(partial(bert, tf.BertForTokenClassification, num_labels=5), trainer)


def qa() -> Situation:
    """run_qa.py: it evaluates with a subclass of the trainer, which post-processes the logits of starts and ends."""

    def subclass(cls: type) -> type:
        class QuestionAnsweringTrainer(cls):  # type: ignore[misc,valid-type]
            def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
                dataloader = self.get_eval_dataloader(eval_dataset)
                compute_metrics, self.compute_metrics = self.compute_metrics, None
                try:
                    output = self.evaluation_loop(
                        dataloader, "Evaluation", prediction_loss_only=None, metric_key_prefix=metric_key_prefix
                    )
                finally:
                    self.compute_metrics = compute_metrics
                starts, ends = output.predictions
                answers = [[int(s), int(e)] for s, e in zip(starts.argmax(-1), ends.argmax(-1), strict=True)]
                metrics = output.metrics | {f"{metric_key_prefix}_answer_sum": sum(map(sum, answers))}
                self.log(metrics)
                return metrics

        return QuestionAnsweringTrainer

    pairs = text_pairs(lambda i: i, padding="max_length").remove_columns(["label"])
    pairs = pairs.map(lambda row: {"start_positions": 5, "end_positions": sum(row["attention_mask"]) - 2})
    data = split(pairs) | {"data_collator": tf.default_data_collator, "processing_class": tokenizer()}
    return Situation(partial(bert, tf.BertForQuestionAnswering), data, subclass=subclass)


def swag() -> Situation:
    """run_swag.py: which of four endings follows a sentence."""

    def tokenize(row: dict) -> dict:
        encoded = tokenizer()([row["sent1"]] * 4, [row[f"ending{i}"] for i in range(4)])
        return {name: list(value) for name, value in encoded.items()}

    rows = {f"ending{j}": [sentence(5 * i + j, 3) for i in range(31)] for j in range(4)}
    rows |= {"sent1": [sentence(5 * i + 4) for i in range(31)], "label": [i % 4 for i in range(31)]}
    data = split(Dataset.from_dict(rows).map(tokenize)) | {"compute_metrics": accuracy}
    data["data_collator"] = tf.DataCollatorForMultipleChoice(tokenizer=tokenizer())
    return Situation(partial(bert, tf.BertForMultipleChoice), data)


def grouped_texts(length: int = 16) -> Dataset:
    """Texts in blocks of equal length, as `run_clm.py` makes them."""
    ids = [token for i in range(80) for token in tokenizer()(sentence(i))["input_ids"]]
    blocks = [ids[i : i + length] for i in range(0, len(ids) - length, length)]
    return Dataset.from_dict({"input_ids": blocks, "attention_mask": [[1] * length] * len(blocks)})


def clm() -> Situation:
    """run_clm.py: blocks of text, whose labels are a copy of the ids; logits are reduced before `compute_metrics`."""

    def metric(prediction: tf.EvalPrediction) -> dict[str, float]:
        return {"accuracy_of_script": float((prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).mean())}

    def model(seed: int = 0, layers: int = 2) -> tf.PreTrainedModel:
        config = dict(vocab_size=len(tokenizer()), n_embd=16, n_layer=layers, n_head=2, n_positions=64)
        return built(tf.GPT2LMHeadModel, tf.GPT2Config(**config, initializer_range=0.3, pad_token_id=0), seed)

    data = split(grouped_texts().map(lambda row: {"labels": list(row["input_ids"])}))
    data |= {
        "data_collator": tf.default_data_collator,
        "compute_metrics": metric,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        "processing_class": tokenizer(),
    }
    return Situation(model, data)


def mlm() -> Situation:
    """run_mlm.py: the collator masks tokens."""
    collator = tf.DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.3)
    return Situation(partial(bert, tf.BertForMaskedLM), split(grouped_texts()) | {"data_collator": collator})


def summarization() -> Situation:
    """run_summarization.py and run_translation.py: evaluations generate, and compare the texts."""

    def model(seed: int = 0, layers: int = 2) -> tf.PreTrainedModel:
        size = dict(d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64)
        size |= dict(encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_layers=layers, decoder_layers=layers)
        ids = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3)
        return built(
            tf.BartForConditionalGeneration,
            tf.BartConfig(vocab_size=len(tokenizer()), **size, **ids, init_std=0.3),
            seed,
        )

    def rouge(prediction: tf.EvalPrediction) -> dict[str, float]:
        ids = np.where(prediction.predictions != -100, prediction.predictions, 0)
        texts = tokenizer().batch_decode(ids, skip_special_tokens=True)
        return {"words_of_script": float(np.mean([len(text.split()) for text in texts]))}

    def tokenize(row: dict) -> dict:
        return tokenizer()(row["text"]) | {"labels": tokenizer()(row["summary"])["input_ids"]}

    rows = {"text": [sentence(i, 9) for i in range(31)], "summary": [sentence(i, 4) for i in range(31)]}
    data = Dataset.from_dict(rows).map(tokenize, remove_columns=["text", "summary"])
    trainer = split(data) | {
        "data_collator": tf.DataCollatorForSeq2Seq(tokenizer(), model=model(), label_pad_token_id=-100),
        "compute_metrics": rouge,
        "processing_class": tokenizer(),
    }
    fields = {"predict_with_generate": True, "generation_max_length": 8}
    return Situation(model, trainer, fields, base="Seq2SeqTrainer")


def image_rows() -> Dataset:
    """Rows with an image of which `set_transform` makes `pixel_values`, as `run_image_classification.py` does."""
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 255, (16, 16, 3), dtype=np.uint8).tolist() for _ in range(31)]
    return Dataset.from_dict({"image": images, "label": [i % 3 for i in range(31)]})


def _pixel_values(batch: dict) -> dict:
    values = [torch.tensor(np.array(image)).permute(2, 0, 1) / 255 for image in batch["image"]]
    return batch | {"pixel_values": values}


def _collate_images(rows: list[dict]) -> dict:
    labels = torch.tensor([row["label"] for row in rows])
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}


def image_classification() -> Situation:
    """run_image_classification.py and the guide on distilling image classifiers."""

    def model(seed: int = 0, layers: int = 2) -> tf.PreTrainedModel:
        names = dict(enumerate(("cat", "dog", "owl")))
        labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
        config = tf.ViTConfig(num_hidden_layers=layers, image_size=16, patch_size=8, **ENCODER, **DROPOUT, **labels)
        return built(tf.ViTForImageClassification, config, seed)

    data = split(image_rows())
    for part in data.values():
        part.set_transform(_pixel_values)
    data |= {"data_collator": _collate_images, "compute_metrics": accuracy}
    return Situation(model, data, {"remove_unused_columns": False})


def semantic_segmentation() -> Situation:
    """run_semantic_segmentation.py: a class for each pixel, 255 for none."""

    def model(seed: int = 0, layers: int = 1) -> tf.PreTrainedModel:
        config = tf.SegformerConfig(
            num_encoder_blocks=2,
            depths=[layers, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
            num_labels=3,
            initializer_range=0.3,
        )
        return built(tf.SegformerForSemanticSegmentation, config, seed)

    def transform(batch: dict) -> dict:
        values = _pixel_values(batch)["pixel_values"]
        labels = [(image[0] * 3.99).long().clamp(max=3) for image in values]
        return {"pixel_values": values, "labels": [torch.where(each == 3, 255, each) for each in labels]}

    data = split(image_rows())
    for part in data.values():
        part.set_transform(transform)
    return Situation(model, data | {"data_collator": tf.default_data_collator}, {"remove_unused_columns": False})


def wav2vec2(cls: type, seed: int = 0, layers: int = 2, **options: Any) -> tf.PreTrainedModel:
    """A random Wav2Vec2, which makes a frame of 20 samples."""
    config = tf.Wav2Vec2Config(
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        num_hidden_layers=layers,
        initializer_range=0.3,
        conv_dim=(8, 8),
        conv_kernel=(10, 4),
        conv_stride=(5, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        layerdrop=0.0,
        mask_time_prob=0.0,
        feat_extract_norm="layer",
        **options,
    )
    return built(cls, config, seed)


def tones(i: int) -> list[float]:
    """The i-th sound: 300 to 400 samples of a tone."""
    return np.sin(np.arange(300 + 20 * (i % 6)) * (0.05 + 0.1 * (i % 3))).astype("float32").tolist()


def audio_classification() -> Situation:
    """run_audio_classification.py: a class for each sound."""
    extractor = tf.Wav2Vec2FeatureExtractor(return_attention_mask=True)

    def transform(batch: dict) -> dict:
        sounds = [np.array(sound, dtype="float32") for sound in batch["audio"]]
        inputs = extractor(sounds, sampling_rate=16000, max_length=320, truncation=True, padding="max_length")
        return {**inputs, "labels": list(batch["label"])}

    data = split(Dataset.from_dict({"audio": [tones(i) for i in range(31)], "label": [i % 3 for i in range(31)]}))
    for part in data.values():
        part.set_transform(transform, output_all_columns=False)
    data |= {"compute_metrics": accuracy, "processing_class": extractor}
    return Situation(
        partial(wav2vec2, tf.Wav2Vec2ForSequenceClassification, num_labels=3, classifier_proj_size=16),
        data,
        {"remove_unused_columns": False},
    )


def speech_recognition_ctc() -> Situation:
    """run_speech_recognition_ctc.py: its collator pads sounds and labels apart."""
    extractor = tf.Wav2Vec2FeatureExtractor(return_attention_mask=True)

    def collate(rows: list[dict]) -> dict:
        batch = extractor.pad([{"input_values": row["input_values"]} for row in rows], return_tensors="pt")
        labels = [torch.tensor(row["labels"]) for row in rows]
        return {**batch, "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)}

    def model(seed: int = 0, layers: int = 2) -> tf.PreTrainedModel:
        options = dict(vocab_size=12, pad_token_id=0, ctc_loss_reduction="mean", ctc_zero_infinity=True)
        return wav2vec2(tf.Wav2Vec2ForCTC, seed, layers, **options)

    rows = {
        "input_values": [tones(i) for i in range(31)],
        "labels": [[1 + (i + j) % 11 for j in range(2 + i % 4)] for i in range(31)],
    }
    data = split(Dataset.from_dict(rows | {"input_length": [len(tones(i)) for i in range(31)]}))
    return Situation(model, data | {"data_collator": collate, "processing_class": extractor})


def speech_recognition_seq2seq() -> Situation:
    """run_speech_recognition_seq2seq.py: its collator removes the start token and pads the labels with -100."""
    from tiny import SPEECH_FRAMES, SPEECH_MELS, SPEECH_VOCAB, whisper

    def model(seed: int = 0, layers: int = 2) -> tf.PreTrainedModel:
        return whisper(seed, encoder_layers=layers, decoder_layers=layers)

    def collate(rows: list[dict]) -> dict:
        labels = [torch.tensor(row["labels"]) for row in rows]
        labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        if (labels[:, 0] == 3).all():
            labels = labels[:, 1:]
        return {"input_features": torch.tensor([row["input_features"] for row in rows]), "labels": labels}

    def wer(prediction: tf.EvalPrediction) -> dict[str, float]:
        return {"ids_of_script": float(np.where(prediction.predictions < 0, 0, prediction.predictions).sum())}

    draw = np.random.default_rng(0)
    sounds = draw.standard_normal((31, SPEECH_MELS, SPEECH_FRAMES)).astype("float32").tolist()
    labels = [[3, *(int(x) for x in draw.integers(4, SPEECH_VOCAB, 2 + i % 4)), 2] for i in range(31)]
    data = split(Dataset.from_dict({"input_features": sounds, "labels": labels}))
    fields = {"predict_with_generate": True, "generation_max_length": 8}
    return Situation(model, data | {"data_collator": collate, "compute_metrics": wer}, fields, base="Seq2SeqTrainer")


SCRIPTS = {
    script.__name__: script
    for script in (
        glue,
        glue_sts_b,
        multi_label,
        ner,
        qa,
        swag,
        clm,
        mlm,
        summarization,
        image_classification,
        semantic_segmentation,
        audio_classification,
        speech_recognition_ctc,
        speech_recognition_seq2seq,
    )
}


BASES = {
    "Trainer": (tf.Trainer, tf.TrainingArguments),
    "Seq2SeqTrainer": (tf.Seq2SeqTrainer, tf.Seq2SeqTrainingArguments),
}
DISTILLING = {
    "Trainer": (hf_distill.DistillTrainer, hf_distill.DistillConfig),
    "Seq2SeqTrainer": (hf_distill.DistillSeq2SeqTrainer, hf_distill.DistillSeq2SeqConfig),
}
