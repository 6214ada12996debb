"""`DistillSeq2SeqTrainer`: without a teacher it is `Seq2SeqTrainer`; with one, evaluations generate and measure."""

import copy
import math

import numpy as np
import pytest
import torch
from tiny import build, collate, rows
from torch.nn import functional as F
from transformers import GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_distill import DistillConfig, DistillError, DistillSeq2SeqConfig, DistillSeq2SeqTrainer, DistillTrainer

LENGTH = 9  # of generated rows


def id_metrics(predictions):
    """Metrics of generated ids: their number of rows and columns, and their sum; of labels, the sum of the ids."""
    ids, labels = predictions.predictions, predictions.label_ids
    return {"rows": len(ids), "columns": ids.shape[-1], "sum": int(ids.sum()), "labels": int(labels[labels > 0].sum())}


def collate_with_decoder_inputs(batch):
    """A batch as `DataCollatorForSeq2Seq` makes it with a model; label smoothing of `Trainer` needs it."""
    inputs = collate(batch)
    return inputs | {"decoder_input_ids": build("t5").prepare_decoder_input_ids_from_labels(inputs["labels"])}


@pytest.fixture
def make(tmp_path):
    def make(cls=DistillSeq2SeqTrainer, model=None, **options):
        config = Seq2SeqTrainingArguments if cls is Seq2SeqTrainer else DistillSeq2SeqConfig
        given = {k: options.pop(k) for k in list(options) if k not in DistillSeq2SeqConfig.__dataclass_fields__}
        fields = {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "predict_with_generate": True,
            "generation_max_length": LENGTH,
            "dataloader_pin_memory": False,
        } | options
        arguments = {
            "data_collator": collate,
            "train_dataset": rows("t5", 32),
            "eval_dataset": rows("t5", 7, seed=5),
            "compute_metrics": id_metrics,
        } | given
        return cls(model or build("t5"), config(str(tmp_path / cls.__name__), **fields), **arguments)

    return make


def teacher():
    return build("t5", 1, layers=3, width=48)


def without_timing(metrics):
    return {k: v for k, v in metrics.items() if not k.endswith(("runtime", "per_second", "preparation_time"))}


@pytest.mark.parametrize("options", [{}, {"teacher": True, "alpha": 0.0}, {"label_smoothing_factor": 0.1}], ids=str)
def test_without_distillation_it_is_bit_identical_to_seq2seq_trainer(make, options):
    steps = dict(max_steps=20, gradient_accumulation_steps=2, per_device_train_batch_size=2, logging_steps=5)
    steps |= dict(eval_strategy="steps", eval_steps=10, label_smoothing_factor=options.get("label_smoothing_factor", 0))
    ours = {name: value for name, value in options.items() if name != "label_smoothing_factor"}
    if "teacher" in ours:
        ours["teacher"] = teacher()
    if steps["label_smoothing_factor"]:
        steps["data_collator"] = collate_with_decoder_inputs
    results = []
    for cls, more in ((Seq2SeqTrainer, {}), (DistillSeq2SeqTrainer, ours)):
        trainer = make(cls, build("t5", dropout=0.1), **steps, **more)
        trainer.train()
        logs = [without_timing(log) for log in trainer.state.log_history]
        prediction = trainer.predict(trainer.eval_dataset, num_beams=2)
        results.append((logs, without_timing(prediction.metrics), prediction.predictions, trainer.model.state_dict()))
    plain, distilled = results
    assert distilled[:2] == plain[:2]
    assert np.array_equal(distilled[2], plain[2])
    assert all(torch.equal(distilled[3][name], value) for name, value in plain[3].items())


def test_evaluation_passes_generated_ids_to_compute_metrics_and_reports_the_metrics_of_target_tokens(make):
    student, data = build("t5"), rows("t5", 7, seed=5)
    trainer = make(model=student, teacher=teacher())
    metrics = trainer.evaluate()
    plain = make(Seq2SeqTrainer, copy.deepcopy(student)).evaluate()
    for name in ("rows", "columns", "sum", "labels"):
        assert metrics[f"eval_{name}"] == plain[f"eval_{name}"]
    measured = make(
        DistillSeq2SeqTrainer, student, teacher=teacher(), predict_with_generate=False, compute_metrics=None
    )
    expected = measured.evaluate()
    names = ("loss", "kl", "agreement", "perplexity", "teacher_perplexity", "soft", "hard")
    assert {f"eval_{name}" for name in names if f"eval_{name}" in expected} >= {"eval_kl", "eval_perplexity"}
    for name, value in without_timing(expected).items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name
    batch = collate(data)
    with torch.no_grad():
        logits = student.eval()(**batch).logits
    nll = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)


