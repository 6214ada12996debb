"""Conversations and completions for a teacher with another tokenizer, which renders them with its own chat template."""

import copy

import pytest
from datasets import Dataset
from trained_tokenizers import trained

from hf_distill.core.targets import IGNORE_INDEX
from hf_distill.data import Collator, OtherTokenizer, tokenize_dataset, training_template
from hf_distill.data.alignment.teacher_rows import TeacherRowMaker
from hf_distill.data.formats import TEACHER_PROMPT
from hf_distill.errors import DistillError

USER, ANSWER = {"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "It is 42. 你好 naïve"}
MORE = [USER, ANSWER, {"role": "user", "content": "And 1?"}, {"role": "assistant", "content": "Also 43 333."}]
SYSTEM = {"role": "system", "content": "Answer briefly."}


def with_template(kind: str, template: str):
    tokenizer = copy.deepcopy(trained(kind))
    tokenizer.chat_template = training_template(template)
    return tokenizer


@pytest.fixture(scope="module")
def student():
    return with_template("digits", "chatml")


@pytest.fixture(scope="module")
def teacher():
    return with_template("gemma", "gemma")


def tokenized(examples: list[dict], student, teacher, max_length: int = 512, name: str | None = None, **options):
    others = [OtherTokenizer(teacher, name)]
    return tokenize_dataset(Dataset.from_list(examples), student, max_length, other_tokenizers=others, **options)


def targets_of(tokenizer, ids: list[int], labels: list[int]) -> str:
    return tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX])


def chunks_of(rows, maker: TeacherRowMaker, tokenizers) -> list[tuple[str, str]]:
    """The texts of both sides of each chunk of a batch."""
    batch = Collator(0)(list(rows))
    made = maker(batch)
    sides = ((batch["input_ids"], made["chunk_ids"]), (made["teacher_input_ids"], made["teacher_chunk_ids"]))
    count = int(made["chunk_ids"].max())
    return [
        tuple(
            tokenizer.decode(ids[chunks == chunk]) for tokenizer, (ids, chunks) in zip(tokenizers, sides, strict=True)
        )
        for chunk in range(1, count + 1)
    ]


def test_each_model_reads_a_conversation_in_its_own_template(student, teacher):
    row = tokenized([{"messages": MORE}], student, teacher)[0]
    assert row["input_ids"] == student.apply_chat_template(MORE, tokenize=True, return_dict=True)["input_ids"]
    assert row["teacher_input_ids"] == teacher.apply_chat_template(MORE, tokenize=True, return_dict=True)["input_ids"]
    assert "It is 42. 你好 naïve" in targets_of(teacher, row["teacher_input_ids"], row["teacher_labels"])
    assert "What" not in targets_of(teacher, row["teacher_input_ids"], row["teacher_labels"])


def test_only_the_content_of_the_assistants_turns_is_compared(student, teacher):
    rows = tokenized([{"messages": MORE}, {"messages": [USER, ANSWER]}], student, teacher)
    chunks = chunks_of(rows, TeacherRowMaker(student, teacher), (student, teacher))
    ends = {"<|im_end|>": "<end_of_turn>"}
    assert all(ends.get(one, one) == other for one, other in chunks)
    batch = Collator(0)(list(rows))
    text = student.decode(batch["input_ids"][TeacherRowMaker(student, teacher)(batch)["chunk_ids"] > 0])
    turns = (MORE[1], MORE[3], ANSWER)
    assert text == "".join(f"{turn['content']}<|im_end|>\n" for turn in turns), "with the end of the turn"


def test_a_truncated_student_shortens_the_rows_that_the_teacher_reads(student, teacher):
    long = tokenized([{"messages": MORE}], student, teacher)[0]
    ids = long["input_ids"]
    cut = next(i for i in range(len(ids)) if "It is" in student.decode(ids[:i])) + 3
    rows = tokenized([{"messages": MORE}], student, teacher, max_length=cut)
    assert rows[0]["teacher_input_ids"] == long["teacher_input_ids"]
    made = TeacherRowMaker(student, teacher)(Collator(0)(list(rows)))
    read = made["teacher_input_ids"][0].tolist()
    assert read == long["teacher_input_ids"][: len(read)]
    assert len(read) < len(long["teacher_input_ids"]) - 5
    assert made["teacher_chunk_ids"][0, -1] == made["chunk_ids"].max() > 0


