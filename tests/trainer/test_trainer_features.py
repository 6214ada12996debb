"""Features of `Trainer` work with a teacher, too."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import KINDS, build, collate, rows
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    HfArgumentParser,
    TrainerCallback,
    TrainingArguments,
)

from hf_distill import DistillConfig, DistillError, FrozenTeacher

AUTO = dict(
    zip(
        KINDS,
        (
            AutoModelForCausalLM,
            AutoModelForCausalLM,
            AutoModelForMaskedLM,
            AutoModelForSeq2SeqLM,
            AutoModelForSequenceClassification,
            AutoModelForTokenClassification,
        ),
        strict=True,
    )
)


def test_compute_metrics_gets_the_logits_of_all_positions(make_trainer):
    received = {}

    def accuracy(prediction):
        received["shape"] = prediction.predictions.shape
        is_target = prediction.label_ids[:, 1:] != -100
        hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": hits[is_target].mean()}

    metrics = make_trainer(compute_metrics=accuracy, per_device_eval_batch_size=3).evaluate()
    assert received["shape"] == (7, 12, 97)
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert metrics["eval_kl"] > 0


def test_preprocess_logits_for_metrics_is_called(make_trainer):
    trainer = make_trainer(
        compute_metrics=lambda p: {"width": p.predictions.shape[-1]},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    assert trainer.evaluate()["eval_width"] == 12


def test_metrics_are_the_same_with_and_without_materialized_logits(make_trainer):
    without_logits, with_logits = make_trainer().evaluate(), make_trainer(compute_metrics=lambda p: {}).evaluate()
    for name in ("eval_loss", "eval_kl", "eval_perplexity"):
        assert with_logits[name] == pytest.approx(without_logits[name], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_predict_returns_the_models_logits(make_trainer, kind):
    trainer = make_trainer(kind)
    data = trainer.eval_dataset
    prediction = trainer.predict(data)
    trainer.model.eval()
    batch = collate(data)
    with torch.no_grad():
        logits = trainer.model(**batch).logits
    got = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    np.testing.assert_allclose(got, logits.numpy(), rtol=1e-4, atol=1e-5)
    assert "test_kl" in prediction.metrics


def test_predict_works_without_labels(make_trainer):
    data = [{k: v for k, v in row.items() if k != "labels"} for row in rows("llama", 3)]
    assert make_trainer().predict(data).predictions.shape == (3, 12, 97)


def test_label_smoothing_smooths_the_hard_term(make_trainer):
    losses = {}
    for smoothing in (0.0, 0.1):
        trainer = make_trainer(label_smoothing_factor=smoothing, max_steps=1)
        trainer.train()
        losses[smoothing] = trainer.state.log_history[0]
    assert losses[0.1]["soft_loss"] == pytest.approx(losses[0.0]["soft_loss"])
    plain = make_trainer(label_smoothing_factor=0.1, max_steps=1, teacher=None)
    plain.train()
    assert losses[0.1]["hard_loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-5)


def test_callbacks_get_the_losses_of_all_terms(make_trainer):
    logs = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            watched.append(logs)

    watched = logs
    make_trainer(callbacks=[Watch()], max_steps=2).train()
    assert all({"loss", "soft_loss", "hard_loss"} <= log.keys() for log in logs[:2])


def test_the_best_model_is_loaded_at_the_end(make_trainer):
    trainer = make_trainer(
        max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_kl", greater_is_better=False, learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    kls = {log["step"]: log["eval_kl"] for log in trainer.state.log_history if "eval_kl" in log}
    assert trainer.state.best_metric == min(kls.values())
    assert trainer.evaluate()["eval_kl"] == pytest.approx(min(kls.values()), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_is_bit_identical_to_an_uninterrupted_one(make_trainer, kind):
    options = dict(max_steps=6, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2, logging_steps=3)
    model = lambda: build(kind, 0, dropout=0.1)  # noqa: E731
    straight = make_trainer(kind, model=model(), **options)
    straight.train()
    resumed = make_trainer(kind, model=model(), **options)
    resumed.train(resume_from_checkpoint=str(Path(resumed.args.output_dir) / "checkpoint-3"))
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    last = next(log for log in straight.state.log_history if log["step"] == 6)
    again = next(log for log in resumed.state.log_history if log["step"] == 6)
    assert {k: last[k] for k in ("loss", "soft_loss", "hard_loss")} == {
        k: again[k] for k in ("loss", "soft_loss", "hard_loss")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_student_loads_with_from_pretrained(make_trainer, kind, tmp_path):
    trainer = make_trainer(kind)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again, info = AUTO[kind].from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_bf16_training_computes_losses_in_float32(make_trainer):
    trainer = make_trainer(bf16=True, use_cpu=True, max_steps=2)
    trainer.train()
    reference = make_trainer(max_steps=2)
    reference.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(reference.state.log_history[0]["loss"], rel=2e-2)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_gradient_checkpointing_does_not_change_the_weights(make_trainer):
    results = []
    for on in (False, True):
        trainer = make_trainer(activation_checkpointing=on)
        trainer.train()
        results.append(trainer.model.state_dict())
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_training_a_peft_student_changes_only_the_adapter(make_trainer, tmp_path):
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    base = build("llama", 0)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    student = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    frozen = {n: p.detach().clone() for n, p in student.named_parameters() if not p.requires_grad}
    trainer = make_trainer(model=student, learning_rate=1e-2, max_steps=8)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert all(torch.equal(p, frozen[n]) for n, p in student.named_parameters() if n in frozen)
    trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    batch = collate(rows("llama", 2))
    student.eval()
    torch.testing.assert_close(again.eval()(**batch).logits, student(**batch).logits)


def test_an_adapter_on_the_output_head_is_trained(make_trainer):
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(build("llama", 0), LoraConfig(r=4, target_modules=["lm_head"]))
    trainer = make_trainer(model=student, learning_rate=1e-2)
    trainer.train()
    assert any(p.grad is None and p.abs().sum() > 0 for n, p in student.named_parameters() if "lora_B" in n)


def test_model_init_trains_as_model_does(make_trainer):
    results, start = [], build("llama", 0)
    for options in ({"model_init": lambda: copy.deepcopy(start)}, {"model": copy.deepcopy(start)}):
        trainer = make_trainer(**options)
        trainer.train()
        results.append([log.get("loss") for log in trainer.state.log_history])
    assert results[0] == results[1]


def test_the_optimizer_of_the_user_is_used(make_trainer):
    student = build("llama", 0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = make_trainer(model=student, optimizers=(optimizer, schedule))
    before = student.lm_head.weight.detach().clone()
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert not torch.equal(before, student.lm_head.weight)


def test_plain_training_arguments_get_the_defaults(tmp_path):
    from hf_distill import DistillTrainer

    args = TrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", logging_steps=1)
    trainer = DistillTrainer(
        build("llama"), args, teacher=build("llama", 1), train_dataset=rows("llama"), data_collator=collate
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(0.5 * log["soft_loss"] + 0.5 * log["hard_loss"], rel=1e-6)
    assert trainer.distiller.terms[0].options["temperature"] == 2.0


def test_arguments_parse_from_a_command_line(tmp_path):
    losses = [{"name": "forward_kl", "weight": 0.5, "temperature": 1.0}]
    (config,) = HfArgumentParser(DistillConfig).parse_args_into_dataclasses(
        [
            "--output_dir",
            str(tmp_path),
            "--temperature",
            "3",
            "--alpha",
            "0.25",
            "--divergence",
            '{"name": "js", "beta": 0.25}',
        ]
        + ["--losses", json.dumps(losses), "--chunk_tokens", "64", "--teacher_init_kwargs", '{"dtype": "bfloat16"}']
    )
    assert (config.temperature, config.alpha, config.losses) == (3.0, 0.25, losses)
    assert (config.divergence, config.chunk_tokens) == ({"name": "js", "beta": 0.25}, 64)
    assert config.teacher_init_kwargs == {"dtype": "bfloat16"}


def test_a_custom_teacher_class_is_called(make_trainer):
    from hf_distill import Teacher
    from hf_distill.core.logits import DenseLogits
    from hf_distill.core.signals import Signals

    class Uniform(Teacher):
        def forward(self, inputs, targets, feature_requests):
            return Signals(DenseLogits(torch.zeros(len(targets), 97)))

    metrics = make_trainer(teacher=Uniform()).evaluate()
    assert metrics["eval_teacher_perplexity"] == pytest.approx(97, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_loss_func": lambda *a, **k: 0}, "compute_loss_func replaces the whole loss"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"label_names": ["start_positions"]}, "label_names"),
        ({"train_dataset": []}, "train_dataset is empty"),
        ({"eval_dataset": []}, "eval_dataset is empty"),
        ({"teacher": None, "losses": [{"name": "forward_kl"}]}, "there is no teacher"),
    ],
)
def test_incompatible_arguments_raise_an_error_with_the_reason(make_trainer, options, message):
    with pytest.raises(DistillError, match=message):
        make_trainer(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.5}, r"alpha is 1.5; it must be a number in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"divergence": "kl"}, "divergence: Unknown loss 'kl'; known: adaptive_kl, bernoulli_kl, forward_kl, js"),
        ({"losses": [{"name": "forward_kl", "weight": "much"}]}, "must be a number"),
        ({"divergence": '{"name": "js", "bta": 1}'}, "no option 'bta'; did you mean 'beta'"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"losses": "[{"}, "losses is not JSON"),
        ({"losses": {"name": "forward_kl"}}, r"losses is .*; it must be a list"),
        ({"teacher_init_kwargs": "[1]"}, r"teacher_init_kwargs is .*; it must be a dict"),
    ],
)
def test_an_invalid_argument_raises_an_error_before_a_model_is_loaded(tmp_path, arguments, message):
    with pytest.raises(DistillError, match=message):
        DistillConfig(str(tmp_path), **arguments)


def test_data_parallel_without_a_launcher_raises_an_error(make_trainer, monkeypatch):
    monkeypatch.setattr(DistillConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(DistillError, match="torchrun --nproc_per_node 2"):
        make_trainer()


def test_evaluation_without_data_raises_an_error(make_trainer):
    with pytest.raises(ValueError, match="eval_dataset"):
        make_trainer(eval_dataset=None).evaluate()


def test_teacher_init_kwargs_with_a_loaded_teacher_raise_an_error(make_trainer):
    for teacher in (build("llama", 1), FrozenTeacher(build("llama", 1))):
        with pytest.raises(DistillError, match="teacher_init_kwargs"):
            make_trainer(teacher=teacher, teacher_init_kwargs={"dtype": "bfloat16"})
