"""Paths of this machine in what is published: each is reduced to its last component. Imports no torch."""

import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from .references import path_exists, reference_kind

_NAME = r"[^\s\\/\"'<>|*?:;,()\[\]{}`&#]+"
# A path in running text: of a Windows drive, or absolute, of a home folder, relative with a leading dot. One slash
# begins it, and no word, slash, "<" or "+" stands before it: those are addresses, quotients, tags and base64.
_PATH = re.compile(
    rf"(?<!\w)[A-Za-z]:[\\/]{_NAME}(?:[\\/]+{_NAME})*|"
    rf"(?<![\w/<+.])(?:file://)?(?:~[\w.-]*|\.{{1,2}})?/(?!/){_NAME}(?:/+{_NAME})*/?"
)
_WHOLE = re.compile(r"(?:file://)?(?:~[\w.-]*/|\.{1,2}/|[A-Za-z]:[\\/]|/)[^\s/]")
_PATH_KEY = re.compile(r"(?:^|_)(?:path|file)$|^model$", re.IGNORECASE)


def without_local_paths(text: str, known: Collection[str] = ()) -> str:
    """Text in which each path of this machine is reduced to its last component.

    Args:
        text: running text, or a path alone, which may hold spaces then.
        known: paths that the text may hold, also relative ones and ones with spaces; see `typed_paths`.
    """
    if _WHOLE.match(text) and (path_exists(text) or not re.search(r"\s", text)):
        return last_part(text)
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, last_part(path))
    for place in _places():
        text = re.sub(re.escape(place) + r"(?=[\\/])", "", text)
    return _PATH.sub(_reduced, text)


def reduced(value: Any, known: Collection[str] = ()) -> Any:
    """Plain values, or a dataclass of them, in which each path of this machine is reduced to its last component.

    A string under a key such as `path` or `model` may be a relative path: it is reduced where it names no repository,
    address or package.

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


def typed_paths(values: Any) -> Iterator[str]:
    """Strings under a key such as `path` or `model` that are paths of this machine, at any depth.

    Args:
        values: dicts and lists of plain values.
    """
    for key, inner in values.items() if isinstance(values, Mapping) else enumerate(values):
        if isinstance(inner, str):
            yield from [inner] if _is_path(str(key), inner) and last_part(inner) not in ("", inner) else []
        elif isinstance(inner, Mapping | list | tuple):
            yield from typed_paths(inner)


def with_reduced_keys(values: Any) -> Any:
    """Values in which strings under a key such as `name_or_path` are reduced, and all other text stays as it is.

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
    """The last component of a path, also of one with a slash at its end."""
    return re.split(r"[\\/]+", path.strip().rstrip("\\/"))[-1]


def _is_path(key: str, value: str) -> bool:
    return bool(_PATH_KEY.search(key)) and reference_kind(value) == "path"


def _under(key: str, value: Any, known: Collection[str]) -> Any:
    return last_part(value) if isinstance(value, str) and _is_path(key, value) else reduced(value, known)


def _reduced(found: re.Match[str]) -> str:
    whole = found[0]
    if whole.count("/") + whole.count("\\") == 1 and whole.startswith("/") and not path_exists(whole):
        return whole  # "/s", "/token": no folder of this machine
    return last_part(whole)


def _places() -> list[str]:
    """Folders of this machine that running text may name with spaces in them, the longest first."""
    found = {str(place) for place in (Path.cwd(), Path.home(), Path(tempfile.gettempdir())) if len(place.parts) > 1}
    return sorted(found, key=len, reverse=True)
