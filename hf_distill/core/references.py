"""Names of models and data in recipes: whether a name is a package, a path, a Hub id or a Hub URI. Imports no torch."""

import re
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

PACKAGE_PREFIX, SMOKE_PREFIX, HUB_PREFIX = "package:", "smoke:", "hf://"
# Files of data -> the builder of `datasets` that reads them.
DATASET_BUILDERS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# Chat templates that come with this package or with trl and mark the assistant's turns; see data.training_templates.
CHAT_TEMPLATES = (
    *("chatml", "gemma", "gemma3", "llama3", "mistral", "phi3", "phi3.5", "qwen2.5", "qwen3", "qwen3-2507", "smollm2"),
)
PACKAGED_TEXTS = ("package:pydoc_data.topics", "package:stdlib", "package:builtins")
TEMPLATE_SUFFIX = ".jinja"
_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
Kind = Literal["package", "smoke", "address", "path", "id"]


def reference_kind(name: str) -> Kind:
    """Return the kind of a name.

    package: a file of an installed package, package:module/file.gguf, or a packaged text, package:pydoc_data.topics
    smoke:   a tiny random model, smoke:family/role
    address: a URI of the Hub, hf://org/name@revision/file
    path:    a file or folder: it exists (libraries look there first), or the name is no id
    id:      the id of a repository on the Hub, org/name or name
    """
    kinds: dict[str, Kind] = {PACKAGE_PREFIX: "package", SMOKE_PREFIX: "smoke", HUB_PREFIX: "address"}
    for prefix, kind in kinds.items():
        if name.startswith(prefix):
            return kind
    is_id_like = _ID.fullmatch(name) and ".." not in name and Path(name).suffix not in DATASET_BUILDERS
    return "id" if is_id_like and not path_exists(name) else "path"


def path_exists(path: str | Path) -> bool:
    """Whether a path exists; False for names that no file system allows."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def is_file(path: Path | Traversable) -> bool:
    """Whether a path is a file; False for names that no file system allows."""
    try:
        return bool(path.is_file())
    except (OSError, ValueError):
        return False


def is_id(name: object) -> bool:
    """Whether a name is the id of a repository on the Hub."""
    return isinstance(name, str) and reference_kind(name) == "id"


def module_of(name: str) -> str:
    """Return the module of a `package:` name."""
    return name.removeprefix(PACKAGE_PREFIX).partition("/")[0]


def distribution_of(name: str) -> str:
    """Return the name of the pip package of a `package:` name."""
    return module_of(name).partition(".")[0].replace("_", "-")


def public_name(name: object) -> str | None:
    """Return a name as it may be published: of a path only the last component; None for an empty name."""
    if not name:
        return None
    name = str(name)
    return f"{name.rstrip('/').rpartition('/')[2]} (a local folder)" if reference_kind(name) == "path" else name
