"""Mixtures of sources: shares, order, and the losses of each source."""

import sys

import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny import VOCAB, build
from transformers import TrainerCallback

from hf_distill import DistillConfig, DistillError, DistillTrainer
from hf_distill.data import Collator, mix, mix_scheduled
from hf_distill.data.mix import shares

NAMES = ("task", "general")


def numbers(start: int, count: int) -> Dataset:
    """Return rows of different lengths whose first token identifies the row."""
    rows = [[3 + (start + i) % (VOCAB - 3), *range(5, 8 + i % 4)] for i in range(count)]
    return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows])


def sources(count: int = 40) -> dict[str, Dataset]:
    return {"task": numbers(0, count), "general": numbers(50, count)}


def test_shares_of_the_mix_are_within_one_percent_of_the_weights():
    rows = mix({name: numbers(0, 6000) for name in NAMES}, {"task": 0.7, "general": 0.3}, seed=0)
    drawn = torch.tensor(rows["source"][:5000]).double()
    assert abs(1 - drawn.mean() - 0.7) < 0.01


def test_rows_of_a_source_stay_in_order_and_the_seed_decides_the_order_of_sources():
    parts = sources()
    rows = mix(parts, {"task": 0.5, "general": 0.5}, seed=1)
    for index, part in enumerate(parts.values()):
        from_source = [row["input_ids"] for row in rows if row["source"] == index]
        assert len(from_source) > 5
        assert from_source == part["input_ids"][: len(from_source)]
    assert rows["source"] == mix(parts, {"task": 0.5, "general": 0.5}, seed=1)["source"]
    assert rows["source"] != mix(parts, {"task": 0.5, "general": 0.5}, seed=2)["source"]


def test_the_stopping_strategy_decides_the_length_of_the_mix():
    parts, weights = {"task": numbers(0, 8), "general": numbers(50, 40)}, {"task": 0.5, "general": 0.5}
    lengths = [len(mix(parts, weights, 0, strategy)) for strategy in ("first_exhausted", "all_exhausted")]
    assert lengths[0] < 48 < lengths[1]
    assert len(mix(parts, weights, 0, "all_exhausted_without_replacement")) == 48


def test_a_stream_is_mixed_like_a_data_set():
    parts, weights = sources(), {"task": 0.7, "general": 0.3}
    streamed = mix(parts | {"general": parts["general"].to_iterable_dataset()}, weights, seed=4)
    assert isinstance(streamed, IterableDataset)
    streamed_rows = [(row["source"], row["input_ids"]) for row in streamed.take(20)]
    for index, part in enumerate(parts.values()):
        from_source = [ids for source, ids in streamed_rows if source == index]
        assert from_source
        assert from_source == part["input_ids"][: len(from_source)]


def test_weights_are_normalized_with_a_warning(monkeypatch):
    warnings = []
    monkeypatch.setattr(sys.modules["hf_distill.data.mix"].logger, "warning", warnings.append)
    assert shares({"task": 3.0, "general": 1.0}) == [0.75, 0.25]
    assert warnings == ["The weights of the sources sum to 4 and are normalized to shares: task 0.750, general 0.250."]
    assert shares({"task": 0.7, "general": 0.3}) == pytest.approx([0.7, 0.3])
    assert len(warnings) == 1


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_weights_must_be_above_0(weight):
    with pytest.raises(DistillError, match="must be above 0"):
        mix(sources(), {"task": 1.0, "general": weight}, seed=0)


def test_a_single_source_is_returned_unchanged():
    rows = numbers(0, 5)
    assert mix({"task": rows}, {"task": 0.2}, seed=0) is rows


def test_batches_are_padded_and_hold_the_source_of_each_token():
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "source": 1},
        {"input_ids": [4], "labels": [4], "source": 0},
    ]
    batch = Collator(9, NAMES)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["source"][0].tolist() == [1, 1, 1]
    assert batch["source"][1, 0] == 0
    assert Collator(9)([{"input_ids": [1, 2], "labels": [1, 2]}]).keys() == {"input_ids", "labels"}
    batch = Collator(None, NAMES)(rows)  # a tokenizer without a padding token
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


class StopAtStep(TrainerCallback):
    """Stops training after a step."""

    def __init__(self, stop: int | None = None):
        self.stop = stop

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop:
            control.should_training_stop = True


class Recording(Collator):
    """Records source and first token of each row of every batch."""

    def __init__(self, *args):
        super().__init__(*args)
        self.first_tokens = []

    def __call__(self, rows):
        self.first_tokens.append([(row["source"], row["input_ids"][0]) for row in rows])
        return super().__call__(rows)


