"""Several teachers at once: who teaches what, and which make no sense together."""

from types import SimpleNamespace

import pytest
import torch
from tiny import build, collate

from hf_distill import DistillError
from hf_distill.core.targets import Targets
from hf_distill.teachers import (
    EMATeacher,
    FrozenTeacher,
    MTPTeacher,
    MultiTeacher,
    MultiViewTeacher,
    PeerTeacher,
    SnapshotTeacher,
)

TOKENIZER = SimpleNamespace(mask_token_id=7)


def kl(teacher_logits, student_logits, temperature=2.0):
    p, q = (torch.log_softmax(x / temperature, -1) for x in (teacher_logits, student_logits))
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()


def logits(model, batch, targets):
    with torch.no_grad():
        return targets.gather(model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)


def first_log(trainer):
    trainer.train()
    return trainer.state.log_history[0]


def test_each_teacher_has_its_share_of_the_soft_term_and_losses_name_theirs(make_trainer):
    big, small = build("llama", 1, layers=3, width=48), build("llama", 2)
    losses = [
        {"name": "reverse_kl", "weight": 0.2, "teacher": "small", "temperature": 1.0},
        {"name": "hidden_mse", "weight": 0.1, "teacher": "small"},
        {"name": "hidden_mse", "weight": 0.3},
    ]
    teacher = MultiTeacher({"big": big, "small": small}, {"big": 3.0})
    options = dict(alpha=0.6, losses=losses, max_steps=1, train_sampling_strategy="sequential")
    trainer = make_trainer(teacher=teacher, **options)
    batch = collate(trainer.train_dataset[:4])
    targets = Targets.from_batch(batch, shift=True)
    student_logits = logits(build("llama", 0), batch, targets)
    soft = {name: kl(logits(m, batch, targets), student_logits).item() for name, m in (("big", big), ("small", small))}
    q, p = (torch.log_softmax(x, -1) for x in (student_logits, logits(small, batch, targets)))
    reverse = (q.exp() * (q - p)).sum(-1).mean().item()
    log = first_log(trainer)
    assert log["soft_big_loss"] == pytest.approx(soft["big"], rel=1e-4)
    assert log["soft_small_loss"] == pytest.approx(soft["small"], rel=1e-4)
    assert log["reverse_kl_small_loss"] == pytest.approx(reverse, rel=1e-4)
    total = 0.6 * (0.75 * soft["big"] + 0.25 * soft["small"]) + 0.4 * log["hard_loss"] + 0.2 * reverse
    total += 0.1 * log["hidden_mse_small_loss"] + 0.3 * log["hidden_mse_loss"]
    assert log["loss"] == pytest.approx(total, rel=1e-3)


def test_a_loss_on_features_uses_the_teacher_that_it_names(make_trainer):
    """The student's own weights as one teacher: its distance from itself is 0, from the other it is not."""
    other, loss = build("llama", 2, layers=3), {"name": "hidden_mse", "weight": 1.0}
    log = {}
    for name in ("same", "other"):
        teachers = {"other": other, "same": build("llama", 0)}
        options = dict(alpha=0.0, losses=[{**loss, "teacher": name}], max_steps=1, folder=name)
        log[name] = first_log(make_trainer(teacher=None, teachers=teachers, **options))[f"hidden_mse_{name}_loss"]
    assert log["same"] == pytest.approx(0.0, abs=1e-9)
    assert log["other"] > 0.01


