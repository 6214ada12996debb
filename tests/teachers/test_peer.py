"""A teacher that is trained together with the student."""

import pytest
import torch
import torch.nn.functional as F
from tiny import KINDS, build, collate, rows
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_distill import DistillError
from hf_distill.models.sidecar import Sidecar, attach
from hf_distill.recipe.smoke import byte_tokenizer
from hf_distill.teachers import EMATeacher, PeerTeacher
from hf_distill.trainer.config import DistillArguments
from hf_distill.trainer.distiller import Distiller

KIND = ("online", "mutual")


def peer(kind: str = "online", model: str = "llama", **options) -> PeerTeacher:
    return PeerTeacher(build(model, 1, layers=3, width=48), mutual=kind == "mutual", **options)


class Gradients(TrainerCallback):
    """Gradients before the first optimizer step."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = self.gradients or {
            name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
        }


def flat(logits, labels, shift):
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)


def kl(teacher_logits, student_logits, temperature):
    p, q = (torch.log_softmax(x / temperature, -1) for x in (teacher_logits, student_logits))
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def naive(kind, model, student, teacher, batch, alpha=0.5, temperature=2.0):
    """The two documented losses, with their stop-gradients, over target tokens."""
    shift = model in ("llama", "gpt2")
    ours = {k: v for k, v in batch.items() if k != "labels"}
    if model == "t5":
        ours["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    (a, labels), (b, _) = (flat(m(**ours).logits, batch["labels"], shift) for m in (student, teacher))
    is_target = labels != -100
    if shift:
        mask = batch["attention_mask"][:, :-1].reshape(-1)
        is_target &= mask != 0
    a, b, labels = a[is_target], b[is_target], labels[is_target]
    first = alpha * kl(b.detach(), a, temperature) + (1 - alpha) * F.cross_entropy(a, labels, reduction="none")
    second = F.cross_entropy(b, labels, reduction="none")
    if kind == "mutual":
        second = alpha * kl(a.detach(), b, temperature) + (1 - alpha) * second
    return first.mean() + second.mean()


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("kind", KIND)
def test_gradients_of_both_models_equal_those_of_the_naive_losses(make_trainer, kind, model):
    recorded, teacher = Gradients(), peer(kind, model)
    trainer = make_trainer(model, teacher=teacher, max_steps=1, max_grad_norm=0, callbacks=[recorded], seed=3)
    batch = collate([trainer.train_dataset[int(i)] for i in next(iter(trainer.get_train_dataloader().batch_sampler))])
    torch.manual_seed(0)
    student, other = build(model, 0), build(model, 1, layers=3, width=48)
    expected = naive(kind, model, student, other, batch)
    expected.backward()
    trainer.train_dataset = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    names = {"": student, "distill_sidecar.parts.teacher.model.": other}
    for prefix, module in names.items():
        for name, p in module.named_parameters():
            gradient = recorded.gradients[prefix + name]
            torch.testing.assert_close(gradient, p.grad, rtol=2e-4, atol=1e-6)


def test_no_loss_of_the_student_reaches_an_online_teacher(make_trainer):
    """Not even by a finite difference: another student and another alpha leave the peer's path as it is."""
    ends = []
    for seed, alpha in ((0, 0.5), (7, 0.9)):
        teacher = peer("online")
        losses = [{"name": "hidden_mse", "weight": 0.5}]
        make_trainer(model=build("llama", seed), teacher=teacher, alpha=alpha, losses=losses, folder=str(seed)).train()
        ends.append({name: p.detach().clone() for name, p in teacher.model.named_parameters()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert any(
        not torch.equal(ends[0][name], p) for name, p in build("llama", 1, layers=3, width=48).named_parameters()
    )


def test_no_loss_of_the_student_reaches_an_online_teachers_gradient():
    student, teacher = build("llama", 0), peer("online")
    teacher.prepare(student, torch.device("cpu"))
    terms = DistillArguments(alpha=1.0).terms()
    attach(student, Sidecar({"teacher": {"model": teacher.trainable_module}}))
    batch = collate(rows("llama", 4))
    step = Distiller(terms, teacher_terms=())(student, teacher, batch)  # the student's loss alone
    step.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in teacher.model.parameters())
    assert any(p.grad is not None and p.grad.any() for name, p in student.named_parameters() if "sidecar" not in name)


@pytest.mark.parametrize("kind", KIND)
def test_a_resumed_run_equals_an_uninterrupted_run(make_trainer, kind):
    options = dict(max_steps=6, save_strategy="steps", save_steps=3, learning_rate=1e-2)
    straight = make_trainer(teacher=peer(kind), folder="straight", **options)
    straight.train()
    again = make_trainer(teacher=peer(kind), folder="again", **options)
    again.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-3")
    for (name, p), q in zip(straight.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    timing = ("runtime", "per_second")
    logs = [
        [{k: v for k, v in log.items() if not k.endswith(timing)} for log in t.state.log_history]
        for t in (straight, again)
    ]
    assert logs[0][3:6] == logs[1][3:6]
    assert logs[0][5]["teacher_weight_drift"] > logs[0][1]["teacher_weight_drift"] > 0


@pytest.mark.parametrize("kind", KIND)
def test_logs_and_evaluation_report_both_models(make_trainer, kind):
    trainer = make_trainer(teacher=peer(kind), max_steps=3, learning_rate=1e-2)
    trainer.train()
    log = trainer.state.log_history[0]
    names = {"soft_loss", "hard_loss", "peer_hard_loss", "teacher_weight_drift", "kl", "agreement"}
    assert names <= log.keys()
    assert ("peer_soft_loss" in log) == (kind == "mutual")
    metrics = trainer.evaluate()
    other = make_trainer(model=trainer.model, teacher=trainer.teacher.model, folder="other").evaluate()
    for name in ("eval_perplexity", "eval_teacher_perplexity", "eval_kl", "eval_loss"):
        assert metrics[name] == pytest.approx(other[name], rel=1e-5)
    assert metrics["eval_peer_hard_loss"] == pytest.approx(
        torch.log(torch.tensor(metrics["eval_teacher_perplexity"])).item()
    )


def test_both_models_are_saved_as_from_pretrained_loads_them(make_trainer, tmp_path):
    trainer = make_trainer(teacher=peer("mutual"), save_strategy="steps", save_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    trainer.teacher.save_pretrained(tmp_path / "peer")
    batch = collate(rows("llama", 2))
    for folder, module in (("student", trainer.model), ("peer", trainer.teacher.model)):
        loaded, teacher_logits = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(teacher_logits.values())
        torch.testing.assert_close(loaded(**batch).logits, module.eval()(**batch).logits)


def test_the_peer_has_separate_learning_rate_weight_decay_and_clipping(make_trainer):
    recorded = Gradients()
    teacher = peer("mutual", learning_rate=0.5, weight_decay=0.25, max_grad_norm=0.125)
    trainer = make_trainer(teacher=teacher, max_steps=1, weight_decay=0.1, max_grad_norm=0.01, callbacks=[recorded])
    trainer.train()
    mine = {id(p) for p in teacher.model.parameters()}
    groups = [
        (group["initial_lr"], group["weight_decay"], {id(p) in mine for p in group["params"]})
        for group in trainer.optimizer.param_groups
    ]
    assert groups == [(5e-5, 0.1, {False}), (5e-5, 0.0, {False}), (0.5, 0.25, {True}), (0.5, 0.0, {True})]
    norms = {
        which: torch.stack([group.norm() for name, group in recorded.gradients.items() if ("sidecar" in name) == which])
        .norm()
        .item()
        for which in (False, True)
    }
    assert norms == pytest.approx({False: 0.01, True: 0.125}, rel=1e-3)


def test_a_peer_is_frozen_from_freeze_at_progress_on(make_trainer):
    teacher, moved = peer("mutual", freeze_at_progress=0.5), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            moved.append(next(teacher.model.parameters()).detach().clone())

    make_trainer(teacher=teacher, max_steps=6, learning_rate=0.01, callbacks=[Watch()], weight_decay=0.1).train()
    assert not torch.equal(moved[1], moved[2])
    assert torch.equal(moved[2], moved[3])
    assert torch.equal(moved[3], moved[5])


def test_hidden_terms_learn_from_the_peer_without_reaching_it(make_trainer):
    trainer = make_trainer(teacher=peer("online"), losses=[{"name": "hidden_cosine", "weight": 1.0}])
    trainer.train()
    assert trainer.state.log_history[0]["hidden_cosine_loss"] > 0
    assert set(trainer.model.distill_sidecar.parts) == {"projectors", "mappings", "teacher"}


def test_gradient_accumulation_does_not_change_the_losses(make_trainer):
    logs = []
    for folder, batch, steps in (("one", 8, 1), ("four", 2, 4)):
        trainer = make_trainer(
            teacher=peer("mutual"), folder=folder, per_device_train_batch_size=batch, gradient_accumulation_steps=steps
        )
        trainer.train()
        logs.append([log for log in trainer.state.log_history if "loss" in log])
    for one, four in zip(*logs, strict=True):
        for name in ("loss", "peer_soft_loss", "peer_hard_loss", "soft_loss", "grad_norm"):
            assert one[name] == pytest.approx(four[name], rel=1e-4), name


def test_metrics_do_not_depend_on_whether_logits_are_kept(make_trainer):
    trainer = make_trainer(teacher=peer("mutual"))
    plain = trainer.evaluate()
    trainer.compute_metrics = lambda prediction: {"shape": float(prediction.predictions.shape[-1])}
    metrics = trainer.evaluate()
    assert metrics["eval_shape"] == 97
    for name in ("eval_loss", "eval_peer_soft_loss", "eval_kl", "eval_teacher_perplexity"):
        assert metrics[name] == pytest.approx(plain[name], rel=1e-5)


def test_mutual_learning_with_alpha_one_is_warned_of(make_trainer, monkeypatch):
    student_logits = []
    monkeypatch.setattr("hf_distill.teachers.peer.logger.warning", student_logits.append)
    make_trainer(teacher=peer("mutual"), alpha=1.0)
    assert "learn only from each other" in student_logits[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate of the peer is -1.0; it must be 0 or more"),
        ({"max_grad_norm": 0.0}, "max_grad_norm of the peer is 0.0; it must be more than 0"),
        ({"freeze_at_progress": 1.5}, r"freeze_at_progress is 1.5; it must be a progress of the training, in \(0, 1\]"),
        ({"dtype": "auto"}, "a model that is already loaded"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(DistillError, match=message):
        peer("mutual", **options)


def test_a_peer_that_does_not_fit_is_refused(make_trainer, smollm2_tokenizer):
    with pytest.raises(DistillError, match="token"):
        make_trainer(
            teacher=PeerTeacher(build("llama", 1), processing_class=byte_tokenizer()),
            processing_class=smollm2_tokenizer,
        )
    with pytest.raises(DistillError, match=r"The peer, .* cannot be trained"):
        make_trainer(teacher=PeerTeacher(build("llama", 1).requires_grad_(False)))
    student = build("llama", 0)
    with pytest.raises(DistillError, match="the same object"):
        make_trainer(model=student, teacher=PeerTeacher(student))
    with pytest.raises(DistillError, match="use two models of the same type"):
        make_trainer(teacher=PeerTeacher(build("bert", 1)))
    for bound in (peer(), EMATeacher(0.9)):
        with pytest.raises(DistillError, match="model_init makes a new student for each training"):
            make_trainer(teacher=bound, model_init=lambda: build("llama", 0))
    with pytest.raises(DistillError, match="disables clipping"):
        make_trainer(teacher=peer(max_grad_norm=1.0), max_grad_norm=0.0)


def test_a_peer_is_loaded_by_its_path_in_float32(make_trainer, tmp_path):
    build("llama", 1, layers=3).to(torch.bfloat16).save_pretrained(tmp_path / "peer")
    trainer = make_trainer(teacher=PeerTeacher(str(tmp_path / "peer"), mutual=True))
    trainer.train()
    assert trainer.teacher.model.dtype == torch.float32
