"""Arguments that change between two trainings of one trainer apply completely, or raise an error."""

import pytest
import torch
from tiny import build
from transformers import TrainerCallback

from hf_distill import DistillError
from hf_distill.teachers import EMATeacher, PeerTeacher
from hf_distill.trainer.sidecar import trained_sidecar

HIDDEN = [{"name": "hidden_mse", "weight": 0.5}]


def test_changed_weights_apply_and_projectors_stay(make_trainer):
    trainer = make_trainer(losses=HIDDEN, max_steps=2, learning_rate=1e-2)
    trainer.train()
    sidecar, trained = trained_sidecar(trainer.model), [p.clone() for p in trained_sidecar(trainer.model).parameters()]
    trainer.args.alpha, trainer.args.temperature = 0.25, 3.0
    trainer.args.losses[0]["weight"] = 0.125  # in place
    trainer._hp_search_setup(None)  # the Trainer calls this before each training
    assert trained_sidecar(trainer.model) is sidecar
    assert all(torch.equal(a, b) for a, b in zip(trained, sidecar.parameters(), strict=True))
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["loss"] == pytest.approx(
        0.25 * log["soft_loss"] + 0.75 * log["hard_loss"] + 0.125 * log["hidden_mse_loss"], rel=1e-5
    )
    assert trained_sidecar(trainer.model) is sidecar
    assert trainer.distiller.terms[0].options["temperature"] == 3.0


def test_the_average_of_an_ema_teacher_stays_when_alpha_changes(make_trainer):
    teacher = EMATeacher(0.5)
    trainer = make_trainer(teacher=teacher, max_steps=3, learning_rate=0.05, alpha=0.3)
    trainer.train()
    average = {name: value.clone() for name, value in teacher._shadow.items()}
    assert any(not torch.equal(average[name], p) for name, p in trainer.model.named_parameters())
    trainer.args.alpha, trainer.args.max_steps = 0.6, 0
    trainer._hp_search_setup(None)
    assert all(torch.equal(value, teacher._shadow[name]) for name, value in average.items())
    assert [term.weight for term in trainer.distiller.terms] == [0.6, 0.4]


def test_new_losses_get_new_projectors_that_are_trained(make_trainer):
    trainer = make_trainer(max_steps=1, learning_rate=1e-2)
    trainer.train()
    assert trained_sidecar(trainer.model) is None
    trainer.args.losses = '[{"name": "hidden_mse", "weight": 0.5}]'  # as on a command line
    trainer._hp_search_setup(None)
    before = [p.clone() for p in trained_sidecar(trainer.model).parameters()]
    trainer.train()
    assert all(not torch.equal(a, b) for a, b in zip(before, trained_sidecar(trainer.model).parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "value", "value_in_use"),
    [
        ("label_smoothing_factor", 0.2, lambda t: t.distiller.terms[1].options["label_smoothing"]),
        ("max_consecutive_nonfinite_steps", 2, lambda t: t.nonfinite_guard.max_consecutive_steps),
        ("chunk_tokens", 7, lambda t: t.distiller.chunk_tokens),
        ("divergence", "reverse_kl", lambda t: t.distiller.terms[0].loss.name),
    ],
)
def test_a_changed_argument_applies_to_the_next_training(make_trainer, name, value, value_in_use):
    trainer = make_trainer(max_steps=1)
    setattr(trainer.args, name, value)
    trainer.train()
    assert value_in_use(trainer) == value


def test_a_peer_is_clipped_by_the_changed_max_grad_norm(make_trainer):
    peer, norms = build("llama", 1), []

    class Recorded(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            norms.append(torch.stack([p.grad.norm() for p in peer.parameters()]).norm().item())

    trainer = make_trainer(teacher=PeerTeacher(peer), max_steps=1, callbacks=[Recorded()])
    trainer.args.max_grad_norm = 0.001
    trainer.train()
    assert norms == [pytest.approx(0.001, rel=1e-2)]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("teacher_init_kwargs", {"dtype": "bfloat16"}, "changed after the teacher was loaded. Create a new trainer"),
        ("teacher_fsdp", True, "changed after the teacher was loaded. Create a new trainer"),
        ("losses", [{"name": "hidden_mse", "layers": [[7, 0]]}], "hidden_mse: "),
        ("alpha", 1.5, r"alpha is 1.5; it must be a number in \[0, 1\]"),
        ("torch_compile", True, "changed after the trainer was created"),
        ("torch_compile_backend", "eager", "changed after the trainer was created"),
        ("compile_teacher", True, "changed after the trainer was created"),
    ],
)
def test_an_argument_that_cannot_change_raises_an_error_every_time(make_trainer, name, value, message):
    trainer = make_trainer(max_steps=1)
    setattr(trainer.args, name, value)
    for _ in range(2):
        with pytest.raises(DistillError, match=message):
            trainer.train()


def test_the_limit_of_nonfinite_steps_may_change_without_a_teacher(make_trainer):
    trainer = make_trainer(teacher=None, max_steps=1)
    trainer.args.max_consecutive_nonfinite_steps = 2
    trainer.train()
    assert trainer.nonfinite_guard.max_consecutive_steps == 2
