"""Extension of griffe for docstrings of the package.

The help text of a dataclass field, or the description of a pydantic field, becomes its docstring. A paragraph of lines
`name: meaning`, as classes describe their attributes, becomes a list.
"""

import re
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from typing import Any

import griffe

ENTRY = re.compile(r"^([\w, `*]+?): +(?=\S)", flags=re.M)


@cache
def field_texts(module: str, name: str) -> dict[str, str]:
    """Return the help text or description of each field of a class that has one."""
    cls = getattr(import_module(module), name, None)
    if is_dataclass(cls):
        return {field.name: field.metadata["help"] for field in fields(cls) if "help" in field.metadata}
    described = getattr(cls, "model_fields", {})
    return {key: field.description for key, field in described.items() if field.description}


def lists_of_attributes(text: str) -> str:
    """Return a docstring in which paragraphs of lines `name: meaning` are lists."""
    paragraphs = text.split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if ENTRY.match(paragraph) and len(ENTRY.findall(paragraph)) > 1:
            paragraphs[i] = ENTRY.sub(r"- **\1**: ", paragraph)
    return "\n\n".join(paragraphs)


class FieldDocs(griffe.Extension):
    """Gives fields their docstrings, and docstrings their lists."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Make lists of the paragraphs that describe attributes."""
        if obj.docstring:
            obj.docstring.value = lists_of_attributes(obj.docstring.value)

    def on_attribute(self, *, attr: griffe.Attribute, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Set the docstring of an attribute that has none and whose value is the call of `field` or `Field`."""
        owner = attr.parent
        if attr.docstring or owner is None or not owner.is_class or not isinstance(attr.value, griffe.ExprCall):
            return
        if attr.value.function.canonical_name in ("field", "Field") and not attr.name.startswith("_"):
            text = field_texts(owner.module.path, owner.name).get(attr.name)
            attr.docstring = griffe.Docstring(text, parent=attr) if text else None
            attr.value = None  # the text replaces it
