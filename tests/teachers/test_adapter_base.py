import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import build, collate, rows
from torch.distributed.fsdp import fully_shard

from hf_distill import DistillError
from hf_distill.losses.objective import objective
from hf_distill.teachers import AdapterBaseTeacher, EMATeacher, FrozenTeacher
from hf_distill.trainer.distiller import Distiller


def adapted(kind: str = "llama", **options):
    """A tiny student with adapters that already say something."""
    model = get_peft_model(build(kind, 0, dropout=0.3), LoraConfig(target_modules="all-linear", r=4, **options))
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.2, "use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_the_base_gives_the_losses_of_its_frozen_copy(make_trainer, options):
    """With a term on features, and dropout in the student alone."""
    losses = [{"name": "hidden_cosine", "weight": 0.1}]
    args = {"losses": losses, "learning_rate": 1e-2}
    base = build("llama", 0, dropout=0.3)
    self_trainer = make_trainer(model=adapted(**options), teacher=AdapterBaseTeacher(), folder="own", **args)
    copied = make_trainer(model=adapted(**options), teacher=FrozenTeacher(base), folder="copied", **args)
    for trainer in (self_trainer, copied):
        torch.manual_seed(0)
        trainer.train()
    logs = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (self_trainer, copied)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)
    assert self_trainer.evaluate()["eval_kl"] == pytest.approx(copied.evaluate()["eval_kl"], rel=1e-5)
    for (name, a), b in zip(self_trainer.model.named_parameters(), copied.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_step_restores_mode_adapters_and_requires_grad(make_trainer):
    model = adapted()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    trainer = make_trainer(model=model, teacher=AdapterBaseTeacher())
    trainer.train()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert model.training
    assert not any(getattr(m, "_disable_adapters", False) for m in model.modules())
    trainer.evaluate()
    assert not model.base_model.training


@pytest.mark.parametrize("teacher_class", [AdapterBaseTeacher, EMATeacher])
def test_adapters_and_a_saved_head_under_fsdp2_get_the_gradients_of_an_unsharded_student(
    make_trainer, mesh, teacher_class
):
    """The teacher runs the module that FSDP2 wraps; its forward leaves the head gathered, in place of its shard."""
    gradients = []
    for is_sharded in (False, True):
        model, teacher = adapted(modules_to_save=["lm_head"]), teacher_class()
        make_trainer(model=model, teacher=teacher, use_cpu=True)
        base = model.get_base_model()
        if is_sharded:  # as accelerate does
            for layer in base.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard([base.model.norm, base.get_output_embeddings()], mesh=mesh, reshard_after_forward=False)
            fully_shard(model, mesh=mesh)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(0)
            Distiller(objective(0.5, 2.0))(model, teacher, collate(rows("llama", 4))).loss.backward()
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name].full_tensor(), gradient, msg=name)


def test_a_student_without_adapters_is_refused_with_what_to_do(make_trainer):
    with pytest.raises(DistillError, match=r"has no adapters.*get_peft_model"):
        make_trainer(teacher=AdapterBaseTeacher())
