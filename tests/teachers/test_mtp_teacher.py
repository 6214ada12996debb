"""The main head teaches heads that look further ahead."""

import pytest
import torch
import torch.nn.functional as F
from tiny import build, collate, rows
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_distill import DistillError
from hf_distill.teachers import MTPTeacher
from hf_distill.teachers.mtp.heads import MTPHeads, load_heads, record_last_block_kwargs


class Gradients(TrainerCallback):
    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = self.gradients or {n: p.grad.clone() for n, p in model.named_parameters()}


def naive(model, heads, batch, hard=0.3, soft=0.1, temperature=2.0):
    """The documented sums, token by token, divided by the target tokens of the batch."""
    ids, mask, labels = (batch[k] for k in ("input_ids", "attention_mask", "labels"))
    recorded = []
    hook = model.lm_head.register_forward_pre_hook(lambda _m, args: recorded.append(args[0]))
    with record_last_block_kwargs(model) as call:
        main = model(input_ids=ids, attention_mask=mask).logits
    hook.remove()
    ahead = [model.lm_head(row) for row in heads(recorded[0], ids, model.get_input_embeddings(), call)]
    target_positions = [
        (b, p) for b in range(len(ids)) for p in range(ids.shape[1] - 1) if labels[b, p + 1] != -100 and mask[b, p]
    ]
    total = sum(F.cross_entropy(main[b, p], labels[b, p + 1]) for b, p in target_positions)
    for d, logits in enumerate(ahead, 1):
        for b, p in target_positions:
            if p - d < 0 or not mask[b, p - d]:
                continue
            student_logits, report = logits[b, p - d], main[b, p].detach()
            total = total + hard * F.cross_entropy(student_logits, labels[b, p + 1])
            y, z = (torch.log_softmax(x / temperature, -1) for x in (report, student_logits))
            total = total + soft * temperature**2 * (y.exp() * (y - z)).sum()
    return total / len(target_positions)


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_and_gradients_equal_those_of_the_naive_sums(make_trainer, kind, pad):
    recorded, data = Gradients(), rows(kind, 4, pad=pad)
    options = dict(max_steps=1, max_grad_norm=0, alpha=0.0, train_sampling_strategy="sequential")
    trainer = make_trainer(kind, teacher=MTPTeacher(2), train_dataset=data, callbacks=[recorded], **options)
    model = build(kind, 0)
    heads = MTPHeads(model, 2)
    expected = naive(model, heads, collate(data))
    expected.backward()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for prefix, module in (("", model), ("distill_sidecar.parts.teacher.model.", heads)):
        for name, p in module.named_parameters():
            torch.testing.assert_close(recorded.gradients[prefix + name], p.grad, rtol=1e-3, atol=1e-6)


def test_heads_never_predict_tokens_of_the_next_packed_document(make_trainer):
    one = rows("llama", 1, length=9)[0]
    ids = torch.cat([one["input_ids"][:5], one["input_ids"][:4]])[None]
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
    labels = ids.masked_fill(positions == 0, -100)
    trainer = make_trainer(teacher=MTPTeacher(3), alpha=0.0)
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    step = trainer.distiller(trainer.model, trainer.teacher, batch)
    counts = [int((step.per_token[f"mtp_hard_{d}"] > 0).sum()) for d in (1, 2, 3)]
    assert len(step.targets) == 4 + 3
    assert counts == [3 + 2, 2 + 1, 1 + 0]


def test_a_head_beyond_the_sequence_is_skipped_and_counted(make_trainer):
    data = [{k: v[:3] for k, v in row.items()} for row in rows("llama", 8)]
    trainer = make_trainer(teacher=MTPTeacher(4), alpha=0.0, train_dataset=data, max_steps=2)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["mtp_heads_skipped"] == 3
    assert log["mtp_hard_1_loss"] > 0
    assert log["mtp_hard_4_loss"] == 0
    assert log["loss"] > 0


def test_a_resumed_run_equals_an_uninterrupted_run(make_trainer):
    options = dict(max_steps=6, save_strategy="steps", save_steps=3, learning_rate=1e-2, alpha=0.0)
    straight = make_trainer(teacher=MTPTeacher(2), folder="straight", **options)
    straight.train()
    again = make_trainer(teacher=MTPTeacher(2), folder="again", **options)
    again.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-3")
    pairs = zip(straight.model.named_parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for (_, p), q in pairs)
    logs = [[log for log in t.state.log_history if "loss" in log] for t in (straight, again)]
    assert [log["teacher_weight_drift"] for log in logs[0]] == [log["teacher_weight_drift"] for log in logs[1]]


def test_the_student_is_saved_without_heads_and_the_heads_can_be_loaded(make_trainer, tmp_path):
    trainer = make_trainer(teacher=MTPTeacher(2), alpha=0.0)
    trainer.train()
    trainer.save_model(str(tmp_path))
    trainer.teacher.save_pretrained(tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    heads = load_heads(model, tmp_path)
    for name, p in trainer.teacher.trainable_module.named_parameters():
        assert torch.equal(p, dict(heads.named_parameters())[name])


def test_evaluation_reports_each_head_with_and_without_kept_logits(make_trainer):
    trainer = make_trainer(teacher=MTPTeacher(2), alpha=0.0)
    plain = trainer.evaluate()
    trainer.compute_metrics = lambda prediction: {}
    metrics = trainer.evaluate()
    for name in ("eval_loss", "eval_perplexity", "eval_mtp_hard_1_loss", "eval_mtp_soft_2_loss"):
        assert metrics[name] == pytest.approx(plain[name], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_future_tokens": 0}, "num_future_tokens is 0"),
        ({"hard_weight": -1.0}, "hard_weight of the heads is -1.0; it must be 0 or more"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(DistillError, match=message):
        MTPTeacher(**options)


def test_soft_labels_for_the_student_itself_are_refused(make_trainer):
    with pytest.raises(DistillError, match="MTPTeacher gives the student no soft labels: set alpha to 0"):
        make_trainer(teacher=MTPTeacher(2), alpha=0.5)
    with pytest.raises(DistillError, match="use a causal language model"):
        make_trainer("bert", teacher=MTPTeacher(2), alpha=0.0)
