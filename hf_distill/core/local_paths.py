"""Removes local paths from published text: each path is reduced to its last component. Imports no torch."""

import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from .references import path_exists, reference_kind

_NAME = r"[^\s\\/\"'<>|*?:;,()\[\]{}`&#]+"
# A path in running text: on a Windows drive, absolute, in a home folder, or relative with a leading dot. A word, slash,
# "<" or "+" before its first slash would make it a URL, a quotient, a tag or base64.
_PATH = re.compile(
    rf"(?<!\w)[A-Za-z]:[\\/]{_NAME}(?:[\\/]+{_NAME})*|"
    rf"(?<![\w/<+.])(?:file://)?(?:~[\w.-]*|\.{{1,2}})?/(?!/){_NAME}(?:/+{_NAME})*/?"
)
_PATH_ONLY = re.compile(r"(?:file://)?(?:~[\w.-]*/|\.{1,2}/|[A-Za-z]:[\\/]|/)[^\s/]")
_PATH_KEY = re.compile(r"(?:^|_)(?:path|file)$|^model$", re.IGNORECASE)


def without_local_paths(text: str, known: Collection[str] = ()) -> str:
    """Return text in which each path of this machine is reduced to its last component.

    Args:
        text: running text, or only a path, which may then contain spaces.
        known: paths that the text may contain, also relative ones and ones with spaces; see `typed_paths`.
    """
    if _PATH_ONLY.match(text) and (path_exists(text) or not re.search(r"\s", text)):
        return last_part(text)
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, last_part(path))
    for folder in _known_folders():
        text = re.sub(re.escape(folder) + r"(?=[\\/])", "", text)
    return _PATH.sub(_reduced, text)


def reduced(value: object, known: Collection[str] = ()) -> Any:
    """Return plain values, or a dataclass of them, with each path of this machine reduced to its last component.

    A string under a key such as `path` or `model` may be a relative path: it is reduced unless it is a repository id, a
    Hub URI or a package.

    Args:
        value: dicts, lists, tuples, dataclasses, strings, numbers, booleans and None.
        known: see `without_local_paths`.
    """
    if isinstance(value, str):
        return without_local_paths(value, known)
    if isinstance(value, Mapping):
        return {without_local_paths(str(key), known): _under(str(key), inner, known) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(reduced(item, known) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: reduced(getattr(value, field.name), known) for field in fields(value)})
    return value


def typed_paths(values: Mapping[str, object] | Sequence[object]) -> Iterator[str]:
    """Yield the strings under keys such as `path` or `model` that are paths of this machine, at any depth.

    Args:
        values: dicts and lists of plain values.
    """
    for key, inner in values.items() if isinstance(values, Mapping) else enumerate(values):
        if isinstance(inner, str):
            yield from [inner] if _is_path(str(key), inner) and last_part(inner) not in ("", inner) else []
        elif isinstance(inner, Mapping | list | tuple):
            yield from typed_paths(inner)


def with_reduced_keys(values: object) -> Any:
    """Return values in which only strings under keys such as `name_or_path` are reduced; other text is not changed.

    Args:
        values: dicts and lists of plain values, such as a tokenizer's config, whose tokens may look like paths.
    """
    if isinstance(values, Mapping):
        return {
            key: last_part(inner) if isinstance(inner, str) and _is_path(str(key), inner) else with_reduced_keys(inner)
            for key, inner in values.items()
        }
    return [with_reduced_keys(item) for item in values] if isinstance(values, list) else values


def last_part(path: str) -> str:
    """Return the last component of a path, which may end with a slash."""
    return re.split(r"[\\/]+", path.strip().rstrip("\\/"))[-1]


def _is_path(key: str, value: str) -> bool:
    return bool(_PATH_KEY.search(key)) and reference_kind(value) == "path"


def _under(key: str, value: object, known: Collection[str]) -> Any:
    return last_part(value) if isinstance(value, str) and _is_path(key, value) else reduced(value, known)


def _reduced(match: re.Match[str]) -> str:
    path = match[0]
    if path.count("/") + path.count("\\") == 1 and path.startswith("/") and not path_exists(path):
        return path  # "/s" or "/token" is a unit and no folder of this machine
    return last_part(path)


def _known_folders() -> list[str]:
    """Return folders of this machine that text may contain with spaces in their names, the longest first."""
    folders = (Path.cwd(), Path.home(), Path(tempfile.gettempdir()))
    return sorted({str(folder) for folder in folders if len(folder.parts) > 1}, key=len, reverse=True)
