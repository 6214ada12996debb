"""TRL's trainers with a teacher that has another tokenizer."""

import copy

import pytest
from datasets import Dataset
from tiny import build, conversation
from trained_tokenizers import trained

from hf_distill.data import training_template
from hf_distill.errors import DistillError
from hf_distill.teachers import CrossTokenizerTeacher
from hf_distill.trl import DistillSFTConfig, DistillSFTTrainer, OnPolicyDistillConfig, OnPolicyDistillTrainer


@pytest.fixture(scope="module")
def tokenizers():
    student, teacher = (copy.deepcopy(trained(kind)) for kind in ("digits", "gemma"))
    student.chat_template, teacher.chat_template = training_template("chatml"), training_template("gemma")
    return student, teacher


@pytest.fixture
def parts(tokenizers):
    """The student, the teacher and the student's tokenizer."""
    student, teacher = (build("llama", seed=seed, vocab=len(each)) for seed, each in enumerate(tokenizers))
    for model in (student, teacher):
        model.config.max_position_embeddings = 512
    return student, CrossTokenizerTeacher(teacher, processing_class=tokenizers[1]), tokenizers[0]


def options_of(tmp_path) -> dict:
    return {"output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1} | {
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "cross_tokenizer": "alm",
        "save_strategy": "no",
    }


def logs_of(trainer) -> list[dict]:
    trainer.train()
    return [log for log in trainer.state.log_history if "soft_loss" in log]


@pytest.mark.parametrize("packing", [False, True])
def test_sft_tokenizes_the_students_text_for_the_teacher(parts, tmp_path, packing):
    student, teacher, tokenizer = parts
    rows = Dataset.from_list([{"messages": conversation(i)} for i in range(16)])
    trainer = DistillSFTTrainer(
        student,
        DistillSFTConfig(**options_of(tmp_path), packing=packing, max_length=256, padding_free=False),
        teacher=teacher,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    for log in logs_of(trainer):
        assert log["soft_loss"] > 0
        assert log["aligned_tokens"] > 0.8
    batch = next(iter(trainer.get_train_dataloader()))
    read = teacher.tokenizer.decode(batch["teacher_input_ids"][0])
    assert "What is" in read
    assert "<end_of_turn>" in read, "the end of the student's turn is that of the teacher"


def test_on_policy_rows_are_made_after_the_student_generated_them(parts, tmp_path):
    student, teacher, tokenizer = parts
    rows = Dataset.from_list(
        [dict(zip(("prompt", "completion"), ([m] for m in conversation(i)), strict=True)) for i in range(16)]
    )
    options = options_of(tmp_path) | {"max_completion_length": 8, "on_policy_fraction": 0.5, "alpha": 0.9}
    trainer = OnPolicyDistillTrainer(
        student, OnPolicyDistillConfig(**options), teacher=teacher, train_dataset=rows, processing_class=tokenizer
    )
    seen, maker = [], teacher.row_maker

    def recorded(batch):
        seen.append((batch, maker(batch)))
        return seen[-1][1]

    teacher.row_maker = recorded
    recorded.replaced_keys, recorded.student, recorded.teacher = maker.replaced_keys, maker.student, maker.teacher
    assert all(log["soft_loss"] > 0 for log in logs_of(trainer))
    for batch, made in seen:
        for ids, teacher_ids in zip(batch["input_ids"], made["teacher_input_ids"], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert teacher.tokenizer.decode(teacher_ids, skip_special_tokens=True).startswith(text[:20])
    assert seen


def test_a_prompt_of_the_teacher_is_refused_on_policy(parts, tmp_path):
    student, teacher, tokenizer = parts
    rows = Dataset.from_list([{"prompt": f"What is {i}?", "teacher_prompt": f"Note. What is {i}?"} for i in range(8)])
    trainer = OnPolicyDistillTrainer(
        student,
        OnPolicyDistillConfig(**options_of(tmp_path), max_completion_length=4),
        teacher=teacher,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    with pytest.raises(DistillError, match="The column `teacher_prompt` does not work with cross_tokenizer"):
        trainer.train()
