"""Prompts of the formats that have them."""

import inspect

import pytest
from datasets import Dataset
from tiny import conversation

from hf_distill import DistillError
from hf_distill.data import load_documents, prompt_rows


def test_the_last_turn_of_a_conversation_is_the_completion():
    rows = prompt_rows(Dataset.from_list([{"messages": conversation(i)} for i in range(3)]))
    for i, row in enumerate(rows):
        assert row["prompt"] + row["completion"] == conversation(i)
        assert [turn["role"] for turn in row["completion"]] == ["assistant"]


def test_prompts_stay_as_they_are():
    rows = Dataset.from_list([{"prompt": "x", "completion": "y"}, {"prompt": "z", "completion": "w"}])
    assert prompt_rows(rows) is rows


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "x"}, "data.task is text, in which nothing says where a prompt ends"),
        ({"input_ids": [1]}, "data.task is tokens"),
        (
            {"messages": conversation(0)[:1]},
            r"data.task, row 0 \(counted from 0\), column messages: a conversation must end with an answer",
        ),
        ({"messages": None}, r"data.task, row 0 \(counted from 0\), column messages: found null"),
    ],
)
def test_what_has_no_prompt_is_refused(row, problem):
    with pytest.raises(DistillError, match=problem):
        prompt_rows(Dataset.from_list([row]), "data.task")


def test_pythons_builtins_are_questions_with_answers():
    rows = load_documents("package:builtins")
    texts = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
    assert len(texts) == len(rows) > 200
    assert texts["What does `str.split` do in Python?"] == inspect.getdoc(str.split)
