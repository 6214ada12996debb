"""Teachers with earlier weights of the student."""

import pytest
import torch
from gpu_meter import GpuMeter
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import build, rows
from transformers import TrainerCallback

from hf_distill import DistillError
from hf_distill.teachers import EMATeacher, SnapshotTeacher, ema

ALONE = dict(max_steps=5, learning_rate=0.05, alpha=0.5, lr_scheduler_type="constant")


class Weights(TrainerCallback):
    """The student's weights before the first step and after each."""

    def __init__(self, teacher):
        self.teacher, self.student, self.shadows = teacher, [], []

    def record(self, model):
        self.student.append({name: p.detach().clone().float() for name, p in model.named_parameters()})

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.record(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.record(model)
        self.shadows.append({name: value.clone() for name, value in self.teacher._ensure_shadow().items()})


def run(make_trainer, teacher, **options):
    recorded = Weights(teacher)
    trainer = make_trainer(**{"teacher": teacher, **ALONE, **options})
    trainer.add_callback(recorded)
    trainer.train()
    return trainer, recorded


@pytest.mark.parametrize(
    ("decay", "warmup", "rates"),
    [
        (0.9, 0, [0.9] * 5),
        (0.9, 4, [0.225, 0.45, 0.675, 0.9, 0.9]),
        ([[0, 0.0], [1, 0.5]], 0, [0.1, 0.2, 0.3, 0.4, 0.5]),
    ],
)
def test_the_average_is_the_closed_form_over_five_steps(make_trainer, decay, warmup, rates):
    teacher = EMATeacher(decay, warmup)
    _, recorded = run(make_trainer, teacher)
    expected = recorded.student[0]
    for step, rate in enumerate(rates):
        expected = {
            name: rate * v.double() + (1 - rate) * recorded.student[step + 1][name].double()
            for name, v in expected.items()
        }
        for name, value in recorded.shadows[step].items():
            torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6)


def test_with_decay_zero_the_teacher_equals_the_student_after_the_last_step(make_trainer):
    trainer, recorded = run(make_trainer, EMATeacher(0.0), gradient_accumulation_steps=2)
    for shadow, student in zip(recorded.shadows, recorded.student[1:], strict=True):
        assert all(torch.equal(value, student[name]) for name, value in shadow.items())
    assert all(log["kl"] == pytest.approx(0, abs=1e-6) for log in trainer.state.log_history if "kl" in log)


