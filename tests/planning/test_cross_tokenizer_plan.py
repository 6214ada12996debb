"""Plans of recipes whose teacher has another tokenizer."""

import pytest
from transformers import AutoTokenizer

from hf_distill.planning.planner import plan
from hf_distill.planning.token_ratio import teacher_token_ratio
from hf_distill.recipe.load import validate
from hf_distill.runner.model_loading import resolve_model

TEACHER = "smoke:qwen2/other-tokenizer-teacher"


def recipe_of(**distill):
    return validate(
        {
            "student": {"model": "smoke:llama/student"},
            "teacher": {"model": TEACHER},
            "data": {"task": {"path": "package:pydoc_data.topics"}, "eval": {"holdout": 0.1}, "max_length": 256},
            "distill": distill,
            "train": {"output_dir": "runs/x", "max_steps": 10},
        }
    )


def test_the_operations_of_the_teacher_are_those_of_its_own_tokens():
    ratio = teacher_token_ratio(recipe_of(cross_tokenizer="alm"))
    student, teacher = (AutoTokenizer.from_pretrained(resolve_model(m)) for m in ("smoke:llama/student", TEACHER))
    text = " ".join(["The value of the expression in the other list is the result."] * 20)
    expected = len(teacher(text)["input_ids"]) / len(student(text)["input_ids"])
    assert ratio == pytest.approx(expected, abs=0.15)
    assert ratio < 0.95
    planned, same = (plan(recipe_of(**distill), 1, 80) for distill in ({"cross_tokenizer": "alm"}, {}))
    # Attention also depends on the length of the row, which is `ratio` times as long.
    assert same.teacher.forward * ratio**2 < planned.teacher.forward < same.teacher.forward * ratio
    assert planned.teacher.name == TEACHER
    assert f"reads {ratio:.2f} tokens for each token of the student" in planned.advice
    assert "another tokenizer" not in same.advice
