"""What a recipe downloads, and one question where it is a stranger's."""

import os
import sys
from typing import Any

import typer
from rich.table import Table

from ..errors import DistillError
from ..recipe.local_files import missing_files
from ..recipe.problems import raise_problems
from ..recipe.resolve import on_the_hub
from ..recipe.schema import Recipe
from .app import out


def confirm_downloads(reference: str, recipe: Recipe, yes: bool, show: bool = False) -> None:
    """Of a recipe from the Hub, say what it downloads and ask whether to go on.

    Args:
        reference: by which the recipe was found; a file is its user's, wherever it once came from.
        recipe: validated.
        yes: do not ask.
        show: say what it downloads wherever it came from.

    Raises:
        DistillError: a file or folder that the recipe names is missing; a repository is not there, private or gated; a
            stranger's recipe names pickled weights; nobody is there to answer.
    """
    if problems := missing_files(recipe.model_dump()):
        raise_problems(problems, "in the recipe")
    strange = on_the_hub(reference)
    if not strange and not show:
        return
    from ..recipe.downloads import check_downloads, downloads

    found = downloads(recipe)
    if found:
        out.print(_table(found))
    if not strange:
        return
    check_downloads(found)
    out.print(
        f"The recipe is {recipe.origin}; it writes to {recipe.train.output_dir}.", soft_wrap=True, highlight=False
    )
    if yes or os.environ.get("RANK", "0") != "0":
        return
    if not sys.stdin.isatty():
        raise DistillError("This recipe is a stranger's, and nobody is there to say yes: add --yes to run it.")
    typer.confirm("Download and go on?", default=True, abort=True)


def _table(found: list[Any]) -> Table:
    table = Table(title="From the Hub", title_justify="left")
    for heading in ("repository", "for", "commit", "size", "to download"):
        table.add_column(heading, justify="right" if heading in ("size", "to download") else "left")
    for one in found:
        name = one.repo if one.kind == "model" else f"datasets/{one.repo}"
        commit = (one.revision or "newest")[:12]
        table.add_row(name, ", ".join(one.used_for), commit, in_units(one.size), in_units(one.missing))
    return table


def in_units(count: int | None) -> str:
    """Of a size, in decimal units as the Hub shows them."""
    if count is None:
        return "offline"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"
