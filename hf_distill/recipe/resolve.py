"""What names a recipe: a packaged one, a file, or a place on the Hub. Imports no torch."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..core.references import HUB_PREFIX, is_file
from ..errors import DistillError, did_you_mean
from .plain_yaml import short
from .safe_yaml import LIMIT

_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class RecipeSource:
    """A recipe's text.

    folder: where the names of files beside it start
    origin: hf:// address at a commit; None: a packaged recipe or a file, whose author is its user
    """

    text: str
    folder: Path
    origin: str | None = None


def list_recipes() -> dict[str, str]:
    """Packaged recipes: name -> the first line of its header."""
    found = {f.name.removesuffix(".yaml"): f for f in files("hf_distill.recipes").iterdir() if f.name.endswith(".yaml")}
    return {name: title_of(found[name].read_text()) for name in sorted(found)}


def title_of(text: str) -> str:
    """The first line of a recipe's header; empty if it has none."""
    first = text.lstrip("\ufeff\n").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def on_the_hub(reference: str) -> bool:
    """Whether a reference is an address on the Hub."""
    return reference.startswith((HUB_PREFIX, "https://"))


def find_recipe(reference: str) -> RecipeSource:
    """The text of a recipe, and where it lies.

    Args:
        reference: the name of a packaged recipe; a path to a .yaml file; hf://org/name[@revision]/file.yaml of a model
            repository, hf://datasets/org/name[@revision]/file.yaml of a data set's, or the address of its page.

    Raises:
        DistillError: there is no such name, file, repository or revision; see `hub.asking`.
    """
    if on_the_hub(reference):
        return _on_the_hub(reference)
    path = Path(reference)
    if path.suffix in _SUFFIXES:
        if not is_file(path):
            raise DistillError(f"There is no recipe file {short(reference)} (looked in {Path.cwd()}).")
        return RecipeSource(read_text(path, reference), path.parent)
    return RecipeSource(packaged_text(reference), Path())


def packaged_text(name: str) -> str:
    """The YAML of a packaged recipe.

    Raises:
        DistillError: there is none of that name.
    """
    names = list_recipes()
    if name not in names:
        raise DistillError(
            f"There is no packaged recipe {short(name)}{did_you_mean(name, names)}. A file's name ends in .yaml, and a "
            "recipe on the Hub is hf://org/name/file.yaml."
        )
    return files("hf_distill.recipes").joinpath(f"{name}.yaml").read_text()


def _on_the_hub(reference: str) -> RecipeSource:
    from ..hub import fetch, format_uri, parse_uri

    at = parse_uri(reference)
    if not at.path_in_repo.endswith(_SUFFIXES):
        raise DistillError(
            f"{reference!r} names no .yaml file: `hf-distill recipes list hf://{at.id}` lists those of a repository."
        )
    fetched = fetch(at, LIMIT)
    return RecipeSource(read_text(fetched.path, reference), fetched.path.parent, format_uri(fetched.uri))


def read_text(path: Path, what: str) -> str:
    """The text of a file.

    Raises:
        DistillError: it is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DistillError(f"{what} is no text in UTF-8: {error}") from None
    except OSError as error:
        raise DistillError(f"{what} cannot be read: {error.strerror}") from None