def test_the_teacher_gives_the_logits_of_a_model_with_its_weights(make_trainer):
    teacher = EMATeacher(0.5)
    trainer, recorded = run(make_trainer, teacher)
    copy = build("llama", 0)
    copy.load_state_dict(recorded.shadows[-1], strict=False)
    other = make_trainer(model=trainer.model, teacher=copy, folder="other", alpha=0.5)
    names = ("eval_loss", "eval_kl", "eval_teacher_perplexity", "eval_agreement")
    metrics, expected = trainer.evaluate(), other.evaluate()
    assert [metrics[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-5)
    assert metrics["eval_kl"] > 1e-4
    with teacher.swapped_weights():
        assert all(torch.equal(p, recorded.shadows[-1][name]) for name, p in trainer.model.named_parameters())
    assert all(torch.equal(p, recorded.student[-1][name]) for name, p in trainer.model.named_parameters())


def test_the_average_of_a_bfloat16_student_is_float32_and_does_not_stall(make_trainer):
    teacher = EMATeacher(0.999)
    student = build("llama", 0).to(torch.bfloat16)
    trainer, recorded = run(make_trainer, teacher, model=student, max_steps=3)
    assert {value.dtype for value in recorded.shadows[0].values()} == {torch.float32}
    moved = [
        float((a - b).abs().max())
        for a, b in zip(recorded.shadows[0].values(), recorded.shadows[2].values(), strict=True)
    ]
    assert min(moved) > 0
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.state.log_history[-2]["teacher_weight_drift"] > 0


def test_the_shadow_has_tied_weights_once_and_buffers(make_trainer):
    student = build("llama", 0)
    student.config.tie_word_embeddings = True
    student.tie_weights()
    student.register_buffer("mean", torch.zeros(3))
    teacher = EMATeacher(0.5)
    run(make_trainer, teacher, model=student)
    assert "lm_head.weight" not in teacher._shadow
    assert "mean" in teacher._shadow


def test_only_the_adapters_of_a_student_with_adapters_are_averaged(make_trainer):
    student = get_peft_model(build("llama", 0), LoraConfig(target_modules="all-linear", r=2))
    teacher = EMATeacher(0.5)
    trainer, _ = run(make_trainer, teacher, model=student)
    assert {name.split(".")[-3] for name in teacher._shadow if "lora" in name} == {"lora_A", "lora_B"}
    assert all("lora" in name for name in teacher._shadow)
    assert trainer.evaluate()["eval_kl"] > 0


@pytest.mark.parametrize("scaled", [False, True], ids=["not finite", "skipped by a gradient scaler"])
def test_a_skipped_step_does_not_change_the_average(make_trainer, monkeypatch, scaled):
    teacher = EMATeacher(0.5)
    recorded = Weights(teacher)
    trainer = make_trainer(teacher=teacher, **ALONE)
    trainer.add_callback(recorded)
    if scaled:
        skips = property(lambda self: trainer.state.global_step == 3)
        monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", skips)
    else:
        broken = trainer.model.lm_head.weight
        broken.register_hook(lambda grad: grad * float("inf") if trainer.state.global_step == 2 else grad)
    trainer.train()
    equal = [
        all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(recorded.shadows, recorded.shadows[1:], strict=False)
    ]
    assert equal == [False, True, False, False]


def test_a_snapshot_is_taken_on_time_if_the_step_is_skipped(make_trainer):
    teacher = SnapshotTeacher(interval_steps=2)
    trainer = make_trainer(teacher=teacher, **ALONE)
    broken = trainer.model.lm_head.weight
    broken.register_hook(lambda grad: grad * float("inf") if trainer.state.global_step == 3 else grad)
    recorded = Weights(teacher)
    trainer.add_callback(recorded)
    trainer.train()
    for shadow, step in zip(recorded.shadows, (0, 2, 2, 4, 4), strict=True):
        assert all(torch.equal(value, recorded.student[step][name]) for name, value in shadow.items())


def test_losses_on_hidden_states_use_the_shadow(make_trainer):
    losses = [{"name": "hidden_mse", "weight": 0.1}]
    trainer, _ = run(make_trainer, EMATeacher(0.9), losses=losses)
    logs = [log["hidden_mse_loss"] for log in trainer.state.log_history if "hidden_mse_loss" in log]
    assert logs[0] == pytest.approx(0, abs=1e-9)
    assert logs[-1] > 1e-6
    assert not any("sidecar" in name for name in trainer.teacher._shadow)


def test_a_swap_that_fails_halfway_leaves_the_student_unchanged_and_can_be_repeated(make_trainer, monkeypatch):
    teacher = EMATeacher(0.9)
    trainer, recorded = run(make_trainer, teacher)
    swap_in, swapped = ema._swap_in, []

    def fail_at_the_third(tensor, value):
        swapped.append(tensor)
        if len(swapped) == 3:  # later calls succeed
            raise RuntimeError("out of memory")
        return swap_in(tensor, value)

    def weights():
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    monkeypatch.setattr(ema, "_swap_in", fail_at_the_third)
    with pytest.raises(RuntimeError, match="out of memory"), teacher.swapped_weights():
        pytest.fail("the weights are not those of the teacher")
    torch.testing.assert_close(weights(), recorded.student[-1], rtol=0, atol=0)
    with teacher.swapped_weights():
        of_teacher = weights()
    shadow = teacher._ensure_shadow()
    torch.testing.assert_close(of_teacher, {name: shadow[name] for name in of_teacher}, rtol=0, atol=0)
    torch.testing.assert_close(weights(), recorded.student[-1], rtol=0, atol=0)


def test_a_snapshot_that_cannot_be_read_is_read_again_in_the_next_training(make_trainer, tmp_path, monkeypatch):
    """And the initial student does not teach in its place."""
    build("llama", 3).save_pretrained(tmp_path / "then")
    teacher = SnapshotTeacher(path=str(tmp_path / "then"))
    trainer = make_trainer(teacher=teacher, **ALONE | {"max_steps": 1})

    def fail(self):
        monkeypatch.undo()
        raise OSError("the disk does not answer")

    monkeypatch.setattr(SnapshotTeacher, "_read_snapshot", fail)
    with pytest.raises(OSError, match="does not answer"):
        trainer.train()
    trainer.train()
    shadow = teacher._ensure_shadow()
    assert all(torch.equal(shadow[name], p) for name, p in build("llama", 3).named_parameters())


def test_a_snapshot_is_taken_after_every_interval(make_trainer):
    _, recorded = run(make_trainer, SnapshotTeacher(interval_steps=2))
    for shadow, step in zip(recorded.shadows, (0, 2, 2, 4, 4), strict=True):
        assert all(torch.equal(value, recorded.student[step][name]) for name, value in shadow.items())


def test_the_first_snapshot_can_be_loaded_from_a_folder(make_trainer, tmp_path):
    build("llama", 3).save_pretrained(tmp_path / "then")
    teacher = SnapshotTeacher(path=str(tmp_path / "then"))
    trainer, recorded = run(make_trainer, teacher, max_steps=2)
    expected = dict(build("llama", 3).named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in recorded.shadows[-1].items() if name in expected)
    assert trainer.evaluate()["eval_kl"] > 0.01
    build("llama", 3, width=64).save_pretrained(tmp_path / "wide")
    for name, message in {"wide": "does not hold the student's weights", "nowhere": "there is no such folder"}.items():
        with pytest.raises(DistillError, match=message):
            make_trainer(teacher=SnapshotTeacher(path=str(tmp_path / name)), folder=f"{name}-run")
    build("llama", 3).save_pretrained(tmp_path / "part")
    state = load_file(tmp_path / "part" / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "model.norm.weight"}, tmp_path / "part" / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(DistillError, match=r"does not hold the student's weights: model\.norm\.weight"):
        make_trainer(teacher=SnapshotTeacher(path=str(tmp_path / "part")), folder="part-run").train()


@pytest.mark.parametrize("kind", [lambda: EMATeacher(0.9, warmup=3), lambda: SnapshotTeacher(interval_steps=3)])
def test_a_resumed_run_equals_an_uninterrupted_run(make_trainer, tmp_path, kind):
    options = dict(
        max_steps=6, save_strategy="steps", save_steps=2, learning_rate=0.05, train_dataset=rows("llama", 32)
    )
    straight, resumed = (make_trainer(teacher=kind(), **options) for _ in range(2))
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    expected = dict(straight.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in resumed.model.named_parameters())
    assert all(torch.equal(v, straight.teacher._shadow[name]) for name, v in resumed.teacher._shadow.items())
    distances = [trainer.state.log_history[-2]["teacher_weight_drift"] for trainer in (straight, resumed)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-5)
    assert distances[0] > 0.01


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: EMATeacher(1.0), r"decay is 1.0; it must lie in \[0, 1\): with 1 the teacher never changes"),
        (lambda: EMATeacher(-0.1), r"decay is -0.1; it must lie in \[0, 1\]"),
        (lambda: EMATeacher(0.9, warmup=-1), "warmup is -1"),
        (lambda: EMATeacher(0.9, warmup="3"), "warmup is '3'; it must be a whole number of at least 0"),
        (lambda: EMATeacher(0.9, warmup=2.5), "warmup is 2.5; it must be a whole number of at least 0"),
        (lambda: SnapshotTeacher(interval_steps=1.5), "interval_steps is 1.5; it must be a whole number of at least 1"),
        (lambda: SnapshotTeacher(), "neither `interval_steps`"),
        (lambda: SnapshotTeacher(interval_steps=0), "interval_steps is 0; it must be a whole number of at least 1"),
    ],
)
def test_values_out_of_range_are_refused(make, problem):
    with pytest.raises(DistillError, match=problem):
        make()


