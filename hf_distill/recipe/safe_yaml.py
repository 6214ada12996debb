"""YAML as data: bounded in size, depth and repetition; plain values alone."""

from typing import Any

import yaml

from ..errors import DistillError
from .plain_yaml import printable

LIMIT = 256 * 1024  # bytes; the longest packaged recipe has 2,500
_DEPTH, _NODES = 32, 20_000
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


def read_yaml(text: str, what: str) -> Any:
    """The value of a YAML document.

    Args:
        text: the document.
        what: its name in errors.

    Raises:
        DistillError: it is not YAML, too large, nested too deep, repeats itself without end, names a key twice, or
            holds anything but mappings, lists, strings, numbers, booleans and null.
    """
    what = printable(what if len(what) <= 200 else f"{what[:200]}...")
    if len(text) > LIMIT:
        raise DistillError(f"{what} has {len(text):,} characters; a recipe has at most {LIMIT:,}.")
    try:
        _check_events(text, what)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, what, {}, loader)
        return loader.construct_document(node)
    except DistillError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DistillError(f"{what} is not YAML: {error}") from None


def _check_events(text: str, what: str) -> None:
    """Depth and number of nodes as they are written, before anything is composed."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader), 1):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEPTH:
            raise DistillError(f"{what} is nested more than {_DEPTH} levels deep.")
        if count > _NODES:
            raise DistillError(f"{what} has more than {_NODES:,} values.")


def _check_scalar(node: yaml.ScalarNode, what: str, loader: yaml.SafeLoader) -> None:
    """Refuse a value that is none of the kind that it is written as, such as `!!int x` or 5,000 digits."""
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in ("bool", "int", "float"):
        return
    try:
        loader.construct_object(node)
    except (ValueError, LookupError, ArithmeticError):
        text = repr(node.value) if len(node.value) <= 40 else f"{node.value[:40]!r}..., {len(node.value):,} characters"
        place = f"line {node.start_mark.line + 1}"
        raise DistillError(f"{what}, {place}: {text} is no value of the kind {kind!r}.") from None


def _count(node: Any, what: str, known: dict[int, int], loader: yaml.SafeLoader) -> int:
    """Values of a node with its aliases written out; -1 stands for a node that is being counted."""
    if known.get(id(node)) == -1:
        raise DistillError(f"{what} has an alias to what it is a part of.")
    if id(node) in known:
        return known[id(node)]
    if node.tag not in _PLAIN and node.tag != "tag:yaml.org,2002:merge":
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        hint = ": put it in quotes" if kind == "timestamp" else ""
        place = f"line {node.start_mark.line + 1}"
        raise DistillError(f"{what}, {place}: a value of the kind {kind!r} is no part of a recipe{hint}.")
    known[id(node)] = -1
    total = 1
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, what, loader)
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, what)
        total += sum(_count(key, what, known, loader) + _count(value, what, known, loader) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count(item, what, known, loader) for item in node.value)
    if total > _NODES:
        raise DistillError(f"{what} has more than {_NODES:,} values once its aliases are written out.")
    known[id(node)] = total
    return total


def _check_keys(node: yaml.MappingNode, what: str) -> None:
    seen = set()
    for key, _ in node.value:
        if key.value in seen if isinstance(key.value, str) else False:
            raise DistillError(f"{what}, line {key.start_mark.line + 1}: the key {key.value!r} is given twice.")
        seen.add(key.value if isinstance(key.value, str) else id(key))
