import pytest
import torch

from hf_distill import DistillError
from hf_distill.core.targets import Targets


def test_causal_targets_are_the_next_tokens_and_never_cross_a_row():
    labels = torch.tensor([[5, 6, -100, 7], [8, 9, 10, -100]])
    targets = Targets.from_batch({"labels": labels}, shift=True)
    expected = [(b, s, int(labels[b, s + 1])) for b in range(2) for s in range(3) if labels[b, s + 1] != -100]
    assert (
        list(zip(targets.batch_rows.tolist(), (targets.positions % 4).tolist(), targets.labels.tolist(), strict=True))
        == expected
    )


def test_labels_of_models_that_do_not_shift_are_left_alone():
    labels = torch.tensor([[5, -100, 7]])
    targets = Targets.from_batch({"labels": labels}, shift=False)
    assert targets.labels.tolist() == [5, 7]
    assert targets.positions.tolist() == [0, 2]


def test_labels_that_a_collator_shifted_are_not_shifted_again():
    targets = Targets.from_batch({"labels": torch.tensor([[1, 2]]), "shift_labels": torch.tensor([[2, 9]])}, shift=True)
    assert targets.labels.tolist() == [2, 9]


def test_gather_takes_the_target_tokens_only():
    targets = Targets.from_batch({"labels": torch.tensor([[-100, 3], [4, -100]])}, shift=False)
    values = torch.arange(8.0).reshape(2, 2, 2)
    assert targets.gather(values).tolist() == [[2, 3], [4, 5]]


def test_gather_refuses_predictions_at_other_positions():
    targets = Targets.from_batch({"labels": torch.tensor([[1, 2]])}, shift=False)
    with pytest.raises(DistillError, match="same positions"):
        targets.gather(torch.zeros(1, 3, 7))


def test_logits_of_several_rows_for_one_label_are_refused():
    targets = Targets.from_batch({"labels": torch.tensor([1, 2])}, shift=False)
    with pytest.raises(DistillError, match="same positions"):
        targets.gather_logits(torch.zeros(2, 4, 7))


@pytest.mark.parametrize(
    ("batch", "message"),
    [({"input_ids": torch.zeros(1, 2)}, "no `labels`"), ({"labels": torch.zeros(2)}, "problem_type=")],
)
def test_batches_without_ids_as_labels_are_refused(batch, message):
    with pytest.raises(DistillError, match=message):
        Targets.from_batch(batch, shift=False)


def test_a_label_beyond_the_vocabulary_is_named():
    targets = Targets.from_batch({"labels": torch.tensor([[1, 12]])}, shift=False)
    with pytest.raises(DistillError, match=r"outside the student's 10 ids \(first: 12\)"):
        targets.check_ids(10)