def test_a_student_without_trained_parameters_is_refused(make_trainer):
    with pytest.raises(DistillError, match="no parameter of the LlamaForCausalLM is trained"):
        make_trainer(model=build("llama", 0).requires_grad_(False), teacher=EMATeacher())


def test_a_checkpoint_of_another_kind_of_teacher_is_refused(make_trainer, tmp_path):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(DistillError, match=r"has no teacher\.safetensors"):
        make_trainer(teacher=EMATeacher()).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_a_shadow_of_other_weights_is_refused(make_trainer, tmp_path):
    options = dict(max_steps=2, save_strategy="steps", save_steps=1)
    make_trainer(teacher=EMATeacher(), **options).train()
    fewer = build("llama", 0)
    fewer.model.embed_tokens.requires_grad_(False)
    trainer = make_trainer(model=fewer, teacher=EMATeacher(), **options)
    trainer.teacher._ensure_shadow()
    with pytest.raises(DistillError, match=r"another teacher: model\.embed_tokens\.weight is either in"):
        trainer.teacher.load(str(tmp_path / "out" / "checkpoint-1"), 0)


def naive_average(shadow, student, parameters, weight):
    """Average all weights at once; an infinite element of a buffer is copied."""
    values = [student[name].to(value.dtype) for name, value in shadow.items()]
    torch._foreach_lerp_(list(shadow.values()), values, weight)
    for (name, value), new in zip(shadow.items(), values, strict=True):
        if name not in parameters:
            value.copy_(new.where(new.isinf(), value))
    return shadow


