"""URLs of teacher servers, and the API key, which comes from the environment only. Imports no torch."""

import ipaddress
import os
from collections.abc import Sequence
from urllib.parse import urlsplit

from ..errors import DistillError
from .json_types import JSON, JSONObject

DEFAULT_KEY_VARIABLE = "HF_DISTILL_TEACHER_API_KEY"
SERVER_KEYS = ("url", "api_key_env")  # of a teacher in a recipe


def server_urls(url: str | Sequence[str]) -> tuple[str, ...]:
    """Return the base URLs of servers without a final `/` or `/v1`.

    Args:
        url: one URL, or several of servers of the same model.

    Raises:
        DistillError: there is none, one occurs twice, is no http(s) URL, or contains credentials; the message does not
            repeat credentials.
    """
    if not isinstance(url, Sequence):
        raise DistillError(f'The URL of a remote teacher is {url!r}; give a text such as "http://127.0.0.1:8000".')
    urls = tuple(_base(each) for each in ([url] if isinstance(url, str) else url))
    if not urls:
        raise DistillError('A remote teacher needs a URL, such as "http://127.0.0.1:8000".')
    if len({*urls}) < len(urls):
        raise DistillError(f"The URLs of a remote teacher must differ: {', '.join(urls)}. Remove the repeated one.")
    return urls


def _base(url: str) -> str:
    try:
        parts = urlsplit(str(url).strip())
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise DistillError(f"The URL of a remote teacher is not valid ({error}): give http://HOST:PORT.") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise DistillError(
            f"The URL of a remote teacher contains credentials, a query or a fragment (host {host!r}). URLs are "
            "written into run folders and cards, so they must not contain a key: give http://HOST:PORT, and set the "
            f"key in the environment variable {DEFAULT_KEY_VARIABLE}, or in one that api_key_env names."
        )
    if parts.scheme not in ("http", "https") or not host:
        raise DistillError(
            f"The URL of a remote teacher is {url!r}: it must begin with http:// or https:// and name a host, such as "
            '"http://127.0.0.1:8000".'
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1').rstrip('/')}"


def public_host(url: str) -> str:
    """Return host and port of a URL, as results and cards record it."""
    return urlsplit(url).netloc


def without_servers(recipe: JSONObject) -> JSONObject:
    """Return the plain values of a recipe without the URLs and the key variables of its servers, for publication."""
    several = recipe.get("teachers")
    values = dict(recipe)
    if "generate" in recipe:
        values["generate"] = _without_server(recipe["generate"])
    if "teacher" in recipe:
        values["teacher"] = _without_server(recipe["teacher"])
    if isinstance(several, list):
        values["teachers"] = [_without_server(teacher) for teacher in several]
    return values


def _without_server(teacher: JSON) -> JSON:
    if not isinstance(teacher, dict):
        return teacher
    return {name: value for name, value in teacher.items() if name not in SERVER_KEYS}


def is_loopback(url: str) -> bool:
    """Whether a URL is on this machine, where proxies of the environment do not apply."""
    return is_loopback_host(urlsplit(url).hostname or "")


def is_loopback_host(host: str) -> bool:
    """Whether a host name or address is that of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_api_key(variable: str | None) -> str | None:
    """Return the API key of the environment; None if there is none.

    Args:
        variable: name of the environment variable; None: `DEFAULT_KEY_VARIABLE`, which may be unset.

    Raises:
        DistillError: the variable that was named is not set, the name is none, or the key cannot be sent; the message
            does not repeat the key.
    """
    if variable is None:
        return _clean_key(DEFAULT_KEY_VARIABLE) or None
    if not variable.isidentifier():
        raise DistillError(
            "api_key_env must be the name of an environment variable, such as TEACHER_KEY, and not a key itself: a "
            "key must never be in a recipe or script."
        )
    key = _clean_key(variable)
    if not key:
        raise DistillError(f"The environment variable {variable}, which api_key_env names, is not set: export it.")
    return key


def _clean_key(variable: str) -> str:
    """Return the key of an environment variable without spaces and line breaks around it; "" if there is none."""
    key = os.environ.get(variable, "").strip()
    if not is_token(key):
        raise DistillError(
            f"The API key in the environment variable {variable} must consist of printable ASCII characters without "
            "spaces, because it is sent in a header: set it to the key alone."
        )
    return key


def is_token(text: str) -> bool:
    """Whether a text can be sent as a bearer token: printable ASCII without spaces."""
    return text.isascii() and text.isprintable() and " " not in text
