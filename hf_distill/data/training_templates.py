"""Chat templates that mark the assistant's turns with `{% generation %}` and render the text of the original.

Some are written here, in `chat_templates/`; others are TRL's.
"""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..core.references import CHAT_TEMPLATES, TEMPLATE_SUFFIX
from ..errors import DistillError, did_you_mean, require_package

# Templates of trl.chat_template_utils; the others are files of ours.
_OF_TRL = {
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
# Conversations whose text tells templates apart: (messages, tools, whether a generation prompt follows).
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
    """The Jinja source of a training template.

    Args:
        name: one of `names.CHAT_TEMPLATES`, or the path of a .jinja file.

    Raises:
        DistillError: there is no such template or file, or it is no Jinja.
    """
    if name in CHAT_TEMPLATES:
        return _packaged(name)
    if not name.endswith(TEMPLATE_SUFFIX):
        raise DistillError(
            f"There is no training template {name!r}{did_you_mean(name, CHAT_TEMPLATES)}. A file with a template ends "
            f"with {TEMPLATE_SUFFIX}."
        )
    try:
        source = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DistillError(f"The chat template {name!r} cannot be read: {error}") from error
    _check_jinja(name, source)
    return source


@cache
def _packaged(name: str) -> str:
    if (constant := _OF_TRL.get(name)) is None:
        folder = files("hf_distill.data").joinpath("chat_templates")
        return folder.joinpath(f"{name}{TEMPLATE_SUFFIX}").read_text(encoding="utf-8")
    require_package("trl", "trl", f"The training template {name}")
    from trl import chat_template_utils

    source = getattr(chat_template_utils, constant, None)
    if source is None:
        raise DistillError(f"This version of trl has no training template {name} ({constant}): install trl 1.16.")
    return source


def _check_jinja(name: str, source: str) -> None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(source)
    except TemplateSyntaxError as error:
        raise DistillError(f"The chat template {name!r} is no Jinja: line {error.lineno}: {error.message}") from error


def rendered(tokenizer: Any, chat_template: Any = None) -> list[str | None]:
    """The text of each of `PROBES`; None where the template refuses it.

    Args:
        tokenizer: whose special tokens the template writes.
        chat_template: Jinja source; None: the tokenizer's own.
    """
    return [_rendered(tokenizer, chat_template, *probe) for probe in PROBES]


def _rendered(tokenizer: Any, chat_template: Any, messages: list, tools: list | None, prompt: bool) -> str | None:
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=chat_template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception:  # a template is a program and may raise any exception
        return None


def renders_same(tokenizer: Any, training: str, chat_template: Any = None) -> bool:
    """Whether a training template renders the same text as a chat template, in every one of `PROBES` that it takes.

    A training template may refuse tools, as a conversation that has any is an error then.

    Args:
        tokenizer: whose special tokens the templates write.
        training: Jinja source of the training template.
        chat_template: Jinja source; None: the tokenizer's own.
    """
    pairs = zip(PROBES, rendered(tokenizer, chat_template), rendered(tokenizer, training), strict=True)
    return all(a == b or (b is None and tools is not None) for (_, tools, _), a, b in pairs)


def matching_template(tokenizer: Any, chat_template: Any = None) -> str | None:
    """The name of a training template that renders the same text as a chat template; None where none does."""
    if not any(rendered(tokenizer, chat_template)):
        return None
    names = (name for name in CHAT_TEMPLATES if renders_same(tokenizer, training_template(name), chat_template))
    return next(names, None)