def test_two_equal_teachers_give_the_loss_of_one(make_trainer):
    options = dict(losses=[{"name": "js", "weight": 0.5}], max_steps=3)
    one = make_trainer(teacher=build("llama", 1), folder="one", **options)
    one.train()
    twice = {"a": build("llama", 1), "b": build("llama", 1)}
    both = make_trainer(teacher=None, teachers=twice, folder="both", **options)
    both.train()
    for p, q in zip(one.model.parameters(), both.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert one.evaluate()["eval_kl"] == pytest.approx(both.evaluate()["eval_kl"], rel=1e-3)


def test_a_teacher_with_a_padded_vocabulary_shares_the_ids_that_both_have(make_trainer):
    teachers = {"same": build("llama", 1), "padded": build("llama", 2, vocab=104)}
    trainer = make_trainer(teacher=None, teachers=teachers, max_steps=1, train_sampling_strategy="sequential")
    batch = collate(trainer.train_dataset[:4])
    targets = Targets.from_batch(batch, shift=True)
    student_logits = logits(build("llama", 0), batch, targets)
    expected = kl(logits(teachers["padded"], batch, targets)[:, :97], student_logits)
    log = first_log(trainer)
    assert log["soft_padded_loss"] == pytest.approx(expected.item(), rel=1e-4)


def moving(kind: str):
    return {
        "ema": lambda: EMATeacher(0.5),
        "snapshot": lambda: SnapshotTeacher(interval_steps=2),
        "online": lambda: PeerTeacher(build("llama", 3), learning_rate=1e-2),
        "multi_view": lambda: MultiViewTeacher({"token_dropout": 0.3}, processing_class=TOKENIZER),
        "mtp": lambda: MTPTeacher(1),
    }[kind]()


@pytest.mark.parametrize("kind", ["ema", "snapshot", "online", "multi_view", "mtp"])
def test_each_kind_of_teacher_changes_is_logged_and_resumes_with_a_frozen_teacher(make_trainer, kind):
    def made(folder):
        teachers = {"still": FrozenTeacher(build("llama", 1)), "other": moving(kind)}
        options = dict(max_steps=6, save_strategy="steps", save_steps=3, learning_rate=1e-2)
        return make_trainer(teacher=None, teachers=teachers, folder=folder, **options)

    straight, again = made("straight"), made("again")
    straight.train()
    log = straight.state.log_history[3]
    assert log["soft_still_loss"] > 0
    if kind != "multi_view":
        assert log["teacher_weight_drift_other"] > 0
    if kind == "mtp":
        assert "soft_other_loss" not in log
        assert log["mtp_soft_1_loss"] > 0
    else:
        assert log["soft_other_loss"] > 0
    again.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-3")
    assert all(torch.equal(p, q) for p, q in zip(straight.model.parameters(), again.model.parameters(), strict=True))


def test_further_teachers_do_not_change_an_online_peer(make_trainer):
    def peer_after(**others):
        peer = PeerTeacher(build("llama", 3), learning_rate=1e-2)
        teachers = {"peer": peer, **others}
        arguments = {"teacher": peer} if not others else {"teacher": None, "teachers": teachers}
        make_trainer(folder=f"out{len(others)}", max_steps=2, **arguments).train()
        return [p.clone() for p in peer.model.parameters()]

    alone, with_frozen = peer_after(), peer_after(big=build("llama", 1))
    assert all(torch.equal(p, q) for p, q in zip(alone, with_frozen, strict=True))


def test_mtp_heads_learn_from_the_main_head_if_there_is_a_teacher(make_trainer):
    teachers = {"big": build("llama", 1), "ahead": MTPTeacher(1)}
    log = first_log(make_trainer(teacher=None, teachers=teachers, alpha=0.5, max_steps=1))
    student_loss = 0.5 * log["soft_big_loss"] + 0.5 * log["hard_loss"]
    heads = 0.3 * log["mtp_hard_1_loss"] + 0.1 * log["mtp_soft_1_loss"]
    assert log["loss"] == pytest.approx(student_loss + heads, rel=1e-3)


@pytest.mark.parametrize(
    ("teachers", "why"),
    [
        (lambda: {"a": PeerTeacher(build("llama", 1), mutual=True), "b": build("llama", 2)}, "mutual learning is symm"),
        (lambda: {"a": PeerTeacher(build("llama", 1)), "b": MTPTeacher(1)}, "both are trained"),
        (lambda: {"a": moving("multi_view"), "b": moving("multi_view")}, "sees one view of a batch"),
        (lambda: {"a": build("llama", 1)}, "`teachers` has 1 entries"),
        (lambda: {"not a name": build("llama", 1), "b": build("llama", 1)}, "has the name 'not a name'"),
        (
            lambda: {"a": MultiTeacher({"x": moving("ema"), "y": moving("snapshot")}), "b": moving("ema")},
            "is itself a MultiTeacher",
        ),
    ],
)
def test_incompatible_teachers_are_refused_with_the_reason(teachers, why):
    with pytest.raises(DistillError, match=why):
        MultiTeacher(teachers())


def test_all_wrong_weights_are_in_one_error():
    weights = {"a": -1.0, "bb": 2.0, "ahead": 1.0}
    with pytest.raises(DistillError, match="must be a finite number above 0") as error:
        MultiTeacher({"a": moving("ema"), "b": moving("snapshot"), "ahead": MTPTeacher(1)}, weights)
    assert "a weight is given for 'bb'" in str(error.value)
    assert "ahead has a weight, but gives no soft labels" in str(error.value)


def test_a_loss_that_names_no_teacher_of_the_run_is_refused(make_trainer):
    losses = [{"name": "js", "weight": 0.1, "teacher": "bug"}]
    with pytest.raises(DistillError, match=r"'bug', which is not one of the teachers with soft labels .big, own"):
        make_trainer(teacher=None, teachers={"big": build("llama", 1), "own": moving("ema")}, losses=losses)
    with pytest.raises(DistillError, match="there is one teacher, without a name"):
        make_trainer(teacher=build("llama", 1), losses=losses)
    with pytest.raises(DistillError, match="Both `teacher` and `teachers`"):
        make_trainer(teacher=build("llama", 1), teachers={"a": build("llama", 1), "b": build("llama", 1)})
