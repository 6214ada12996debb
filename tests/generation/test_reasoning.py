"""Reasoning of completions: split from the answer, and joined again."""

import pytest

from hf_distill.generation.completion import Completion, Prompt
from hf_distill.generation.dataset import make_rows
from hf_distill.generation.prompts import SourceRow
from hf_distill.generation.reasoning import join_reasoning, split_reasoning

TAGS = ("<think>", "</think>")


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("42", False, (None, "42")),
        ("<think>\n6 * 7\n</think>\n\n42", False, ("6 * 7", "42")),
        ("6 * 7\n</think>\n\n42", True, ("6 * 7", "42")),
        ("6 * 7\n</think>\n\n42", False, ("6 * 7", "42")),  # the prompt of a server is not known
        ("<think>6 * 7 is", False, ("6 * 7 is", "")),  # cut off
        ("6 * 7 is", True, ("6 * 7 is", "")),
        ("Write <think> before and </think> after.", False, (None, "Write <think> before and </think> after.")),
    ],
)
def test_reasoning_is_split_from_the_answer(text, is_open, expected):
    assert split_reasoning(text, TAGS, is_open) == expected


def test_joined_reasoning_is_split_again():
    assert split_reasoning(join_reasoning("6 * 7", "42", TAGS), TAGS) == ("6 * 7", "42")
    assert join_reasoning(None, "42", TAGS) == "42"


@pytest.mark.parametrize(
    ("option", "content", "column"),
    [
        ("keep", "<think>\n6 * 7\n</think>\n\n42", None),
        ("remove", "42", None),
        ("column", "42", "6 * 7"),
    ],
)
def test_the_first_tag_of_the_template_is_part_of_a_kept_completion(option, content, column):
    source = SourceRow(Prompt(0, "task", 0, [{"role": "user", "content": "6 * 7?"}]), "42", {"level": 1})
    (row,) = make_rows([source], [Completion(0, 0, "6 * 7\n</think>\n\n42", "stop", 9)], option, TAGS, {0: True})
    assert row["completion"] == [{"role": "assistant", "content": content}]
    assert row.get("reasoning") == column
    assert (row["reference"], row["level"]) == ("42", 1)
