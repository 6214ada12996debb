"""Show what a recipe downloads, and ask for confirmation if it comes from the Hub."""

import os
import sys
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from ..errors import DistillError
from ..recipe.local_files import missing_files
from ..recipe.problems import raise_problems
from ..recipe.resolve import on_the_hub
from ..recipe.schema import Recipe
from .app import out

if TYPE_CHECKING:
    from ..recipe.downloads import Download


def confirm_downloads(reference: str, recipe: Recipe, yes: bool, show: bool = False) -> None:
    """Show what a recipe from the Hub downloads and ask whether to continue.

    Args:
        reference: the reference of the recipe; a local file is trusted.
        recipe: the validated recipe.
        yes: do not ask.
        show: also show what a local recipe downloads.

    Raises:
        DistillError: a file or folder that the recipe names is missing; a repository is missing, private or gated; an
            untrusted recipe names pickled weights; stdin is not a terminal.
    """
    if problems := missing_files(recipe.model_dump()):
        raise_problems(problems, "in the recipe")
    is_untrusted = on_the_hub(reference)
    if not is_untrusted and (not show or out.quiet):  # the first process of a launch asks the Hub, and shows the table
        return
    from ..recipe.downloads import check_downloads, downloads

    repositories = downloads(recipe)
    if repositories:
        out.print(_table(repositories))
    if not is_untrusted:
        return
    check_downloads(repositories)
    out.print(
        f"The recipe {recipe.origin} writes its results to {recipe.train.output_dir}.", soft_wrap=True, highlight=False
    )
    if yes or os.environ.get("RANK", "0") != "0":
        return
    if not sys.stdin.isatty():
        raise DistillError("This recipe comes from the Hub and stdin is not a terminal: pass --yes to confirm.")
    typer.confirm("Download and continue?", default=True, abort=True)


def _table(repositories: "list[Download]") -> Table:
    table = Table(title="Repositories on the Hub", title_justify="left")
    for heading in ("repository", "used for", "commit", "size", "to download"):
        table.add_column(heading, justify="right" if heading in ("size", "to download") else "left")
    for download in repositories:
        name = download.repo if download.kind == "model" else f"datasets/{download.repo}"
        commit = (download.revision or "newest")[:12]
        table.add_row(
            name, ", ".join(download.used_for), commit, format_bytes(download.size), format_bytes(download.missing)
        )
    return table


def format_bytes(count: int | None) -> str:
    """Format a number of bytes in decimal units, as the Hub does."""
    if count is None:
        return "offline"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"
