"""Question answering: distributions over the positions where an answer starts and ends."""

import pytest
import torch
from tiny import VOCAB, collate, one_step, rows
from transformers import BertConfig, BertForQuestionAnswering, Trainer, set_seed

from hf_distill import DistillError
from hf_distill.cache import write_cache


def model(seed: int, layers: int = 2, width: int = 32, dropout: float = 0.0):
    set_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
    )
    return BertForQuestionAnswering(config)


def data(n: int = 32, seed: int = 1, pad: str = "right") -> list[dict]:
    """Rows of 12 positions; the answer of every fifth row is outside of it."""
    result = []
    for i, row in enumerate(rows("sequence", n, seed=seed, pad=pad)):
        tokens = row["attention_mask"].nonzero()[:, 0].tolist()
        start, end = (12, 12) if i % 5 == 4 else (tokens[i % 3], tokens[-1 - i % 2])
        row = {name: row[name] for name in ("input_ids", "attention_mask")}
        result.append(row | {"start_positions": torch.tensor(start), "end_positions": torch.tensor(end)})
    return result


@pytest.fixture
def answering(make_trainer):
    """`answering(alpha=0.3)`: a trainer of tiny models that answer questions."""

    def make(kind: str = "sequence", **options):
        arguments = {"model": model(0), "train_dataset": data(), "eval_dataset": data(7, 5)} | options
        if "cls" not in options and "teacher" not in options:
            arguments["teacher"] = model(1, layers=3)
        return make_trainer(kind, **arguments)

    return make


