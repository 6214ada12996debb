"""Target tokens of conversations against a naive reference from rendered prefixes, for all kinds of templates."""

import pytest
from datasets import Dataset
from transformers import ByT5Tokenizer

from hf_distill import DistillError
from hf_distill.data import tokenize_dataset
from hf_distill.data.checks import check_tools
from hf_distill.data.conversations import Conversations
from hf_distill.data.training_templates import PROBES, training_template
from hf_distill.recipe.smoke import byte_tokenizer

CHAT = [
    {"role": "user", "content": "Which city is the capital of France?"},
    {"role": "assistant", "content": "Paris, of course."},
    {"role": "user", "content": "And of Italy?"},
    {"role": "assistant", "content": "Rome."},
]
SYSTEM = [{"role": "system", "content": "Answer briefly."}, *CHAT]
TWO_ANSWERS = [*CHAT[:2], {"role": "assistant", "content": "It is on the Seine."}, *CHAT[2:]]
# Without marks: turns end with an end token, the generation prompt is a header, and the template renders BOS.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n\n' }}{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}"
    " {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
# Renders the reasoning of the last answer only.
LAST_REASONING = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
ENDING = (  # ends the text with another token, like the template of Phi-3
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% else %}{{ eos_token }}{% endif %}"
)


def naive_mask(tokenizer, template, messages) -> list[int]:
    """Return 1 for tokens that the prefix up to the end of an assistant's turn has and the prefix before it has not."""

    def count(n, prompt):
        text = tokenizer.apply_chat_template(
            messages[:n], chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    mask = [0] * count(len(messages), False)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            for position in range(count(i, True), count(i + 1, False)):
                mask[position] = 1
    return mask


@pytest.mark.parametrize("messages", [CHAT[:2], CHAT, SYSTEM, TWO_ANSWERS, CHAT[:3]])
@pytest.mark.parametrize("template", [None, LLAMA, INST])
def test_targets_are_the_assistants_turns_without_generation_prompts(smollm2_tokenizer, template, messages):
    if template is INST and messages is SYSTEM:
        messages = messages[1:]
    tokenizer = byte_tokenizer() if template else smollm2_tokenizer  # one-byte tokens never cross a turn's boundary
    ids, mask = Conversations(tokenizer, template).encode(messages)
    assert ids == tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True)["input_ids"]
    assert mask == naive_mask(tokenizer, template, messages)
    assert 0 < sum(mask) < len(mask)


def test_only_answers_with_end_tokens_are_targets_for_smollm2(smollm2_tokenizer):
    (row,) = tokenize_dataset(Dataset.from_list([{"messages": CHAT}]), smollm2_tokenizer, 128)
    targets = [label for label in row["labels"] if label != -100]
    assert smollm2_tokenizer.decode(targets) == "Paris, of course.<|im_end|>\nRome.<|im_end|>\n"


def test_targets_are_located_with_a_tokenizer_without_offsets():
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokenizer.chat_template = INST
    ids, mask = Conversations(tokenizer).encode(CHAT)
    assert tokenizer.decode([i for i, bit in zip(ids, mask, strict=True) if bit]) == " Paris, of course.</s> Rome.</s>"
    assert mask == naive_mask(tokenizer, None, CHAT)


@pytest.mark.parametrize(("template", "count"), [(LAST_REASONING, 2), (ENDING, 2)])
def test_a_template_whose_prefixes_differ_is_refused_with_a_remedy(smollm2_tokenizer, template, count):
    data = Dataset.from_list([{"messages": CHAT[:2]}, {"messages": CHAT}])
    with pytest.raises(DistillError) as caught:
        tokenize_dataset(data, smollm2_tokenizer, 128, chat_template=template)
    message = str(caught.value)
    assert (
        f"row 1 (counted from 0), column messages: the chat template renders the first {count} messages differently"
        in message
    )
    assert "Either set `chat_template`" in message
    assert "`assistant_only: false`" in message
    rows = tokenize_dataset(data, smollm2_tokenizer, 128, False, chat_template=template)
    assert rows["labels"] == rows["input_ids"]


