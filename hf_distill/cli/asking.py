"""Before a run: what it downloads, and one question where the recipe is a stranger's."""

import os
import sys
from typing import Any

import typer
from rich.table import Table

from ..errors import DistillError
from ..recipe.schema import Recipe
from .app import out


def show_downloads(recipe: Recipe, yes: bool) -> None:
    """Say what a recipe downloads; of a recipe from the Hub, ask whether to go on.

    Args:
        recipe: validated.
        yes: do not ask.

    Raises:
        DistillError: a repository is not there, private or gated; a stranger's recipe names pickled weights; nobody is
            there to answer.
    """
    from ..recipe.downloads import check_downloads, downloads

    found = downloads(recipe)
    if found:
        out.print(_table(found))
    if recipe.origin is None:
        return
    check_downloads(found)
    out.print(
        f"The recipe is {recipe.origin}; it writes to {recipe.train.output_dir}.", soft_wrap=True, highlight=False
    )
    if yes or os.environ.get("RANK", "0") != "0":
        return
    if not sys.stdin.isatty():
        raise DistillError("This recipe is a stranger's, and nobody is there to say yes: add --yes to run it.")
    typer.confirm("Download and run?", default=True, abort=True)


def _table(found: list[Any]) -> Table:
    table = Table(title="From the Hub", title_justify="left")
    for heading in ("repository", "for", "commit", "size", "to download"):
        table.add_column(heading, justify="right" if heading in ("size", "to download") else "left")
    for one in found:
        name = one.repo if one.kind == "model" else f"datasets/{one.repo}"
        commit = (one.revision or "newest")[:12]
        table.add_row(name, ", ".join(one.what), commit, _bytes(one.size), _bytes(one.missing))
    return table


def _bytes(count: int | None) -> str:
    """Of a size, in decimal units as the Hub shows them."""
    if count is None:
        return "offline"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"
