"""Roles of messages: those that every chat template may get, and those that one chat template names itself."""

from collections.abc import Sequence
from functools import lru_cache

from ..errors import DistillError

STANDARD_ROLES = ("system", "developer", "user", "assistant", "tool")
# What other data sets call these roles.
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
    "Conversations of the ShareGPT form ({from, value}) need other names: `from` becomes `role`, with human -> user "
    "and gpt -> assistant, `value` becomes `content`, and the column becomes `messages`. In Python: "
    'roles = {"human": "user", "gpt": "assistant"}; messages = [{"role": roles.get(m["from"], m["from"]), '
    '"content": m["value"]} for m in conversation]'
)


@lru_cache
def template_roles(chat_template: str) -> frozenset[str]:
    """Texts that a chat template compares values with or looks values up by, which include the roles that it names.

    Args:
        chat_template: Jinja source.
    """
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(chat_template).environment.parse(chat_template)
    places = (place for kind in (nodes.Compare, nodes.Dict, nodes.Filter, nodes.Test) for place in tree.find_all(kind))
    constants = (constant.value for place in places for constant in place.find_all(nodes.Const))
    return frozenset(value for value in constants if isinstance(value, str))


def check_roles(messages: Sequence[dict], chat_template: str, column: str) -> None:
    """Refuse a role that is not standard and that the chat template does not name.

    Most templates write any role into the text, so that a wrong one would be read as a part of the prompt.

    Args:
        messages: `{"role": ..., "content": ...}` each.
        chat_template: Jinja source.
        column: for the error.

    Raises:
        DistillError: there is such a role.
    """
    known = {*STANDARD_ROLES, *template_roles(chat_template)}
    wrong = [(index, message["role"]) for index, message in enumerate(messages) if message["role"] not in known]
    if not wrong:
        return
    index, role = wrong[0]
    names = {name: _standard_name(name) for _, name in wrong}
    renames = ", ".join(f"{name!r} -> {standard!r}" for name, standard in names.items() if standard)
    raise DistillError(
        f"column {column}[{index}].role: found {role!r}, and the roles are {', '.join(STANDARD_ROLES)}, and those that "
        f"the chat template names, which {role!r} is not. Rename the roles of the data{renames and ': '}{renames}."
    )


def _standard_name(role: str) -> str | None:
    plain = role.strip().lower()
    return plain if plain in STANDARD_ROLES else _STANDARD_NAMES.get(plain)
