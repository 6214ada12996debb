"""Roles of messages: the standard roles, and the roles that a chat template names."""

from collections.abc import Sequence
from functools import lru_cache

from ..errors import DistillError

STANDARD_ROLES = ("system", "developer", "user", "assistant", "tool")
# Names that other data sets use for the standard roles.
_STANDARD_NAMES = {
    "human": "user",
    "prompter": "user",
    "question": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "answer": "assistant",
    "function": "tool",
    "observation": "tool",
}
SHAREGPT_HINT = (
    "Conversations in the ShareGPT format ({from, value}) must be converted: `from` becomes `role`, with human -> user "
    "and gpt -> assistant, `value` becomes `content`, and the column becomes `messages`. In Python: "
    'roles = {"human": "user", "gpt": "assistant"}; messages = [{"role": roles.get(m["from"], m["from"]), '
    '"content": m["value"]} for m in conversation]'
)


@lru_cache
def template_roles(chat_template: str) -> frozenset[str]:
    """Return all text constants that a chat template compares or looks up, which include the roles that it names.

    Args:
        chat_template: Jinja source.
    """
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(chat_template).environment.parse(chat_template)
    kinds = (nodes.Compare, nodes.Dict, nodes.Filter, nodes.Test)
    expressions = (expression for kind in kinds for expression in tree.find_all(kind))
    constants = (constant.value for expression in expressions for constant in expression.find_all(nodes.Const))
    return frozenset(value for value in constants if isinstance(value, str))


def check_roles(messages: Sequence[dict], chat_template: str, column: str) -> None:
    """Refuse a role that is not standard and that the chat template does not name.

    Most templates render any role, so the tokens of a message with a wrong role would be part of the prompt.

    Args:
        messages: list of `{"role": ..., "content": ...}`.
        chat_template: Jinja source.
        column: name of the column in errors.

    Raises:
        DistillError: a message has such a role.
    """
    known = {*STANDARD_ROLES, *template_roles(chat_template)}
    wrong = [(index, message["role"]) for index, message in enumerate(messages) if message["role"] not in known]
    if not wrong:
        return
    index, role = wrong[0]
    names = {name: _standard_name(name) for _, name in wrong}
    renames = ", ".join(f"{name!r} -> {standard!r}" for name, standard in names.items() if standard)
    raise DistillError(
        f"column {column}[{index}].role: found {role!r}, which is neither one of {', '.join(STANDARD_ROLES)} nor named "
        f"by the chat template. Rename the roles of the data{renames and ': '}{renames}."
    )


def _standard_name(role: str) -> str | None:
    plain = role.strip().lower()
    return plain if plain in STANDARD_ROLES else _STANDARD_NAMES.get(plain)
