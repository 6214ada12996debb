"""Finds a recipe by its reference: a packaged name, a file, or an address on the Hub. Imports no torch."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..core.references import HUB_PREFIX, is_file
from ..errors import DistillError, did_you_mean
from .plain_yaml import short
from .safe_yaml import MAX_BYTES

_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class RecipeSource:
    """The text of a recipe, and where it was found.

    Attributes:
        text: The YAML.
        folder: Folder to which relative paths in the recipe refer.
        origin: hf:// address at a commit for a recipe from the Hub, which is untrusted; None for packaged recipes and
            local files, which are trusted.
    """

    text: str
    folder: Path
    origin: str | None = None


def list_recipes() -> dict[str, str]:
    """Return the packaged recipes: name -> first line of the header."""
    packaged = {
        file.name.removesuffix(".yaml"): file
        for file in files("hf_distill.recipes").iterdir()
        if file.name.endswith(".yaml")
    }
    return {name: title_of(packaged[name].read_text()) for name in sorted(packaged)}


def title_of(text: str) -> str:
    """Return the first line of the header of a recipe; empty if it has no header."""
    first = text.lstrip("\ufeff\n").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def on_the_hub(reference: str) -> bool:
    """Whether a reference is an address on the Hub."""
    return reference.startswith((HUB_PREFIX, "https://"))


def find_recipe(reference: str) -> RecipeSource:
    """Read the text of a recipe.

    Args:
        reference: The name of a packaged recipe; a path to a .yaml file; hf://org/name[@revision]/file.yaml in a model
            repository; hf://datasets/org/name[@revision]/file.yaml in a dataset repository; or the URL of that file's
            page on the Hub.

    Raises:
        DistillError: There is no such name, file, repository or revision; see `hub.translate_hub_errors`.
    """
    if on_the_hub(reference):
        return _on_the_hub(reference)
    path = Path(reference)
    if path.suffix in _SUFFIXES:
        if not is_file(path):
            raise DistillError(f"There is no recipe file {short(reference)} in {Path.cwd()}.")
        return RecipeSource(read_text(path, reference), path.parent)
    return RecipeSource(packaged_text(reference), Path())


def packaged_text(name: str) -> str:
    """Return the YAML of a packaged recipe.

    Raises:
        DistillError: There is no packaged recipe of that name.
    """
    names = list_recipes()
    if name not in names:
        raise DistillError(
            f"There is no packaged recipe {short(name)}{did_you_mean(name, names) or '.'} `hf-distill recipes list` "
            "lists them. The path of a recipe file must end in .yaml, a recipe on the Hub has the form "
            "hf://org/name/file.yaml, and a value that replaces one of the recipe has the form KEY=VALUE."
        )
    return files("hf_distill.recipes").joinpath(f"{name}.yaml").read_text()


def _on_the_hub(reference: str) -> RecipeSource:
    from ..hub import fetch, format_uri, parse_uri

    at = parse_uri(reference)
    if not at.path_in_repo.endswith(_SUFFIXES):
        raise DistillError(
            f"{reference!r} is not the address of a .yaml file. `hf-distill recipes list hf://{at.id}` lists the "
            "recipes of the repository."
        )
    fetched = fetch(at, MAX_BYTES)
    return RecipeSource(read_text(fetched.path, reference), fetched.path.parent, format_uri(fetched.uri))


def read_text(path: Path, what: str) -> str:
    """Read a text file; `what` names it in errors.

    Raises:
        DistillError: The file cannot be read, or is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DistillError(f"{what} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise DistillError(f"{what} cannot be read: {error.strerror}") from None
