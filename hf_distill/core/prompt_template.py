"""Templates of prompts: texts with the names of columns in braces."""

from string import Formatter

from ..errors import DistillError


def template_columns(template: str) -> list[str]:
    """Return the names of columns in braces of a template.

    Raises:
        DistillError: a brace is not closed, or holds something else than a name.
    """
    try:
        fields = [field for field in Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise DistillError(
            f"the teacher's prompt {template!r} is no template: {error}. Write {{{{ for a brace."
        ) from error
    names = [str(name) for _, name, _, _ in fields]
    if wrong := [name for name, field in zip(names, fields, strict=True) if not name.isidentifier() or any(field[2:])]:
        raise DistillError(
            f"the teacher's prompt {template!r} has {wrong[0]!r} in braces; it must be the name of a column, as in "
            "{prompt}. Write {{ for a brace."
        )
    return names


def fill_template(template: str, example: dict) -> str | list[dict]:
    """Return a prompt in which the names of columns in braces are replaced by the columns of an example.

    A column that is a list of messages stands for the content of the last one. If the example's prompt is such a list,
    the result is the list with the content of its last message replaced.

    Raises:
        DistillError: the example has no such column, or it is neither a text nor messages.
    """
    prompt = example.get("prompt")
    messages: list[dict] = prompt if isinstance(prompt, list) else []
    values = {name: _content(value) for name, value in example.items()}
    names = template_columns(template)
    if wrong := [name for name in names if not isinstance(values.get(name), str)]:
        raise DistillError(
            f"the teacher's prompt {template!r} uses {', '.join(wrong)}, which this example does not have as a text or "
            f"as messages; its columns are {', '.join(map(str, example))}"
        )
    text = template.format(**{name: values[name] for name in names})
    return [*messages[:-1], messages[-1] | {"content": text}] if messages else text


def _content(value: object) -> object:
    """Return the content of the last of a list of messages; other values as they are."""
    is_message = isinstance(value, list) and value and isinstance(value[-1], dict)
    return value[-1].get("content") if is_message else value  # type: ignore[index]
