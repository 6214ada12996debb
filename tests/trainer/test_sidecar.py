"""The sidecar of a training, without a Trainer: its parts, parameter groups, clipping, saving and loading."""

from types import SimpleNamespace

import pytest
import torch
from tiny import build
from torch import nn

from hf_distill import DistillError
from hf_distill.losses.objective import objective
from hf_distill.models.blocks import get_layer_stack
from hf_distill.models.features import Features
from hf_distill.models.projectors import ProjectorConfig
from hf_distill.trainer.sidecar import SidecarManager, load_trained_sidecar, save_trained_sidecar, trained_sidecar

ARGS = SimpleNamespace(seed=0, device="cpu")
LOSSES = [{"name": "hidden_mse", "weight": 1.0}]


@pytest.fixture
def student():
    return build("llama", 0)


@pytest.fixture
def teacher():
    """What a manager reads of a teacher that is trained with the student."""
    module = nn.Linear(2, 2)
    return SimpleNamespace(trainable_module=module, optimizer_overrides={"lr": 0.5}, clip_norm=lambda args: 0.25)


def features_of(student, **projectors):
    wide = build("llama", 1, width=48)
    config = ProjectorConfig.of({"kind": "linear", **projectors})
    return Features.match(objective(0.5, 2.0, losses=LOSSES), student, lambda term: get_layer_stack(wide), config)


def attached(student, teacher=None, **projectors):
    manager = SidecarManager()
    manager.replace(student, ARGS, features_of(student, **projectors), teacher)
    return manager


def test_without_parts_nothing_is_attached_saved_or_loaded(student, tmp_path):
    SidecarManager().replace(student, ARGS, Features(), has_users_scheduler=True)
    assert trained_sidecar(student) is None
    save_trained_sidecar(student, str(tmp_path), write=True)
    load_trained_sidecar(student, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_same_parts_are_recognized_and_their_weights_are_saved_and_loaded(student, teacher, tmp_path):
    manager = attached(student, teacher)
    assert set(trained_sidecar(student).parts) == {"projectors", "mappings", "teacher"}
    sidecar = trained_sidecar(student)
    manager.replace(student, ARGS, features_of(student), teacher, renew=False)
    assert trained_sidecar(student) is sidecar
    before = {name: value.clone() for name, value in trained_sidecar(student).named_parameters()}
    save_trained_sidecar(student, str(tmp_path), write=True)
    with torch.no_grad():
        for parameter in trained_sidecar(student).parameters():
            parameter.zero_()
    load_trained_sidecar(student, str(tmp_path))
    assert all(torch.equal(before[name], value) for name, value in trained_sidecar(student).named_parameters())
    manager.replace(student, ARGS, features_of(student), renew=False)
    assert set(trained_sidecar(student).parts) == {"projectors", "mappings"}


def test_options_make_separate_parameter_groups(student, teacher):
    manager = attached(student, teacher, learning_rate=0.125)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    manager.add_param_groups(student, optimizer, is_users_optimizer=False)
    parts = trained_sidecar(student).parts
    groups = {group["lr"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    assert groups[0.125] == {id(p) for p in parts["projectors"].parameters()}
    assert groups[0.5] == {id(p) for p in parts["teacher"].parameters()}
    assert not groups[0.1] & (groups[0.125] | groups[0.5])
    with pytest.raises(DistillError, match="scheduler that does not know the modules"):
        manager.replace(student, ARGS, features_of(student, learning_rate=0.125), has_users_scheduler=True)
    deepspeed = SimpleNamespace(**vars(ARGS), hf_deepspeed_config=SimpleNamespace(config={"optimizer": {}}))
    with pytest.raises(DistillError, match=r"is set for the projectors.*DeepSpeed config would ignore it"):
        manager.replace(student, deepspeed, features_of(student, learning_rate=0.125))


def test_the_teacher_is_clipped_separately(student, teacher):
    manager = attached(student, teacher)
    assert manager.clip_norm(ARGS) == 0.25
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = manager.clip_grad_norm(student, max_norm=1.0, teacher_max_norm=0.25)
    of_teacher = [p.grad for p in teacher.trainable_module.parameters()]
    ids = {id(p) for p in teacher.trainable_module.parameters()}
    of_student = [p.grad for p in student.parameters() if id(p) not in ids]
    assert torch.nn.utils.get_total_norm(of_teacher).item() == pytest.approx(0.25, rel=1e-5)
    assert torch.nn.utils.get_total_norm(of_student).item() == pytest.approx(1.0, rel=1e-5)
    assert norm.item() == pytest.approx(sum(grad.numel() for grad in of_student) ** 0.5, rel=1e-5)
    of_teacher[0].fill_(torch.inf)
    assert not manager.clip_grad_norm(student, 1.0, 0.25).isfinite()