def test_the_error_names_a_training_template_that_renders_the_same_text(smollm2_tokenizer):
    from trl.chat_template_utils import qwen3_chat_template

    with pytest.raises(DistillError, match="'qwen3' renders the same text"):
        Conversations(smollm2_tokenizer, qwen3_chat_template).encode(CHAT)
    ids, mask = Conversations(smollm2_tokenizer, training_template("qwen3")).encode(CHAT)
    targets = [i for i, bit in zip(ids, mask, strict=True) if bit]
    assert smollm2_tokenizer.decode(targets) == (
        "Paris, of course.<|im_end|>\n<think>\n\n</think>\n\nRome.<|im_end|>\n"
    )
    with pytest.raises(DistillError, match="begins with an assistant's turn"):
        Conversations(smollm2_tokenizer).encode(CHAT[1:])


@pytest.mark.parametrize("template", [None, "smollm2"])
def test_assistant_turns_of_a_completion_are_targets(smollm2_tokenizer, template):
    example = {"prompt": CHAT[:1], "completion": CHAT[1:]}
    template = template and training_template(template)

    def targets(**options):
        (row,) = tokenize_dataset(
            Dataset.from_list([example]), smollm2_tokenizer, 128, chat_template=template, **options
        )
        return smollm2_tokenizer.decode([label for label in row["labels"] if label != -100])

    assert targets() == "Paris, of course.<|im_end|>\nRome.<|im_end|>\n"
    all_targets = targets(assistant_only=False)
    assert all_targets.startswith("Paris, of course.<|im_end|>\n<|im_start|>user\nAnd of Italy?")


def answered_by(role: str) -> list[dict]:
    return [*CHAT[:3], {"role": role, "content": "Rome."}]


@pytest.mark.parametrize(("role", "rename"), [("bot", "'bot' -> 'assistant'"), ("User", "'User' -> 'user'"), ("x", "")])
@pytest.mark.parametrize("template", [None, "smollm2"])
@pytest.mark.parametrize("streaming", [False, True])
def test_an_unknown_role_is_refused(smollm2_tokenizer, role, rename, template, streaming):
    data = Dataset.from_list([{"messages": CHAT}, {"messages": answered_by(role)}])
    prefix = r"^x, row 1 \(counted from 0\), column messages\[3\].role: "
    with pytest.raises(
        DistillError, match=f"{prefix}found '{role}', .*system, developer, user, assistant, tool.*{rename}"
    ):
        list(
            tokenize_dataset(
                data.to_iterable_dataset() if streaming else data,
                smollm2_tokenizer,
                128,
                where="x",
                chat_template=template and training_template(template),
            )
        )


def test_a_role_in_a_prompt_or_a_completion_is_refused(smollm2_tokenizer):
    prompt, completion = CHAT[:1], CHAT[1:2]
    human, bot = [prompt[0] | {"role": "human"}], [completion[0] | {"role": "bot"}]
    for example, message in (
        ({"prompt": human, "completion": completion}, r"column prompt\[0\].role: found 'human'"),
        ({"prompt": prompt, "completion": bot}, r"column completion\[0\].role: found 'bot'"),
    ):
        with pytest.raises(DistillError, match=message):
            tokenize_dataset(Dataset.from_list([example]), smollm2_tokenizer, 128)


@pytest.mark.parametrize("role", ["ipython", "function", "critic", "developer", "tool"])
def test_roles_that_the_template_names_are_rendered(smollm2_tokenizer, role):
    template = (
        "{% set names = {'critic': 'Critic'} %}{% for m in messages %}{% if m['role'] in ['ipython', 'function'] %}"
        "{{ 'result: ' }}{% else %}{{ names.get(m['role'], m['role']) + ': ' }}{% endif %}{{ m['content'] + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    messages = [CHAT[0], {"role": role, "content": "Rome?"}, CHAT[3]]
    (row,) = tokenize_dataset(
        Dataset.from_list([{"messages": messages}]), smollm2_tokenizer, 128, chat_template=template
    )
    assert "Rome?" in smollm2_tokenizer.decode(row["input_ids"])
    assert smollm2_tokenizer.decode([label for label in row["labels"] if label != -100]).strip() == "Rome."


def test_a_name_that_a_template_only_renders_is_no_role(smollm2_tokenizer):
    gemma = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
        "{% set role = m['role'] %}{% endif %}{{ role + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'model: ' }}{% endif %}"
    )
    with pytest.raises(DistillError, match="'model' -> 'assistant'"):
        tokenize_dataset(
            Dataset.from_list([{"messages": answered_by("model")}]), smollm2_tokenizer, 128, chat_template=gemma
        )


