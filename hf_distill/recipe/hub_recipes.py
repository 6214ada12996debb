"""Recipes of a repository on the Hub: listed, and copied."""

import json
import os
import re
from pathlib import Path, PurePosixPath

from ..core.escape import printable
from ..errors import DistillError
from ..hub import fetch, format_uri, parse_uri, yaml_files
from .hub_paths import content_of, deepspeed_parts, is_packaged
from .load import resolve_values
from .resolve import find_recipe, on_the_hub, read_text, title_of
from .safe_yaml import LIMIT, read_yaml

_OWN_KEYS = {"student", "teacher", "teachers", "data", "train", "extends", "stages"}
_OWN_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*")


def list_remote(reference: str) -> dict[str, str]:
    """Recipes of a repository: address at its commit now -> first line of its header, or why it is none that runs.

    Other YAML files are left out.

    Args:
        reference: hf://org/name[@revision][/folder].

    Raises:
        DistillError: see `hub.asking`; it holds no recipes.
    """
    found = {}
    for at in yaml_files(parse_uri(reference)):
        try:
            text = read_text(fetch(at, LIMIT).path, at.path_in_repo)
            values = read_yaml(text, at.path_in_repo)
            if not isinstance(values, dict) or len(_OWN_KEYS & values.keys()) < 2:
                continue
            resolve_values(find_recipe(format_uri(at)), format_uri(at))
            found[format_uri(at)] = title_of(text)
        except DistillError as error:
            found[format_uri(at)] = f"(refused: {str(error).partition(chr(10))[0]})"
    if not found:
        raise DistillError(f"{reference} holds no recipes: none of its YAML files says what to teach whom.")
    return found


def pull_recipe(reference: str, to: str | Path, force: bool = False) -> list[Path]:
    """Copy a recipe from the Hub with the DeepSpeed files that it names; its last line says where it came from.

    Args:
        reference: hf://org/name[@revision]/file.yaml.
        to: folder; made if there is none.
        force: write over files that are there.

    Returns:
        the files that were written, the recipe first.

    Raises:
        DistillError: it is refused as `load_recipe` would refuse it, or a file is there already; nothing is written.
    """
    if not on_the_hub(reference):
        raise DistillError(f"{reference!r} is not on the Hub: give hf://org/name[@revision]/file.yaml.")
    found = find_recipe(reference)
    resolve_values(found, reference)
    at = parse_uri(str(found.origin))
    own = PurePosixPath(at.path_in_repo).name
    if not _OWN_NAME.fullmatch(own):
        raise DistillError(f"{reference}: a file with the name {own!r} is not written; hidden files never are.")
    files = {own: f"{printable(found.text).rstrip()}\n# from {found.origin}\n"}
    for part in deepspeed_parts(read_yaml(found.text, reference)):
        name = part["deepspeed"]
        if is_packaged(name):
            continue
        if ".." in PurePosixPath(name).parts:
            raise DistillError(
                f"{reference} names {name}, which is not below its own folder: copy the repository whole."
            )
        files[name] = json.dumps(content_of(name, str(found.origin)), indent=2) + "\n"
    targets = {Path(to) / name: text for name, text in files.items()}
    there = [str(path) for path in targets if path.exists()]
    if there and not force:
        raise DistillError(
            f"{', '.join(there)} is there already: add --force to write over it, or give another folder."
        )
    for path, text in targets.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f".{path.name}.half")
        half.write_text(text)
        os.replace(half, path)
    return list(targets)
