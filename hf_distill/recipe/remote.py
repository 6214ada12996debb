"""Recipes of a repository on the Hub: listed, and copied."""

import os
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DistillError
from ..hub import address, beside, fetch, written, yaml_files
from .load import whole_values
from .reading import LIMIT, read_yaml
from .references import find_recipe, on_the_hub, read_text, title_of

_OWN_KEYS = {"student", "teacher", "teachers", "data", "train", "extends", "stages"}


def list_remote(reference: str) -> dict[str, str]:
    """Recipes of a repository: address at its commit now -> first line of its header, or why it is none that runs.

    Other YAML files are left out.

    Args:
        reference: hf://org/name[@revision][/folder].

    Raises:
        DistillError: see `hub.asking`; it holds no recipes.
    """
    found = {}
    for at in yaml_files(address(reference)):
        try:
            text = read_text(fetch(at, LIMIT).path, at.path_in_repo)
            values = read_yaml(text, at.path_in_repo)
            if not isinstance(values, dict) or len(_OWN_KEYS & values.keys()) < 2:
                continue
            whole_values(find_recipe(written(at)), written(at))
            found[written(at)] = title_of(text)
        except DistillError as error:
            found[written(at)] = f"(refused: {str(error).partition(chr(10))[0]})"
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
    whole_values(found, reference)
    at = address(str(found.origin))
    files = {PurePosixPath(at.path_in_repo).name: f"{found.text.rstrip()}\n# from {found.origin}\n"}
    for name in _named_files(read_yaml(found.text, reference)):
        if ".." in PurePosixPath(name).parts:
            raise DistillError(
                f"{reference} names {name}, which is not below its own folder: copy the repository whole."
            )
        files[name] = fetch(beside(at, name), LIMIT).path.read_text()
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


def _named_files(value: Any) -> list[str]:
    """DeepSpeed files that a recipe's values name beside the recipe, not among the packaged ones."""
    from importlib.resources import files

    packaged = {f.name for f in files("hf_distill.recipes").joinpath("deepspeed").iterdir()}
    if isinstance(value, list):
        return [name for item in value for name in _named_files(item)]
    if not isinstance(value, dict):
        return []
    own = [value["deepspeed"]] if isinstance(value.get("deepspeed"), str) else []
    return [name for name in own if name not in packaged] + [n for item in value.values() for n in _named_files(item)]