@pytest.mark.parametrize("conversational", [True, False])
def test_a_prompt_of_the_teacher_is_read_in_its_own_tokens(student, teacher, conversational):
    texts = ("What is 12 + 30?", "Note 7. What is 12 + 30?", "It is 42.")
    names = ("prompt", "teacher_prompt", "completion")
    example = dict(zip(names, texts, strict=True))
    if conversational:
        roles = ("user", "user", "assistant")
        example = {
            name: [{"role": role, "content": text}] for name, role, text in zip(names, roles, texts, strict=True)
        }
    rows = tokenized([example], student, teacher, second_prompt=TEACHER_PROMPT)
    assert "Note 7. What" in teacher.decode(rows[0]["teacher_input_ids"])
    assert "Note" not in student.decode(rows[0]["input_ids"])
    chunks = chunks_of(rows, TeacherRowMaker(student, teacher), (student, teacher))
    assert "".join(one for one, _ in chunks).startswith("It is 42.")


def test_rows_without_a_row_of_the_teacher_are_made_from_the_text(student, teacher):
    """A batch of a mixture: a conversation, a text, another conversation."""
    given = [*tokenized([{"messages": MORE}, {"messages": [USER, ANSWER]}], student, teacher)]
    ids = student("A text of 2024 words: naïve 你好。")["input_ids"]
    text = {"input_ids": ids, "labels": ids}
    maker, pair = TeacherRowMaker(student, teacher), (student, teacher)
    empty = text | {"teacher_input_ids": [], "teacher_labels": []}
    mixed = chunks_of([given[0], empty, given[1]], maker, pair)
    apart = [chunks_of([row], maker, pair) for row in (given[0], text, given[1])]
    assert mixed == [chunk for part in apart for chunk in part]
    assert all(apart)
    teacher_ids = maker(Collator(0)([given[0], empty]))["teacher_input_ids"][1].tolist()
    assert teacher_ids[: len(teacher("A text")["input_ids"]) - 1] == teacher("A text")["input_ids"][:-1]


def test_columns_of_a_named_teacher_end_in_its_name(student, teacher):
    rows = tokenized([{"messages": MORE}], student, teacher, name="gemma")
    assert {"teacher_input_ids_gemma", "teacher_labels_gemma"} < {*rows.column_names}
    made = TeacherRowMaker(student, teacher, name="gemma")(Collator(0)(list(rows)))
    assert made["chunk_ids_gemma"].max() == made["teacher_chunk_ids_gemma"].max() > 0


def test_a_conversation_that_the_teachers_template_refuses_is_named(student, teacher):
    examples = [{"messages": MORE}, {"messages": [SYSTEM, *MORE]}]
    with pytest.raises(DistillError, match=r"row 1 \(counted from 0\), for the teacher, which reads.*cannot render"):
        tokenized(examples, student, teacher)
    with pytest.raises(DistillError, match=r"for the teacher big, .*leave it out, or give the teacher a tokenizer"):
        tokenized(examples, student, teacher, name="big")


def test_a_teacher_without_a_chat_template_is_refused_before_the_first_row(student):
    with pytest.raises(DistillError, match="the teacher reads with its own chat template, and its tokenizer has none"):
        tokenized([{"messages": MORE}], student, trained("gemma"))


def test_text_and_tokens_have_no_row_of_the_teacher(student, teacher):
    for example in ({"text": "A text. " * 50}, {"input_ids": student("A text. " * 5)["input_ids"]}):
        assert {*tokenized([example], student, teacher, max_length=8).column_names} == {"input_ids", "labels"}
    every = tokenized([{"messages": MORE}], student, teacher, assistant_only=False)
    assert {*every.column_names} == {"input_ids", "labels"}
