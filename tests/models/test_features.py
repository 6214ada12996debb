"""Losses on features in a Trainer: their values, and how projectors are trained, saved and loaded."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import KINDS, build, collate, one_step, rows
from transformers import TrainerCallback

from hf_distill import DistillError, Teacher, cut_student
from hf_distill.core.logits import DenseLogits
from hf_distill.core.signals import Signals
from hf_distill.losses.objective import objective
from hf_distill.models.features import Features, FeatureTerm
from hf_distill.models.projectors import ProjectorConfig
from hf_distill.models.pruned_shape import KeptUnits
from hf_distill.models.sidecar import FILE, Sidecar, attach, sidecar_of
from hf_distill.models.width_pruning import keep_units
from hf_distill.teachers import FrozenTeacher
from hf_distill.trainer.distiller import Distiller

FEATURE_LOSSES = [
    {"name": "hidden_mse", "weight": 0.1, "layers": "stretch"},
    {"name": "hidden_cosine", "layers": "uniform"},
    {"name": "hidden_normalized_mse", "layers": [[1, 0], [1, 2]]},
    {"name": "hidden_mse", "weight": 0.1, "layers": "learned"},
    {"name": "hidden_relation", "layers": "last:1"},
    {"name": "attention_kl"},
    {"name": "value_relation"},
]
NAMES = ["hidden_mse", "hidden_cosine", "hidden_normalized_mse", "hidden_mse_2", "hidden_relation", "attention_kl"]


def eager(*models):
    for model in models:
        model.set_attn_implementation("eager")
    return models


@pytest.fixture
def make(make_trainer):
    """As make_trainer, with eager attention and every loss on features."""

    def trainer(kind="llama", **options):
        student, teacher = eager(build(kind, 0), build(kind, 1, layers=3, width=48))
        if "model_init" not in options:
            options.setdefault("model", student)
        return make_trainer(kind, **{"teacher": teacher, "losses": FEATURE_LOSSES} | options)

    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_splitting_a_batch_does_not_change_loss_and_gradients_of_features(make, kind):
    full_batch, gradient = one_step(make, kind, 8, 1)
    split, pieces = one_step(make, kind, 2, 4)
    for name in NAMES:
        assert split[f"{name}_loss"] == pytest.approx(full_batch[f"{name}_loss"], rel=1e-5)
    assert any("projectors" in name for name in gradient)
    assert any("mappings" in name for name in gradient)
    for name in gradient:
        torch.testing.assert_close(pieces[name], gradient[name], rtol=1e-3, atol=1e-5)
        assert gradient[name].abs().sum() > 0 or "bias" in name or "head" in name, name


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_padding_side_does_not_change_losses_on_features(make, kind):
    logs = [one_step(make, kind, 4, 2, train_dataset=rows(kind, 8, pad=pad))[0] for pad in ("left", "right")]
    for name in NAMES:
        assert logs[0][f"{name}_loss"] == pytest.approx(logs[1][f"{name}_loss"], rel=1e-5)


def test_a_term_is_the_mean_over_layer_pairs_of_its_loss(make):
    trainer = make(losses=[{"name": "hidden_mse", "layers": [[0, 1], [1, 2]]}])
    metrics = trainer.evaluate()
    batch = collate(trainer.eval_dataset)
    is_target = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    outputs = {}
    with torch.no_grad():
        for who, model in (("s", trainer.model), ("t", trainer.teacher.model)):
            for i, block in enumerate(model.model.layers):
                block.register_forward_hook(lambda _m, _a, out, key=(who, i): outputs.__setitem__(key, out))
            model(**inputs)
    projectors = sidecar_of(trainer.model).get("projectors", "hidden_mse")
    terms = [
        (projectors[f"{s}-{t}"](outputs["s", s])[is_target] - outputs["t", t][is_target]).square().mean()
        for s, t in ((0, 1), (1, 2))
    ]
    assert metrics["eval_hidden_mse_loss"] == pytest.approx((sum(terms) / 2).item(), rel=1e-5)
    others = 0.5 * metrics["eval_soft_loss"] + 0.5 * metrics["eval_hard_loss"]
    assert metrics["eval_loss"] == pytest.approx(others + metrics["eval_hidden_mse_loss"], rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_student_of_the_teachers_first_layers_has_feature_loss_exactly_zero(make_trainer, kind):
    teacher = eager(build(kind, 1, layers=3))[0].eval()
    student = cut_student(teacher, [0, 1])
    losses = [{"name": name, "layers": [[0, 0], [1, 1]]} for name in {n.removesuffix("_2") for n in NAMES}]
    metrics = make_trainer(kind, model=student, teacher=teacher, losses=losses).evaluate()
    for loss in losses:
        assert metrics[f"eval_{loss['name']}_loss"] == 0, loss
    assert metrics["eval_kl"] > 0


@pytest.mark.parametrize(("heads", "key_value"), [((4, 2), (2, 1)), ((2, 6), (1, 3)), ((4, 3), (4, 1))])
def test_models_of_different_heads_depths_and_widths_are_trained_padded_on_any_side(make, heads, key_value):
    def model(n, kv, layers, width):
        config = build("llama", layers=layers, width=width).config
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = n, kv, 8
        return eager(type(build("llama"))(config))[0]

    logs = []
    for pad in ("left", "right"):
        torch.manual_seed(0)
        student, teacher = model(heads[0], key_value[0], 2, 32), model(heads[1], key_value[1], 5, 48)
        logs.append(
            one_step(make, "llama", 4, 2, model=student, teacher=teacher, train_dataset=rows("llama", 8, pad=pad))
        )
    for name in NAMES:
        assert logs[0][0][f"{name}_loss"] == pytest.approx(logs[1][0][f"{name}_loss"], rel=1e-5)
        assert logs[0][0][f"{name}_loss"] > 0


def test_the_loss_in_the_outputs_is_the_full_loss(make):
    trainer = make()
    loss, outputs = trainer.compute_loss(trainer.model, collate(trainer.eval_dataset), return_outputs=True)
    assert outputs["loss"] == loss


def test_a_projector_is_built_if_widths_differ_or_if_requested(make_trainer):
    def parts(width, **options):
        trainer = make_trainer(teacher=build("llama", 1, width=width), losses=[{"name": "hidden_mse"}], **options)
        return {name: tuple(p.shape) for name, p in sidecar_of(trainer.model).named_parameters()}

    assert parts(32) == {}
    name = "parts.projectors.hidden_mse.{}.{}.weight"
    assert parts(48) == {name.format(pair, 0): (48, 32) for pair in ("0-0", "1-1")}
    assert parts(32, projectors="linear") == {name.format(pair, 0): (32, 32) for pair in ("0-0", "1-1")}
    mlp = parts(48, projectors={"kind": "mlp"})
    assert {mlp[name.format("0-0", 0)], mlp[name.format("0-0", 2)]} == {(48, 32), (48, 48)}


@pytest.mark.parametrize("width", [32, 48, 24])
def test_projectors_start_orthogonal_or_as_the_identity(make_trainer, width):
    for init in ("orthogonal", "identity"):
        trainer = make_trainer(
            teacher=build("llama", 1, width=width),
            losses=[{"name": "hidden_mse"}],
            projectors={"kind": "linear", "init": init},
        )
        (weight, _) = [p.detach() for p in sidecar_of(trainer.model).parameters()]
        expected = torch.eye(width, 32)
        if init == "identity":
            assert torch.equal(weight, expected)
        else:
            small = weight @ weight.T if width <= 32 else weight.T @ weight
            torch.testing.assert_close(small, torch.eye(min(width, 32)), atol=1e-5, rtol=0)


CHECKPOINTS = dict(save_strategy="steps", save_steps=2, max_steps=4, learning_rate=1e-2)


def gathered_state_dict(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_uninterrupted_run_bit_for_bit(make, tmp_path, kind):
    straight = make(kind, folder="straight", **CHECKPOINTS)
    straight.train()
    resumed = make(kind, folder="resumed", **CHECKPOINTS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    expected, got = gathered_state_dict(straight), gathered_state_dict(resumed)
    assert any("distill_sidecar" in name for name in expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_projectors_are_not_saved_with_the_model(make, tmp_path):
    trainer = make(**CHECKPOINTS)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    trainer.model.save_pretrained(tmp_path / "by_hand")
    clean = build("llama").state_dict().keys()
    for folder in ("saved", "by_hand", "out/checkpoint-4"):
        assert load_file(tmp_path / folder / "model.safetensors").keys() == clean
    assert not (tmp_path / "saved" / FILE).exists()
    assert (
        load_file(tmp_path / "out/checkpoint-4" / FILE).keys()
        == dict(sidecar_of(trainer.model).named_parameters()).keys()
    )


def test_load_best_model_at_end_loads_its_projectors(make, tmp_path):
    evaluations = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, greater_is_better=True)
    trainer = make(**CHECKPOINTS, **evaluations, metric_for_best_model="eval_loss")  # the worst is the first
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    saved = load_file(best / FILE)
    parameters = dict(sidecar_of(trainer.model).named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in saved.items())
    expected = next(log["eval_loss"] for log in trainer.state.log_history if log.get("eval_loss") and log["step"] == 2)
    assert best.name == "checkpoint-2"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_resuming_does_not_warn_about_missing_keys(make, tmp_path, caplog):
    make(**CHECKPOINTS).train()
    make(**CHECKPOINTS).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert "missing keys" not in caplog.text


def test_a_checkpoint_without_these_projectors_is_refused(make, tmp_path):
    make(**CHECKPOINTS, losses=None).train()
    with pytest.raises(DistillError, match=r"checkpoint-2 has no sidecar.safetensors"):
        make(**CHECKPOINTS).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    make(folder="other", **CHECKPOINTS, losses=[{"name": "hidden_mse", "layers": "last:1"}]).train()
    with pytest.raises(
        DistillError, match="resume with the `losses`, `projectors` and teacher of the run that wrote it"
    ):
        make(**CHECKPOINTS).train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-2"))


def groups_of(trainer):
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    return [{**g, "names": {names[id(p)] for p in g["params"]}} for g in trainer.optimizer.param_groups]


def test_learning_rate_and_weight_decay_of_projectors_are_used(make):
    trainer = make(projectors={"learning_rate": 0.5, "weight_decay": 0.25}, max_steps=1, weight_decay=0.1)
    trainer.train()
    groups = groups_of(trainer)
    assert [g["initial_lr"] for g in groups] == [5e-5, 5e-5, 0.5]
    assert groups[2]["weight_decay"] == 0.25
    assert groups[2]["names"] == {n for n, _ in trainer.model.named_parameters() if "distill_sidecar" in n}
    assert not any("distill_sidecar" in n for g in groups[:2] for n in g["names"])


def test_projectors_without_settings_join_the_students_param_groups(make):
    trainer = make(max_steps=1)
    trainer.train()
    groups = groups_of(trainer)
    assert len(groups) == 2
    assert any("projectors" in n for n in groups[0]["names"])


def test_gradient_clipping_includes_projectors(make):
    norms = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item())
            assert any("distill_sidecar" in n and p.grad.abs().sum() > 0 for n, p in model.named_parameters())

    trainer = make(max_steps=1, max_grad_norm=0.01, callbacks=[Watch()])
    trainer.train()
    assert norms[0] == pytest.approx(0.01, rel=1e-3)


def test_a_custom_optimizer_gets_the_projectors(make):
    student = eager(build("llama"))[0]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    trainer = make(model=student, optimizers=(optimizer, None), projectors={"learning_rate": 0.5}, max_steps=1)
    trainer.train()
    assert [g["initial_lr"] for g in optimizer.param_groups] == [0.1, 0.5]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with pytest.raises(
        DistillError, match="a scheduler that does not know the modules that are trained with the student"
    ):
        make(model=student, optimizers=(optimizer, scheduler))


def test_a_second_training_has_the_param_groups_of_the_first_and_its_checkpoints_can_be_resumed(make):
    """`auto_find_batch_size` also trains again with one optimizer. A group was added each time."""
    options = dict(projectors={"learning_rate": 0.5, "weight_decay": 0.1}, max_steps=2, save_strategy="steps")
    trainer = make(**options, save_steps=2)
    trainer.train()
    sizes = [len(group["params"]) for group in trainer.optimizer.param_groups]
    trainer.train()
    assert [len(group["params"]) for group in trainer.optimizer.param_groups] == sizes
    resumed = make(**options | {"max_steps": 3}, save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_an_optimizer_of_the_deepspeed_config_is_refused_with_settings_of_projectors(make):
    trainer = make(projectors={"learning_rate": 0.5})
    trainer.args.hf_deepspeed_config = SimpleNamespace(config={"optimizer": {"type": "AdamW"}})
    with pytest.raises(
        DistillError, match=r"but the `optimizer` section of the DeepSpeed config would ignore it. Remove that section"
    ):
        trainer.attach_sidecar(trainer.distiller.features)


def test_fsdp_that_restores_the_students_state_dict_alone_is_refused_with_projectors(make, monkeypatch):
    """accelerate moves the student to the meta device and back, and the projectors would stay there."""
    trainer, plain = make(), make(losses=[{"name": "hidden_relation"}])
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=True)
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    plain.attach_sidecar(plain.distiller.features)
    with pytest.raises(DistillError, match="cpu_ram_efficient_loading of FSDP"):
        trainer.attach_sidecar(trainer.distiller.features)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_activation_checkpointing_does_not_change_loss_and_gradients(make, kind):
    plain, gradient = one_step(make, kind, 4, 1)
    again, same = one_step(make, kind, 4, 1, activation_checkpointing=True)
    assert again["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    for name in gradient:
        torch.testing.assert_close(same[name], gradient[name], rtol=1e-4, atol=1e-6)


def test_reentrant_checkpointing_is_refused_for_losses_on_attention(make):
    trainer = make(
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
        losses=[{"name": "value_relation"}],
    )
    with pytest.raises(DistillError, match='"use_reentrant": False'):
        trainer.train()


def test_an_adapter_is_trained_with_projectors_and_saved_without(make, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    def adapted():
        return get_peft_model(eager(build("llama"))[0], LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))

    straight = make(model=adapted(), folder="straight", **CHECKPOINTS)
    straight.train()
    resumed = make(model=adapted(), folder="resumed", **CHECKPOINTS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    expected, got = gathered_state_dict(straight), gathered_state_dict(resumed)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert not any("sidecar" in key for key in load_file(tmp_path / "straight/checkpoint-4/adapter_model.safetensors"))
    assert PeftModel.from_pretrained(build("llama"), tmp_path / "straight" / "checkpoint-4")
    fresh = dict(adapted().named_parameters())
    moved = [n for n, p in expected.items() if "sidecar" in n or not torch.equal(p, fresh[n])]
    assert all("lora" in n or "sidecar" in n for n in moved)


def test_model_init_gives_each_model_new_projectors(make):
    trainer = make(model_init=lambda: eager(build("llama"))[0], max_steps=1)
    first = sidecar_of(trainer.model)
    trainer.train()
    assert sidecar_of(trainer.model) is not first


def test_a_second_trainer_removes_the_projectors_of_the_first(make, make_trainer):
    student = eager(build("llama"))[0]
    make(model=student)
    assert sidecar_of(student) is not None
    make_trainer(model=student)
    assert sidecar_of(student) is None
    assert not any("sidecar" in name for name, _ in student.named_parameters())


def test_a_learned_mapping_starts_at_stretch_and_logs_its_layers(make):
    trainer = make(losses=[{"name": "hidden_mse", "layers": "learned", "weight": 10}], learning_rate=0.1, max_steps=20)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "hidden_mse_layer_0" in log]
    first, end = logs[0], logs[-1]
    shares = [0.9, 0.05, 0.05]
    assert first["hidden_mse_layer_0"] == pytest.approx(sum(i * s for i, s in enumerate(shares)), rel=1e-5)
    assert first["hidden_mse_layer_1"] == pytest.approx(2 - first["hidden_mse_layer_0"], rel=1e-5)
    assert abs(end["hidden_mse_layer_1"] - first["hidden_mse_layer_1"]) > 0.05


def test_batches_without_target_tokens_do_not_change_losses_on_features(make):
    data = rows("llama", 4, seed=5)
    silent = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in data[:2]]
    expected = make(eval_dataset=data).evaluate()
    trainer = make(per_device_eval_batch_size=2, eval_dataset=[*data, *silent], train_dataset=silent * 4, max_steps=1)
    got = trainer.evaluate()
    for name in NAMES:
        assert got[f"eval_{name}_loss"] == pytest.approx(expected[f"eval_{name}_loss"], rel=1e-5)
    trainer.train()
    assert math.isnan(trainer.state.log_history[0]["loss"])


def test_evaluation_with_materialized_logits_has_the_same_metrics(make):
    lazy, materialized = make().evaluate(), make(compute_metrics=lambda p: {}).evaluate()
    for name in ("loss", *(f"{n}_loss" for n in NAMES)):
        assert materialized[f"eval_{name}"] == pytest.approx(lazy[f"eval_{name}"], rel=1e-6)


def test_mixed_precision_compares_features_in_float32(make):
    logs = []
    for bf16 in (False, True):
        trainer = make(bf16=bf16, use_cpu=True, max_steps=1)
        trainer.train()
        logs.append(trainer.state.log_history[0])
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    for name in NAMES:
        assert logs[1][f"{name}_loss"] == pytest.approx(logs[0][f"{name}_loss"], rel=0.03)


@pytest.mark.parametrize("name", ["hidden_relation", "value_relation"])
def test_an_autocast_around_the_step_does_not_round_the_products_of_losses_on_features(name, monkeypatch):
    """As in a training loop without a Trainer; the loss of the same features without autocast is the reference."""
    student, teacher = build("llama", 0), FrozenTeacher(build("llama", 1))
    teacher.prepare(student, torch.device("cpu"))
    terms = objective(0.0, 1.0, losses=[{"name": name}])
    features = Features.match(terms, student, lambda _: teacher.layer_stack(), ProjectorConfig.of(None))
    attach(student, Sidecar(features.parts(seed=0)))
    calls, call = [], FeatureTerm.__call__

    def record(self, *args):
        calls.append((self, args))
        return call(self, *args)

    monkeypatch.setattr(FeatureTerm, "__call__", record)
    with torch.autocast("cpu", torch.bfloat16):
        values = Distiller(terms, features=features)(student, teacher, collate(rows("llama", 4))).per_token[name]
    ((term, args),) = calls
    torch.testing.assert_close(values, call(term, *args).detach(), rtol=1e-6, atol=0)


class LogitsOnlyTeacher(Teacher):
    def forward(self, inputs, targets, feature_requests):
        return Signals(DenseLogits(torch.zeros(len(targets), 97)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"losses": [{"name": "hidden_mse", "layers": [[0, 9]]}]},
            r"hidden_mse: .*\[\[0, 9\]\] do not exist.*teacher 0 to 2",
        ),
        ({"losses": [{"name": "hidden_mse", "layers": "last:3"}]}, "last:3 needs 3 layers"),
        ({"losses": [{"name": "hidden_mse", "layers": "firs"}]}, "it must be kept, uniform, stretch"),
        ({"losses": [{"name": "hidden_mse", "layer": "stretch"}]}, "no option 'layer'; did you mean 'layers'"),
        ({"losses": [{"name": "js", "layers": "stretch"}]}, "'js' has no option 'layers'"),
        ({"losses": [{"name": "hidden_mse", "stack": "encoder"}]}, "has one stack of layers and no encoder"),
        ({"losses": [{"name": "hidden_mse", "stack": "head"}]}, "stack 'head'; it must be encoder or decoder"),
        ({"losses": [{"name": "hidden_mse"}], "projectors": "none"}, "are 32 wide and the teacher's 48"),
        ({"losses": [{"name": "hidden_mse"}], "projectors": "lineal"}, "kind 'lineal'; it must be 'auto', 'linear'"),
        ({"losses": [{"name": "hidden_mse"}], "projectors": {"lr": 1}}, "projectors has no option 'lr'"),
        ({"losses": [{"name": "hidden_mse"}], "projectors": {"learning_rate": -1}}, "learning_rate -1; it must be"),
        ({"losses": [{"name": "hidden_mse"}], "projectors": '{"kind": }'}, "projectors is not JSON"),
        (
            {"losses": [{"name": "hidden_mse"}], "teacher": LogitsOnlyTeacher()},
            "A LogitsOnlyTeacher returns logits and no feat",
        ),
        ({"divergence": "hidden_mse"}, "divergence is 'hidden_mse', which does not read the teacher's logits"),
    ],
)
def test_bad_input_is_named_with_what_is_possible(make, options, message):
    with pytest.raises(DistillError, match=message):
        make(**options)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_attention_kl_with_sdpa_attention_names_the_model(make, who):
    fast = build("llama", layers=3)
    options = {"model": fast} if who == "student" else {"teacher": fast}
    with pytest.raises(
        DistillError, match=f"the {who}'s sdpa attention computes none. Load the {who} with attn_impl.*eager"
    ):
        make(losses=[{"name": "attention_kl"}], **options)
    make(losses=[{"name": "value_relation"}], **options).evaluate()


def test_all_problems_are_reported_at_once(make):
    losses = [{"name": "hidden_mse", "layers": [[0, 9]]}, {"name": "hidden_cosine", "layers": [[9, 0]]}]
    with pytest.raises(DistillError, match=r"\[\[0, 9\]\].*\[\[9, 0\]\]"):
        make(losses=losses)


def test_losses_on_features_can_be_given_on_the_command_line(tmp_path):
    from transformers import HfArgumentParser

    from hf_distill import DistillConfig

    line = [
        "--output_dir",
        str(tmp_path),
        "--losses",
        json.dumps(FEATURE_LOSSES),
        "--projectors",
        '{"learning_rate": 1e-3}',
    ]
    (config,) = HfArgumentParser(DistillConfig).parse_args_into_dataclasses(line)
    assert config.losses == FEATURE_LOSSES
    assert config.projectors == {"learning_rate": 1e-3}


def test_a_pruned_student_is_compared_at_the_layers_that_were_kept(make_trainer):
    teacher = build("llama", 1, layers=4)
    student = cut_student(teacher, [0, 2, 3])
    losses = [{"name": "hidden_mse"}, {"name": "hidden_cosine", "layers": "learned"}]
    trainer = make_trainer("llama", model=student, teacher=teacher, losses=losses)
    trainer.compute_loss(trainer.model, collate(rows(2)))
    assert [term.pairs for term in trainer.distiller.features.terms] == [[(0, 0), (1, 2), (2, 3)]] * 2
    trainer = make_trainer("llama", model=build("llama", 0, layers=3), teacher=teacher, losses=losses[:1])
    trainer.compute_loss(trainer.model, collate(rows(2)))
    assert trainer.distiller.features.terms[0].pairs == [(0, 0), (1, 2), (2, 3)]  # by stretch
    with pytest.raises(DistillError, match="layers is kept, and the student was not made from this teacher"):
        make_trainer(
            "llama",
            model=build("llama", 0, layers=3),
            teacher=teacher,
            losses=[{"name": "hidden_mse", "layers": "kept"}],
        ).train()


@pytest.mark.parametrize("trainable", [True, False])
def test_the_channels_that_were_kept_are_the_projector(make_trainer, trainable):
    teacher = build("llama", 1, layers=2, width=32)
    kept = KeptUnits(channels=[1, 2, 3, 5, 8, 13, 21, 30])
    student = keep_units(teacher, kept)
    options = {"losses": [{"name": "hidden_mse"}], "projectors": {"init": "selection", "trainable": trainable}}
    trainer = make_trainer("llama", model=student, teacher=teacher, **options)
    trainer.train()
    expected = torch.zeros(32, 8)
    expected[kept.channels, range(8)] = 1
    for weight in sidecar_of(trainer.model).parameters():
        assert torch.equal(weight, expected) == (not trainable)
        assert weight.requires_grad == trainable
        torch.testing.assert_close(weight, expected, rtol=0, atol=0.05)  # where it started


@pytest.mark.parametrize(
    ("projectors", "message"),
    [
        ({"init": "selection", "kind": "linear"}, "init is selection, and the student was not made from this teacher"),
        ({"init": "selection", "kind": "mlp"}, "init selection is a matrix, and kind is mlp"),
        ({"trainable": False, "learning_rate": 0.1}, "learning_rate and weight_decay have no effect"),
    ],
)
def test_projectors_that_cannot_be_made_are_refused(make_trainer, projectors, message):
    with pytest.raises(DistillError, match=message):
        make_trainer(
            "llama", teacher=build("llama", 1, width=48), losses=[{"name": "hidden_mse"}], projectors=projectors
        ).train()
