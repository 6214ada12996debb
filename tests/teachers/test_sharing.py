"""A student shares nothing with its teacher that one of them would change for the other."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import build
from torch import nn

from hf_distill import DistillError
from hf_distill.teachers import AdapterBaseTeacher, FrozenTeacher, PeerTeacher

LOSSES = [{"name": "hidden_mse", "weight": 0.1}]


def embeddings(student, teacher):
    student.model.embed_tokens, student.lm_head = teacher.model.embed_tokens, teacher.lm_head


def layers(student, teacher):
    student.model.layers = nn.ModuleList([teacher.model.layers[0], teacher.model.layers[2]])


def storage(student, teacher):
    """Two parameters over one tensor: a frozen teacher would move with the student."""
    student.lm_head.weight = nn.Parameter(teacher.lm_head.weight.data)


@pytest.mark.parametrize("share", [embeddings, layers, storage])
@pytest.mark.parametrize("kind", [FrozenTeacher, PeerTeacher, lambda model: {"a": model, "b": build("llama", 3)}])
def test_trained_parameters_are_not_shared(make_trainer, share, kind):
    student, teacher = build("llama", 0), build("llama", 1, layers=3)
    share(student, teacher)
    with pytest.raises(DistillError, match=r"share \d+ parameters that are trained .*copy.deepcopy"):
        make_trainer(model=student, teacher=kind(teacher))
    assert all(p.requires_grad for p in student.parameters())


def test_a_model_as_its_own_frozen_teacher_is_refused(make_trainer):
    student = build("llama", 0)
    with pytest.raises(DistillError, match="the same object"):
        make_trainer(model=student, teacher=student)
    adapted = get_peft_model(build("llama", 0), LoraConfig(target_modules="all-linear"))
    with pytest.raises(DistillError, match="the same object"):
        make_trainer(model=adapted, teacher=adapted.get_base_model())


def test_frozen_parameters_may_be_shared_and_copies_are_no_sharing(make_trainer):
    student, teacher = build("llama", 0), build("llama", 1)
    embeddings(student, teacher)
    for module in (student.model.embed_tokens, student.lm_head):
        module.requires_grad_(False)
    layers(student, copy.deepcopy(build("llama", 1, layers=3)))
    make_trainer(model=student, teacher=teacher, max_steps=1).train()
    assert not student.lm_head.weight.requires_grad


def test_frozen_layers_with_dropout_are_not_shared(make_trainer):
    student, teacher = build("llama", 0), build("llama", 1, layers=3)
    layers(student, teacher)
    student.model.layers.requires_grad_(False)
    with pytest.raises(DistillError, match=r"share modules .*dropout"):
        make_trainer(model=student, teacher=teacher)


def adapted(**options):
    base = build("llama", 0)
    for layer in base.model.layers:
        layer.self_attn.q_proj.bias = nn.Parameter(torch.zeros(32))
    return get_peft_model(base, LoraConfig(target_modules=["q_proj"], **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "all"}, "2 parameters outside the adapters are trained"),
        ({"bias": "lora_only"}, "2 parameters outside the adapters are trained"),
        ({"init_lora_weights": "pissa"}, "subtracts the adapter from the base's weights"),
        ({"init_lora_weights": "olora"}, "subtracts the adapter from the base's weights"),
    ],
)
def test_a_base_that_changes_is_refused_as_teacher(make_trainer, options, message):
    with pytest.raises(DistillError, match=message):
        make_trainer(model=adapted(**options), teacher=AdapterBaseTeacher())


def test_norms_that_train_change_the_base_and_adapters_of_every_kind_do_not(make_trainer):
    student = adapted(bias="none", modules_to_save=["norm"], trainable_token_indices=[3, 4])
    make_trainer(model=student, teacher=AdapterBaseTeacher())
    next(p for name, p in student.named_parameters() if "input_layernorm" in name).requires_grad_(True)
    with pytest.raises(DistillError, match=r"1 parameters outside the adapters are trained .*input_layernorm"):
        make_trainer(model=student, teacher=AdapterBaseTeacher())


def test_trained_modules_of_the_sidecar_are_not_shared_with_the_student(make_trainer):
    """Projectors and a peer hang on the student when a teacher is prepared again."""
    options = dict(losses=LOSSES, projectors="linear", max_steps=1)
    for student, teacher in ((adapted(), AdapterBaseTeacher()), (build("llama", 0), PeerTeacher(build("llama", 1)))):
        trainer = make_trainer(model=student, teacher=teacher, **options)
        trainer.setup_distillation(trainer.teacher, trainer.args)
        trainer.train()
        assert trainer.state.global_step == 1