def test_predict_takes_generation_arguments_and_rows_without_labels(make):
    student, data = build("t5"), rows("t5", 7, seed=5)
    trainer = make(model=student, teacher=teacher())
    predicted = trainer.predict(data, max_length=6, num_beams=2, metric_key_prefix="test")
    batch = {k: v for k, v in collate(data).items() if k != "labels"}
    expected = student.eval().generate(**batch, max_length=6, num_beams=2)
    assert np.array_equal(predicted.predictions[:, : expected.shape[1]], expected)
    assert {"test_kl", "test_agreement", "test_perplexity", "test_rows"} <= predicted.metrics.keys()
    unlabelled = [{k: v for k, v in row.items() if k != "labels"} for row in data]
    output = trainer.predict(unlabelled, max_length=6, num_beams=2)
    assert np.array_equal(output.predictions, predicted.predictions)
    assert output.label_ids is None


def test_the_generation_config_of_the_arguments_is_used(make):
    config = GenerationConfig(max_length=5, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    trainer = make(teacher=teacher(), generation_config=config, generation_max_length=None)
    assert trainer.evaluate()["eval_columns"] == 5
    assert trainer.model.generation_config.max_length == 5


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_training_and_its_evaluation_loss_equal_those_of_distill_trainer(make, tmp_path, smoothing):
    options = dict(max_steps=3, eval_strategy="steps", eval_steps=3, label_smoothing_factor=smoothing)
    generating = make(teacher=teacher(), **options)
    generating.train()
    args = DistillConfig(
        str(tmp_path / "distill"),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        dataloader_pin_memory=False,
        **options,
    )
    data, held_out = rows("t5", 32), rows("t5", 7, seed=5)
    plain = DistillTrainer(build("t5"), args, collate, data, held_out, teacher=teacher())
    plain.train()
    for ours, other in zip(generating.state.log_history, plain.state.log_history, strict=True):
        for name, value in without_timing(other).items():
            assert ours[name] == pytest.approx(value, rel=1e-6), name


def test_inputs_that_only_the_teacher_accepts_do_not_reach_generate(make):
    class ForTeacher(type(teacher())):
        def forward(self, *args, hint=None, **kwargs):
            assert hint is not None
            return super().forward(*args, **kwargs)

    model = teacher()
    model.__class__ = ForTeacher
    data = [{**row, "hint": torch.zeros(1)} for row in rows("t5", 7, seed=5)]
    metrics = make(teacher=model, eval_dataset=data).evaluate()
    assert metrics["eval_rows"] == 7
    assert metrics["eval_kl"] > 0


@pytest.mark.parametrize("args", [None, DistillConfig("out")], ids=["None", "DistillConfig"])
def test_arguments_without_the_fields_of_generation_are_refused(args):
    with pytest.raises(DistillError, match="use DistillSeq2SeqConfig"):
        DistillSeq2SeqTrainer(build("t5"), args, teacher=teacher())


def test_the_best_checkpoint_by_a_metric_of_generated_ids_is_loaded_and_the_card_is_written(make, tmp_path):
    trainer = make(
        teacher=teacher(),
        max_steps=4,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="sum",
        greater_is_better=True,
    )
    trainer.train()
    sums = {log["step"]: log["eval_sum"] for log in trainer.state.log_history if "eval_sum" in log}
    assert trainer.state.best_global_step == max(sums, key=sums.get)
    assert trainer.evaluate()["eval_sum"] == max(sums.values())
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "DistillSeq2SeqTrainer" / "README.md").read_text()
    assert "text2text-generation" in card
    assert (tmp_path / "DistillSeq2SeqTrainer" / "generation_config.json").exists()
