"""Lists and copies the recipes of a repository on the Hub."""

import json
import re
from pathlib import Path, PurePosixPath

from ..core.escape import printable
from ..core.files import write_atomic
from ..errors import DistillError
from ..hub import fetch, format_uri, parse_uri, yaml_files
from .hub_paths import deepspeed_content, deepspeed_sections, is_packaged
from .load import resolve_values
from .resolve import find_recipe, on_the_hub, read_text, title_of
from .safe_yaml import MAX_BYTES, read_yaml

_RECIPE_KEYS = {"student", "teacher", "teachers", "data", "train", "extends", "stages"}
_VISIBLE_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*")


def list_remote(reference: str) -> dict[str, str]:
    """List the recipes of a repository on the Hub.

    YAML files that are not recipes are omitted.

    Args:
        reference: hf://org/name[@revision][/folder].

    Returns:
        The address of each recipe at its current commit -> first line of the header, or why the recipe is refused.

    Raises:
        DistillError: The repository cannot be read (see `hub.translate_hub_errors`) or holds no recipes.
    """
    recipes = {}
    for at in yaml_files(parse_uri(reference)):
        try:
            text = read_text(fetch(at, MAX_BYTES).path, at.path_in_repo)
            values = read_yaml(text, at.path_in_repo)
            if not isinstance(values, dict) or len(_RECIPE_KEYS & values.keys()) < 2:
                continue
            resolve_values(find_recipe(format_uri(at)), format_uri(at))
            recipes[format_uri(at)] = title_of(text)
        except DistillError as error:
            recipes[format_uri(at)] = f"(refused: {str(error).partition(chr(10))[0]})"
    if not recipes:
        raise DistillError(
            f"{reference} holds no recipes: none of its YAML files has the keys of a recipe, such as student "
            "and teacher."
        )
    return recipes


def pull_recipe(reference: str, to: str | Path, force: bool = False) -> list[Path]:
    """Copy a recipe from the Hub with the DeepSpeed files that it names. Its last line records the origin.

    Args:
        reference: hf://org/name[@revision]/file.yaml.
        to: Target folder, which is created if it does not exist.
        force: Whether existing files are overwritten.

    Returns:
        The paths of the written files, the recipe first.

    Raises:
        DistillError: The recipe is refused by `load_recipe`, or a file exists already. Nothing is written then.
    """
    if not on_the_hub(reference):
        raise DistillError(f"{reference!r} is not an address on the Hub. Give hf://org/name[@revision]/file.yaml.")
    source = find_recipe(reference)
    resolve_values(source, reference)
    at = parse_uri(str(source.origin))
    file_name = PurePosixPath(at.path_in_repo).name
    if not _VISIBLE_NAME.fullmatch(file_name):
        raise DistillError(
            f"{reference}: a file named {file_name!r} is not written, because hidden files are never written."
        )
    files = {file_name: f"{printable(source.text).rstrip()}\n# from {source.origin}\n"}
    for _, name in deepspeed_sections(read_yaml(source.text, reference)):
        if is_packaged(name):
            continue
        if ".." in PurePosixPath(name).parts:
            raise DistillError(
                f"{reference} names {name}, which is not inside the folder of the recipe. Download the whole "
                "repository instead."
            )
        files[name] = json.dumps(deepspeed_content(name, str(source.origin)), indent=2) + "\n"
    targets = {Path(to) / name: text for name, text in files.items()}
    existing = [str(path) for path in targets if path.exists()]
    if existing and not force:
        raise DistillError(f"{', '.join(existing)} exists already. Add --force to overwrite, or give another folder.")
    for path, text in targets.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    return list(targets)