def reference(student, teacher, batch, alpha, temperature):
    """Loop over starts and ends that are in their row; the KL is over the tokens without padding."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    outputs = student(**inputs), teacher(**inputs)
    soft, hard, kl, agrees = [], [], [], []
    for row, mask in enumerate(batch["attention_mask"].bool()):
        for which in ("start", "end"):
            z, y = (each[f"{which}_logits"][row] for each in outputs)
            label = batch[f"{which}_positions"][row]
            if label == 12:
                continue
            hard.append(torch.nn.functional.cross_entropy(z, label))
            for t, values in ((temperature, soft), (1.0, kl)):
                q = (y[mask].detach() / t).softmax(-1)
                values.append(t**2 * (q * (q.log() - (z[mask] / t).log_softmax(-1))).sum())
            agrees.append((z[mask].argmax() == y[mask].argmax()).double())
    soft, hard, kl, agreement = (torch.stack(values).mean() for values in (soft, hard, kl, agrees))
    return {"soft_loss": soft, "hard_loss": hard, "loss": alpha * soft + (1 - alpha) * hard}, kl, agreement


@pytest.mark.parametrize(("micro", "number", "pad"), [(4, 2, "right"), (1, 8, "right"), (2, 4, "left")])
def test_loss_and_gradient_equal_the_reference_for_any_micro_batches(answering, micro, number, pad):
    options = dict(alpha=0.3, temperature=2.0, train_sampling_strategy="sequential", train_dataset=data(pad=pad))
    log, gradient = one_step(answering, "sequence", micro, number, **options)
    student, teacher = model(0), model(1, layers=3)
    losses, *_ = reference(student, teacher, collate(data(pad=pad)[:8]), 0.3, 2.0)
    losses["loss"].backward()
    for name, value in losses.items():
        assert log[name] == pytest.approx(value.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient[name], expected, rtol=1e-4, atol=1e-6)


def test_the_hard_loss_is_that_of_the_model_if_all_answers_are_in_their_rows(answering):
    batch = [row for row in data() if row["start_positions"] < 12][:4]
    expected = model(0)(**collate(batch)).loss.item()
    metrics = answering(eval_dataset=batch).evaluate()
    assert metrics["eval_hard_loss"] == pytest.approx(expected, rel=1e-6)


STEPS = dict(max_steps=20, gradient_accumulation_steps=2, per_device_train_batch_size=2, logging_steps=5)


@pytest.mark.parametrize("options", [{"teacher": None}, {"alpha": 0.0}], ids=["no teacher", "alpha 0"])
def test_without_distillation_training_is_bit_identical_to_the_trainers(answering, options):
    in_rows = [row for row in data() if row["start_positions"] < 12]  # the Trainer's loss is NaN without any of these
    results = []
    for arguments in ({"cls": Trainer}, options):
        trainer = answering(model=model(0, dropout=0.1), train_dataset=in_rows, **STEPS, **arguments)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        results.append((losses, trainer.evaluate()["eval_loss"], trainer.model.state_dict()))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(results[0][2][name], value) for name, value in results[1][2].items())


def test_the_evaluation_is_over_all_rows_and_returns_the_logits_of_the_trainer(answering):
    shapes = lambda p: {"shapes": [[*a.shape] for a in (*p.predictions, *p.label_ids)]}  # noqa: E731
    metrics = answering(alpha=0.3, per_device_eval_batch_size=4, compute_metrics=shapes).evaluate()
    losses, kl, agreement = reference(model(0), model(1, layers=3), collate(data(7, 5)), 0.3, 2.0)
    for name, value in (losses | {"kl": kl, "agreement": agreement}).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-5)
    assert metrics["eval_shapes"] == [[7, 12], [7, 12], [7], [7]]
    assert "eval_perplexity" not in metrics


def test_training_resumes_and_losses_on_features_work(answering, tmp_path):
    options = dict(max_steps=4, save_steps=2, save_strategy="steps", losses=[{"name": "hidden_mse"}])
    whole = answering(folder="whole", **options)
    whole.train()
    assert "hidden_mse_loss" in whole.state.log_history[0]
    resumed = answering(folder="resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(value, resumed.model.state_dict()[n]) for n, value in whole.model.state_dict().items())


def test_hidden_states_of_all_tokens_of_a_row_are_compared(answering):
    log = answering(alpha=0.0, losses=[{"name": "hidden_mse", "layers": "last:1"}], eval_dataset=data(4)).evaluate()
    inputs = {name: collate(data(4))[name] for name in ("input_ids", "attention_mask")}
    states = [net(**inputs, output_hidden_states=True).hidden_states[-1] for net in (model(0), model(1, layers=3))]
    expected = torch.stack(
        [(states[0][i] - states[1][i])[mask.bool()].square().mean() for i, mask in enumerate(inputs["attention_mask"])]
    )
    assert log["eval_hidden_mse_loss"] == pytest.approx(expected.mean().item(), rel=1e-4)


def without(*names: str) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in names} for row in data(4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {"divergence": "js"}, "js is for a distribution .* spans of positions: use span_kl"),
        (lambda: {"label_smoothing_factor": 0.1}, "span_cross_entropy has no label smoothing"),
        (lambda: {"train_dataset": without("end_positions")}, "no `end_positions`"),
        (lambda: {"label_names": ["labels"]}, "read from `start_positions` and `end_positions`"),
    ],
)
def test_wrong_arguments_and_labels_are_refused(answering, options, message):
    with pytest.raises(DistillError, match=message):
        answering(**options(), max_steps=1).train()


def test_caches_are_refused(tmp_path):
    with pytest.raises(DistillError, match="question answering model, and a cache stores"):
        write_cache(tmp_path / "cache", model(1), data(4), collator=collate)


def test_a_row_whose_loss_is_not_finite_is_skipped_and_reported(answering, caplog):
    trainer = answering(max_steps=1)
    trainer.model.qa_outputs.register_forward_hook(lambda module, args, output: output * torch.nan)
    trainer.train()
    assert "soft, hard: not finite" in caplog.text
    assert "first for example" in caplog.text


def test_positions_in_another_integer_dtype_are_the_same_targets(answering):
    losses = []
    for dtype in (torch.long, torch.int32):
        rows = [{n: v.to(dtype) if n.endswith("positions") else v for n, v in row.items()} for row in data(4)]
        trainer = answering(train_dataset=rows, eval_dataset=rows, max_steps=1)
        trainer.train()
        losses.append([trainer.state.log_history[0]["loss"], trainer.evaluate()["eval_loss"]])
    assert losses[0] == losses[1]
