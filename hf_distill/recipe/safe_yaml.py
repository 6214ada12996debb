"""Reads YAML safely: plain values only, with limits on size, depth and aliases."""

import yaml

from ..core.json_types import JSON
from ..errors import DistillError
from .plain_yaml import printable

MAX_BYTES = 256 * 1024  # the longest packaged recipe has 2,500 bytes
_MAX_DEPTH, _MAX_NODES = 32, 20_000
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


def read_yaml(text: str, name: str) -> JSON:
    """Return the value of a YAML document.

    Args:
        text: The document.
        name: Name of the document in error messages.

    Raises:
        DistillError: The text is not YAML, is too large or nested too deeply, has too many aliases or a duplicate key,
            or holds values other than mappings, lists, strings, numbers, booleans and null.
    """
    name = printable(name if len(name) <= 200 else f"{name[:200]}...")
    if len(text) > MAX_BYTES:
        raise DistillError(f"{name} has {len(text):,} characters; a recipe can have at most {MAX_BYTES:,}.")
    try:
        _check_events(text, name)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, name, {}, loader)
        return loader.construct_document(node)
    except DistillError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DistillError(f"{name} is not YAML: {error}") from None


def _check_events(text: str, name: str) -> None:
    """Check the depth and the number of nodes before any value is constructed."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader), 1):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise DistillError(f"{name} is nested more than {_MAX_DEPTH} levels deep.")
        if count > _MAX_NODES:
            raise DistillError(f"{name} has more than {_MAX_NODES:,} values.")


def _check_scalar(node: yaml.ScalarNode, name: str, loader: yaml.SafeLoader) -> None:
    """Check that a scalar is a value of its YAML type; `!!int x` and integers of 5,000 digits are not."""
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in ("bool", "int", "float"):
        return
    try:
        loader.construct_object(node)
    except (ValueError, LookupError, ArithmeticError):
        text = repr(node.value) if len(node.value) <= 40 else f"{node.value[:40]!r}..., {len(node.value):,} characters"
        line = f"line {node.start_mark.line + 1}"
        raise DistillError(f"{name}, {line}: {text} is not a valid {kind}.") from None


def _count_values(node: yaml.Node, name: str, node_sizes: dict[int, int], loader: yaml.SafeLoader) -> int:
    """Count the values of a node with its aliases expanded; -1 marks a node that is being counted."""
    if node_sizes.get(id(node)) == -1:
        raise DistillError(f"{name} has an alias that refers to a value which contains the alias.")
    if id(node) in node_sizes:
        return node_sizes[id(node)]
    if node.tag not in _PLAIN and node.tag != "tag:yaml.org,2002:merge":
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        hint = ": write it in quotes" if kind == "timestamp" else ""
        line = f"line {node.start_mark.line + 1}"
        raise DistillError(f"{name}, {line}: a value of type {kind!r} is not allowed{hint}.")
    node_sizes[id(node)] = -1
    total = 1
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, name, loader)
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, name)
        total += sum(
            _count_values(key, name, node_sizes, loader) + _count_values(value, name, node_sizes, loader)
            for key, value in node.value
        )
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count_values(item, name, node_sizes, loader) for item in node.value)
    if total > _MAX_NODES:
        raise DistillError(f"{name} has more than {_MAX_NODES:,} values after its aliases are expanded.")
    node_sizes[id(node)] = total
    return total


def _check_keys(node: yaml.MappingNode, name: str) -> None:
    keys = set()
    for key, _ in node.value:
        if key.value in keys if isinstance(key.value, str) else False:
            raise DistillError(f"{name}, line {key.start_mark.line + 1}: the key {key.value!r} occurs twice.")
        keys.add(key.value if isinstance(key.value, str) else id(key))
