"""Training templates render the same text as the originals and mark the turns that rendered prefixes locate."""

from pathlib import Path

import pytest
import trl
from test_conversations import CHAT, SYSTEM, naive_mask

from hf_distill import DistillError
from hf_distill.core.references import CHAT_TEMPLATES
from hf_distill.data.conversations import Conversations
from hf_distill.data.training_templates import PROBES, matching_template, render_probes, renders_same, training_template
from hf_distill.recipe.smoke import byte_tokenizer

ORIGINALS = Path(trl.__file__).parent / "chat_templates"
# The name of a training template -> the file of the original template in trl.
OF_TRL = {
    "gemma": "gemma",
    "gemma3": "gemma3",
    "llama3": "llama3",
    "phi3": "phi3",
    "phi3.5": "phi3_5",
    "qwen2.5": "qwen2_5",
    "qwen3": "qwen3",
    "qwen3-2507": "qwen3_instruct_2507",
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def original(name, tokenizer):
    if name == "smollm2":
        return tokenizer.chat_template
    return CHATML if name == "chatml" else (ORIGINALS / f"{OF_TRL[name]}.jinja").read_text()


@pytest.mark.parametrize("name", [name for name in CHAT_TEMPLATES if name != "mistral"])
def test_a_training_template_renders_the_same_text_as_the_original(name, smollm2_tokenizer):
    source = original(name, smollm2_tokenizer)
    texts = render_probes(smollm2_tokenizer, source)
    assert any(texts)
    assert render_probes(smollm2_tokenizer, training_template(name)) == texts
    assert matching_template(smollm2_tokenizer, source) in (name, "phi3" if name == "phi3.5" else name)


def test_the_mistral_template_renders_the_format_of_the_model(smollm2_tokenizer):
    """Mistral-7B-Instruct-v0.3: the system message is part of the user's turn if that is the last turn."""

    def text(messages):
        rendered_text = smollm2_tokenizer.apply_chat_template(
            messages, chat_template=training_template("mistral"), tokenize=False
        )
        return rendered_text.replace(smollm2_tokenizer.bos_token, "<s>").replace(smollm2_tokenizer.eos_token, "</s>")

    first_prompt = "<s>[INST] Which city is the capital of France?[/INST]"
    assert text(CHAT[:1]) == first_prompt
    assert text(CHAT) == f"{first_prompt} Paris, of course.</s>[INST] And of Italy?[/INST] Rome.</s>"
    assert text(SYSTEM[:4]) == f"{first_prompt} Paris, of course.</s>[INST] Answer briefly.\n\nAnd of Italy?[/INST]"
    assert text(SYSTEM) == text(CHAT)
    for wrong in (CHAT[1:], [*CHAT, CHAT[1]], [{"role": "tool", "content": "x"}]):
        with pytest.raises(Exception, match=r"training template renders turns|must alternate"):
            text(wrong)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_training_template_marks_the_same_turns_as_prefixes(name):
    tokenizer = byte_tokenizer()
    conversations = Conversations(tokenizer, training_template(name))
    assert conversations.has_marks
    # Qwen3 renders earlier turns differently, and Phi-3 ends the last one with one more token.
    messages = CHAT[:2] if name in ("qwen3", "phi3", "phi3.5") else CHAT
    _, mask = conversations.encode(messages)
    located = naive_mask(tokenizer, conversations.chat_template, messages)
    assert mask == located


def test_tool_calls_are_targets_and_tool_results_are_not(smollm2_tokenizer):
    messages, tools, _ = PROBES[-1]
    for name in ("qwen2.5", "qwen3", "qwen3-2507"):
        conversations = Conversations(smollm2_tokenizer, training_template(name))
        ids, mask = conversations.encode(messages, tools)
        targets = smollm2_tokenizer.decode([i for i, bit in zip(ids, mask, strict=True) if bit])
        assert targets.startswith(
            '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>\n'
        )
        assert "tool_response" not in targets


def test_templates_that_render_another_text_do_not_match(smollm2_tokenizer):
    assert not renders_same(smollm2_tokenizer, training_template("chatml"))
    assert matching_template(smollm2_tokenizer, CHATML + "!") is None
    assert matching_template(smollm2_tokenizer, "{{ raise_exception('never') }}") is None


def test_template_files_are_read_and_invalid_ones_refused(tmp_path):
    (tmp_path / "x.jinja").write_text(CHATML)
    assert training_template(str(tmp_path / "x.jinja")) == CHATML
    (tmp_path / "broken.jinja").write_text("a\n{% for %}")
    with pytest.raises(DistillError, match=r"broken\.jinja' is not valid Jinja: line 2"):
        training_template(str(tmp_path / "broken.jinja"))
    with pytest.raises(DistillError, match="cannot be read"):
        training_template(str(tmp_path / "none.jinja"))
    with pytest.raises(DistillError, match="no training template 'qwen_3'; did you mean 'qwen3'"):
        training_template("qwen_3")
