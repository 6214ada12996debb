"""Prompts for on-policy distillation from the formats that have prompts."""

import inspect
import json

import pytest
from datasets import Dataset
from tiny import conversation

from hf_distill import DistillError
from hf_distill.data import load_examples, prompt_rows
from hf_distill.runner.on_policy import _filter_by_prompt_length as prompts_that_fit


def test_the_last_turn_of_a_conversation_is_the_completion():
    rows = prompt_rows(Dataset.from_list([{"messages": conversation(i)} for i in range(3)]))
    for i, row in enumerate(rows):
        assert row["prompt"] + row["completion"] == conversation(i)
        assert [turn["role"] for turn in row["completion"]] == ["assistant"]


def test_rows_with_prompts_are_returned_unchanged():
    rows = Dataset.from_list([{"prompt": "x", "completion": "y"}, {"prompt": "z", "completion": "w"}])
    assert prompt_rows(rows) is rows


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "x"}, "data.task has the format text, which has no prompts"),
        ({"input_ids": [1]}, "data.task has the format tokens"),
        (
            {"messages": conversation(0)[:1]},
            r"data.task, row 0 \(counted from 0\), column messages: a conversation must have at least two messages",
        ),
        ({"messages": None}, r"data.task, row 0 \(counted from 0\), column messages: found null"),
    ],
)
def test_data_without_prompts_is_refused(row, problem):
    with pytest.raises(DistillError, match=problem):
        prompt_rows(Dataset.from_list([row]), "data.task")


@pytest.mark.parametrize("streaming", [False, True])
def test_contents_of_several_types_are_not_changed(tmp_path, smollm2_tokenizer, streaming):
    """Contents are texts and lists of parts; texts that are JSON are not parsed."""
    contents = ["5", [{"type": "text", "text": "null"}], '"quoted"', "6"]
    rows = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a in contents for b in contents]
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"messages": row, "more": ["a", 1][i % 2]}) + "\n" for i, row in enumerate(rows))
    )
    prompts = prompt_rows(load_examples(str(tmp_path / "x.jsonl"), streaming=streaming))
    assert [row["prompt"] + row["completion"] for row in prompts] == rows
    texts = [turn["content"] if isinstance(turn["content"], str) else "null" for row in rows for turn in row]
    fitting = list(prompts_that_fit(prompts, "task", smollm2_tokenizer, 100))
    assert [row[column][0]["content"] for row in fitting for column in ("prompt", "completion")] == texts


def test_packaged_builtins_are_questions_with_answers():
    rows = load_examples("package:builtins")
    texts = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
    assert len(texts) == len(rows) > 200
    assert texts["What does `str.split` do in Python?"] == inspect.getdoc(str.split)
