"""Chat templates that mark the assistant's turns with `{% generation %}` and render the same text as the original.

Some are files in `chat_templates/`; the others come from TRL.
"""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from ..core.references import CHAT_TEMPLATES, TEMPLATE_SUFFIX
from ..errors import DistillError, did_you_mean, require_package

# Names of the templates in trl.chat_template_utils; the other templates are files in `chat_templates/`.
_TRL_TEMPLATES = {
    "gemma": "gemma_training_chat_template",
    "gemma3": "gemma3_training_chat_template",
    "llama3": "llama3_training_chat_template",
    "phi3": "phi3_training_chat_template",
    "phi3.5": "phi3_5_training_chat_template",
    "qwen3-2507": "qwen3_instruct_2507_training_chat_template",
}

_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
_SYSTEM = {"role": "system", "content": "Answer briefly."}
_USER = {"role": "user", "content": " What is 2 + 3? "}
_ANSWER = {"role": "assistant", "content": " It is 5.\n"}
_THOUGHT = {"role": "assistant", "content": "<think>\n2 and 3\n</think>\n\nIt is 5."}
_CALLS = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "name": "add", "content": "5"}
# Conversations that different templates render differently: (messages, tools, whether a generation prompt follows).
PROBES: tuple[tuple[list[dict], list[dict] | None, bool], ...] = (
    ([_USER], None, True),
    ([_SYSTEM, _USER], None, True),
    ([_USER, _ANSWER], None, False),
    ([_SYSTEM, _USER, _ANSWER, _USER, _ANSWER], None, False),
    ([_USER, _THOUGHT, _USER, _THOUGHT], None, False),
    ([_USER], [_TOOL], True),
    ([_USER, _CALLS, _RESULT, _ANSWER], [_TOOL], False),
)


def training_template(name: str) -> str:
    """Return the Jinja source of a training template.

    Args:
        name: one of `references.CHAT_TEMPLATES`, or the path of a .jinja file.

    Raises:
        DistillError: there is no such template or file, or it is not valid Jinja.
    """
    if name in CHAT_TEMPLATES:
        return _packaged_template(name)
    if not name.endswith(TEMPLATE_SUFFIX):
        raise DistillError(
            f"The name of a template file must end with {TEMPLATE_SUFFIX}, and there is no training template {name!r}"
            f"{did_you_mean(name, CHAT_TEMPLATES)}"
        )
    try:
        source = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DistillError(f"The chat template {name!r} cannot be read: {error}") from error
    _check_jinja(name, source)
    return source


@cache
def _packaged_template(name: str) -> str:
    if (constant := _TRL_TEMPLATES.get(name)) is None:
        folder = files("hf_distill.data").joinpath("chat_templates")
        return folder.joinpath(f"{name}{TEMPLATE_SUFFIX}").read_text(encoding="utf-8")
    require_package("trl", "trl", f"The training template {name}")
    from trl import chat_template_utils

    source = getattr(chat_template_utils, constant, None)
    if source is None:
        raise DistillError(f"The installed trl has no training template {name} ({constant}): install trl 1.16.")
    return source


def _check_jinja(name: str, source: str) -> None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(source)
    except TemplateSyntaxError as error:
        message = f"The chat template {name!r} is not valid Jinja: line {error.lineno}: {error.message}"
        raise DistillError(message) from error


def render_probes(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> list[str | None]:
    """Render each of `PROBES`; None where the template refuses the conversation.

    Args:
        tokenizer: the tokenizer whose special tokens the template renders.
        chat_template: Jinja source; None: the tokenizer's chat template.
    """
    return [_render_probe(tokenizer, chat_template, *probe) for probe in PROBES]


def _render_probe(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, messages: list, tools: list | None, prompt: bool
) -> str | None:
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=chat_template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception:  # a template is a program and may raise any exception
        return None
    return cast(str, text)


def renders_same(tokenizer: PreTrainedTokenizerBase, training: str, chat_template: str | None = None) -> bool:
    """Whether a training template renders the same text as a chat template for all `PROBES`.

    A training template may refuse conversations with tools, because such a conversation then raises an error.

    Args:
        tokenizer: the tokenizer whose special tokens the templates render.
        training: Jinja source of the training template.
        chat_template: Jinja source; None: the tokenizer's chat template.
    """
    texts = zip(PROBES, render_probes(tokenizer, chat_template), render_probes(tokenizer, training), strict=True)
    return all(
        text == training_text or (training_text is None and tools is not None)
        for (_, tools, _), text, training_text in texts
    )


def matching_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> str | None:
    """Return the name of a training template that renders the same text as a chat template, or None."""
    if not any(render_probes(tokenizer, chat_template)):
        return None
    names = (name for name in CHAT_TEMPLATES if renders_same(tokenizer, training_template(name), chat_template))
    return next(names, None)
