"""Reasoning of a completion, which models write between tags before the answer. Imports no torch."""


def split_reasoning(text: str, tags: tuple[str, str], is_open: bool = False) -> tuple[str | None, str]:
    """Split a completion into its reasoning and its answer.

    Args:
        text: completion.
        tags: tags before and after the reasoning, such as `<think>` and `</think>`.
        is_open: whether the prompt ends with the first tag, as some chat templates write it.

    Returns:
        The reasoning without tags, None if there is none; and the answer, "" if the reasoning does not end.
    """
    first, last = tags
    begins = text.lstrip().startswith(first)
    if not begins and not starts_inside(text, tags, is_open):
        return None, text
    body = text.lstrip().removeprefix(first) if begins else text
    reasoning, end, answer = body.partition(last)
    return reasoning.strip(), answer.lstrip() if end else ""


def join_reasoning(reasoning: str | None, answer: str, tags: tuple[str, str]) -> str:
    """Return a completion with its reasoning between tags; the reverse of `split_reasoning`."""
    if not reasoning:
        return answer
    return f"{tags[0]}\n{reasoning}\n{tags[1]}\n\n{answer}"


def starts_inside(text: str, tags: tuple[str, str], is_open: bool = False) -> bool:
    """Whether a completion begins within the reasoning: the prompt has the first tag, as some chat templates write it.

    Args:
        text: completion.
        tags: tags before and after the reasoning.
        is_open: whether the prompt is known to end with the first tag; the prompt of a server is not known.
    """
    first, last = tags
    if text.lstrip().startswith(first):
        return False
    before, end, _ = text.partition(last)
    return is_open or (bool(end) and first not in before)


def ends_with_open_tag(prompt: str, tags: tuple[str, str]) -> bool:
    """Whether a rendered prompt ends with the first tag, so that a completion begins with the reasoning."""
    return prompt.rstrip().endswith(tags[0])