def test_the_sharegpt_format_is_refused_with_a_mapping(smollm2_tokenizer):
    turns = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]
    for column in ("messages", "conversations"):
        with pytest.raises(DistillError, match=r"human -> user and gpt -> assistant, `value` becomes `content`"):
            tokenize_dataset(Dataset.from_list([{column: turns}]), smollm2_tokenizer, 128)


PARTS = [
    m | {"content": [{"type": "text", "text": m["content"][:5]}, {"type": "text", "text": m["content"][5:]}]}
    for m in CHAT
]
PRINTED = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
READS_PARTS = (
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}<{{ p['text'] }}>{% endfor %}\n{% endfor %}"
)


@pytest.mark.parametrize("template", [None, PRINTED])
def test_text_parts_are_joined_for_a_template_of_texts(smollm2_tokenizer, template):
    conversations = Conversations(smollm2_tokenizer, template)
    encode = {"assistant_only": False}
    assert conversations.encode(PARTS, **encode) == conversations.encode(CHAT, **encode)


def test_text_parts_are_not_joined_for_a_template_of_parts(smollm2_tokenizer):
    ids, _ = Conversations(smollm2_tokenizer, READS_PARTS).encode(PARTS, assistant_only=False)
    assert smollm2_tokenizer.decode(ids).startswith("user: <Which>< city is")


def test_keys_filled_with_null_by_arrow_are_removed(smollm2_tokenizer):
    template = "{% for m in messages %}{{ m.keys() | sort | join(' ') }}{{ m.tool_calls }};{% endfor %}"
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}, "id": None}
    messages = [
        {"role": "user", "content": "x", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    ids, _ = Conversations(smollm2_tokenizer, template).encode(messages, assistant_only=False)
    assert smollm2_tokenizer.decode(ids) == (
        "content role;role tool_calls[{'function': {'name': 'f', 'arguments': {'a': 1}}}];"
    )


def test_keys_of_tools_that_arrow_filled_with_null_are_removed(smollm2_tokenizer):
    """The columns of a data set have one type, so that each tool gets the parameters of all tools."""
    tools = [
        {"function": {"name": name, "parameters": {"properties": {parameter: {"type": "string"}}}}}
        for name, parameter in (("f", "a"), ("g", "b"))
    ]
    rows = Dataset.from_list([{"messages": CHAT, "tools": [tool]} for tool in tools])
    assert [check_tools(row) for row in rows] == [[tool] for tool in tools]


def test_exceptions_of_a_template_become_one_error(smollm2_tokenizer):
    for template in ("{{ raise_exception('no system') }}", "{{ 1 / 0 }}", "{{ messages[0].x.y }}"):
        with pytest.raises(DistillError, match=r"cannot render the conversation: .*Error"):
            Conversations(smollm2_tokenizer, template).encode(CHAT)


def test_a_template_that_leaves_out_tools_or_tool_calls_is_refused(smollm2_tokenizer):
    """The model would read an empty answer, and `<|im_end|>` would be the only target token of the turn."""
    messages, tools, _ = PROBES[-1]
    conversations = Conversations(smollm2_tokenizer)
    with pytest.raises(DistillError, match="has `tool_calls`, and the chat template leaves them out"):
        conversations.encode(messages, tools)
    with pytest.raises(DistillError, match="has `tools`, and the chat template leaves them out"):
        conversations.encode(CHAT, tools)
    ids, mask = Conversations(smollm2_tokenizer, training_template("qwen3")).encode(messages, tools)
    assert len(ids) == len(mask)