def make_trainer(tmp_path, rows, collator, stop=None, kind="llama", **options):
    fields = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 1} | options
    config = DistillConfig(
        str(tmp_path), remove_unused_columns=False, report_to="none", dataloader_pin_memory=False, **fields
    )
    held_out = mix(sources(7), {"task": 0.5, "general": 0.5}, seed=9, stopping_strategy="all_exhausted")
    student, teacher = build(kind, 0), build(kind, 1, layers=3)
    return DistillTrainer(
        student, config, teacher=teacher, train_dataset=rows, eval_dataset=held_out, data_collator=collator,
        callbacks=[StopAtStep(stop)],
    )  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_trains_on_the_rows_of_an_uninterrupted_run(tmp_path, streaming):
    rows = mix(sources(), {"task": 0.7, "general": 0.3}, seed=0)
    rows = rows.to_iterable_dataset() if streaming else rows
    straight, cut, resumed = Recording(0, NAMES), Recording(0, NAMES), Recording(0, NAMES)
    uninterrupted = make_trainer(tmp_path / "straight", rows, straight)
    uninterrupted.train()
    make_trainer(tmp_path / "cut", rows, cut, stop=2).train()
    again = make_trainer(tmp_path / "cut", rows, resumed)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    # the data loader collates the batches that a resumed run skips
    assert (
        resumed.first_tokens[-4:] == straight.first_tokens[-4:]
        if not streaming
        else resumed.first_tokens[2:6] == straight.first_tokens[2:6]
    )
    for resumed_weight, weight in zip(again.model.parameters(), uninterrupted.model.parameters(), strict=True):
        assert torch.equal(resumed_weight, weight)


def naive_losses(model, teacher, rows, collator, source):
    """Return soft (T = 2) and hard loss per target token of the rows of a source, computed row by row."""
    soft, hard, num_targets = 0.0, 0.0, 0
    for row in rows:
        if row["source"] == source:
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                student_logits, teacher_logits = (m(input_ids=ids).logits[0, :-1].double() for m in (model, teacher))
            hard += float(torch.nn.functional.cross_entropy(student_logits, ids[0, 1:], reduction="sum"))
            log_p, log_q = (torch.log_softmax(logits / 2, -1) for logits in (student_logits, teacher_logits))
            soft += 4 * float((log_q.exp() * (log_q - log_p)).sum())
            num_targets += ids.shape[1] - 1
    return soft / num_targets, hard / num_targets


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_losses_of_a_source_are_those_of_the_rows_of_this_source(tmp_path, kind):
    rows = mix(sources(), {"task": 0.7, "general": 0.3}, seed=0)
    trainer = make_trainer(
        tmp_path, rows, Collator(0, NAMES), kind=kind, max_steps=1, learning_rate=0.0, save_strategy="no"
    )
    trainer.train()
    metrics = trainer.evaluate()
    for index, name in enumerate(NAMES):
        soft, hard = naive_losses(
            trainer.model.eval(), trainer.teacher.model, trainer.eval_dataset, trainer.data_collator, index
        )
        assert metrics[f"eval_soft_loss_{name}"] == pytest.approx(soft, rel=1e-4)
        assert metrics[f"eval_hard_loss_{name}"] == pytest.approx(hard, rel=1e-4)
    log = trainer.state.log_history[0]
    assert {f"{term}_loss_{name}" for term in ("soft", "hard") for name in NAMES} <= log.keys()
    assert min(log["soft_loss_task"], log["soft_loss_general"]) <= log["soft_loss"]
    assert log["soft_loss"] <= max(log["soft_loss_task"], log["soft_loss_general"])


def test_a_single_source_and_training_without_teacher_log_no_losses_by_source(tmp_path):
    trainer = make_trainer(tmp_path, numbers(0, 24), Collator(0, ("task",)), max_steps=1, save_strategy="no")
    trainer.train()
    assert not [key for key in trainer.state.log_history[0] if key.endswith("_task")]
    plain = make_trainer(
        tmp_path, mix(sources(), {"task": 1, "general": 1}, 0), Collator(0, NAMES), alpha=0.0, kind="gpt2"
    )
    plain.train()
    assert "loss" in plain.state.log_history[0]
    assert "soft_loss_task" not in plain.state.log_history[0]


def test_scheduled_shares_follow_the_weights_over_progress():
    parts = {name: numbers(0, 3000) for name in NAMES}
    rows = mix_scheduled(parts, {"task": ((0.0, 1.0), (0.5, 0.0)), "general": ((0.0, 1.0),)}, seed=0, count=8000)
    source = torch.tensor(rows["source"]).double()
    for start, end in ((0, 1000), (1000, 3000), (4000, 8000)):
        middle = (start + end) / 2 / 8000
        expected = (1 - 2 * middle) / (2 - 2 * middle) if middle < 0.5 else 0.0
        assert 1 - source[start:end].mean() == pytest.approx(expected, abs=0.05)
    again = mix_scheduled(parts, {"task": ((0.0, 1.0), (0.5, 0.0)), "general": ((0.0, 1.0),)}, seed=0, count=8000)
    assert again["source"] == rows["source"]


def test_an_exhausted_source_of_a_scheduled_mixture_starts_again():
    rows = mix_scheduled(sources(10), {"task": ((0.0, 1.0),), "general": ((0.0, 1.0),)}, seed=0, count=60)
    from_source = [tuple(row["input_ids"]) for row in rows if row["source"] == 0]
    assert len(from_source) > 20
    assert from_source[:10] == from_source[10:20]
    assert len(set(from_source[:10])) == 10


def test_weights_that_are_all_0_at_the_same_progress_are_refused():
    with pytest.raises(DistillError, match=r"At progress 0\.5 all weights of sources are 0"):
        mix_scheduled(
            sources(), {"task": ((0.0, 1.0), (0.5, 0.0)), "general": ((0.5, 0.0), (0.6, 1.0))}, seed=0, count=10
        )
