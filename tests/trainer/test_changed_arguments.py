"""What is changed in `trainer.args` between two trainings is taken in full, or refused."""

import pytest
import torch
from tiny import build

from hf_distill import DistillError
from hf_distill.teachers import EMATeacher, PeerTeacher

HIDDEN = [{"name": "hidden_mse", "weight": 0.5}]


def test_weights_change_and_the_teacher_and_the_projectors_stay(make_trainer):
    trainer = make_trainer(losses=HIDDEN, max_steps=2, learning_rate=1e-2)
    trainer.train()
    sidecar, trained = trainer._sidecar, [p.clone() for p in trainer._sidecar.parameters()]
    trainer.args.alpha, trainer.args.temperature = 0.25, 3.0
    trainer.args.losses[0]["weight"] = 0.125  # in place
    trainer._hp_search_setup(None)  # which begins each training
    assert trainer._sidecar is sidecar
    assert all(torch.equal(a, b) for a, b in zip(trained, sidecar.parameters(), strict=True))
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["loss"] == pytest.approx(
        0.25 * log["soft_loss"] + 0.75 * log["hard_loss"] + 0.125 * log["hidden_mse_loss"], rel=1e-5
    )
    assert trainer._sidecar is sidecar
    assert trainer.distiller.terms[0].options["temperature"] == 3.0


def test_an_average_of_the_student_stays_where_it_is(make_trainer):
    teacher = EMATeacher(0.5)
    trainer = make_trainer(teacher=teacher, max_steps=3, learning_rate=0.05, alpha=0.3)
    trainer.train()
    held = {name: value.clone() for name, value in teacher._shadow.items()}
    assert any(not torch.equal(held[name], p) for name, p in trainer.model.named_parameters())
    trainer.args.alpha, trainer.args.max_steps = 0.6, 0
    trainer._hp_search_setup(None)
    assert all(torch.equal(value, teacher._shadow[name]) for name, value in held.items())
    assert [term.weight for term in trainer.distiller.terms] == [0.6, 0.4]


def test_new_losses_get_new_projectors_that_are_trained(make_trainer):
    trainer = make_trainer(max_steps=1, learning_rate=1e-2)
    trainer.train()
    assert trainer._sidecar is None
    trainer.args.losses = '[{"name": "hidden_mse", "weight": 0.5}]'  # as on a command line
    trainer._hp_search_setup(None)
    before = [p.clone() for p in trainer._sidecar.parameters()]
    trainer.train()
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer._sidecar.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("label_smoothing_factor", 0.2, lambda t: t.distiller.terms[1].options["label_smoothing"]),
        ("max_consecutive_nonfinite_steps", 2, lambda t: t.max_consecutive_nonfinite_steps),
        ("chunk_tokens", 7, lambda t: t.distiller.chunk_tokens),
        ("divergence", "reverse_kl", lambda t: t.distiller.terms[0].loss.name),
    ],
)
def test_every_argument_is_taken(make_trainer, name, value, read):
    trainer = make_trainer(max_steps=1)
    setattr(trainer.args, name, value)
    trainer.train()
    assert read(trainer) == value


def test_the_clipping_of_a_peer_follows_the_run(make_trainer):
    trainer = make_trainer(teacher=PeerTeacher(build("llama", 1)), max_steps=1)
    trainer.args.max_grad_norm = 0.25
    trainer.train()
    assert trainer._clipped == 0.25


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("teacher_init_kwargs", {"dtype": "bfloat16"}, "changed after the teacher was loaded: make a new trainer"),
        ("teacher_fsdp", True, "changed after the teacher was loaded: make a new trainer"),
        ("losses", [{"name": "hidden_mse", "layers": [[7, 0]]}], "hidden_mse: "),
        ("alpha", 1.5, r"alpha is 1.5; it must be a number in \[0, 1\]"),
        ("torch_compile", True, "torch_compile would keep the head"),
    ],
)
def test_what_cannot_be_taken_is_refused_again_and_again(make_trainer, name, value, message):
    trainer = make_trainer(max_steps=1)
    setattr(trainer.args, name, value)
    for _ in range(2):
        with pytest.raises(DistillError, match=message):
            trainer.train()


def test_without_a_teacher_the_watch_may_change(make_trainer):
    trainer = make_trainer(teacher=None, max_steps=1)
    trainer.args.max_consecutive_nonfinite_steps = 2
    trainer.train()
    assert trainer.max_consecutive_nonfinite_steps == 2