def prepared(model, decay=0.9):
    teacher = EMATeacher(decay)
    teacher.prepare(model, torch.device("cpu"))
    return teacher


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bucket_bytes", [4, 1000, 2**28])
def test_the_average_in_buckets_equals_that_of_all_weights_at_once_bit_for_bit(monkeypatch, dtype, bucket_bytes):
    monkeypatch.setattr(ema, "_BUCKET_BYTES", bucket_bytes)
    model = build("llama", 0, layers=1, width=16).to(dtype)
    model.register_buffer("mask", torch.tensor([[0.0, -torch.inf], [1.0, 2.0]], dtype=dtype).T)
    teacher = prepared(model)
    expected = {name: value.clone() for name, value in teacher._ensure_shadow().items()}
    assert "mask" in expected
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        model.mask[1, 1] = torch.inf
    tracked = {name: t.detach() for name, t in teacher._tracked_tensors().items()}
    naive_average(expected, tracked, dict(model.named_parameters()), 1 - 0.9)
    teacher.on_step_end(1, True)
    for name, value in teacher._ensure_shadow().items():
        assert torch.equal(value, expected[name]), name


def test_the_update_of_the_average_allocates_no_more_than_a_bucket(monkeypatch):
    """In bf16, float32 copies of all weights would need 4 bytes for each of them in addition."""
    monkeypatch.setattr(ema, "_BUCKET_BYTES", 2**16)
    model = build("llama", 0, layers=3, width=128, vocab=2000).to(torch.bfloat16)
    model.register_buffer("mask", torch.zeros(300, 300, dtype=torch.bfloat16))
    model.to("meta")
    teacher = prepared(model)
    with GpuMeter() as creation:
        shadow = teacher._ensure_shadow()
    shadow_bytes = sum(value.nbytes for value in shadow.values())
    assert shadow_bytes > 40 * 2**16
    largest = max(value.nbytes for value in shadow.values())
    assert creation.peak_bytes < shadow_bytes + largest / 2  # the samples of the initial weights are kept, too
    with GpuMeter() as update:
        teacher.on_step_end(1, True)
    assert 2**15 < update.peak_bytes <= 2**16
