"""recipes list, show, pull, validate, preview, schema."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ...core.references import is_file
from ...errors import DistillError
from ..app import Overrides, Recipe, Smoke, Yes, app, disable_library_progress_bars, out
from ..confirm import confirm_downloads
from ..terminal import write_text

recipes = typer.Typer(help="Look at recipes and check them.", no_args_is_help=True)
app.add_typer(recipes, name="recipes")


@recipes.command("list")
def list_command(
    where: Annotated[
        str | None, typer.Argument(metavar="[HUB]", help="hf://org/name[@revision][/folder]; by default the packaged.")
    ] = None,
) -> None:
    """Recipes, each with its first line: the packaged ones, or those of a repository."""
    from ...recipe.resolve import list_recipes

    found = list_recipes()
    if where is not None:
        from ...hub import format_uri, parse_uri
        from ...recipe.hub_recipes import list_remote

        known = {parse_uri(at): title for at, title in list_remote(where).items()}
        out.print(Text(format_uri(replace(next(iter(known)), path_in_repo="")), "dim"), soft_wrap=True)
        found = {at.path_in_repo: title for at, title in known.items()}
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    for name, title in found.items():
        table.add_row(Text(name, "bold"), Text(title))
    out.print(table)


@recipes.command()
def show(recipe: Recipe) -> None:
    """The YAML of a recipe; raw where it is piped."""
    from ...recipe.resolve import find_recipe

    text = find_recipe(recipe).text
    if out.is_terminal:
        from rich.syntax import Syntax

        out.print(Syntax(text, "yaml", background_color="default"))
    else:
        write_text(text)


@recipes.command()
def pull(
    recipe: Annotated[str, typer.Argument(metavar="HUB", help="hf://org/name[@revision]/file.yaml")],
    to: Annotated[str, typer.Option("-o", "--output", help="Folder to put it into.")] = ".",
    force: Annotated[bool, typer.Option("--force", help="Write over files that are there.")] = False,
) -> None:
    """Copy a recipe from the Hub, checked, with the DeepSpeed files that it names: from then on it is yours."""
    from ...recipe.hub_recipes import pull_recipe

    for path in pull_recipe(recipe, to, force):
        out.print(str(path), soft_wrap=True, highlight=False)


@recipes.command()
def validate(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE]... [KEY=VALUE]...", help="As for run; by default all packaged recipes."),
    ] = None,
    smoke: Smoke = False,
) -> None:
    """Check recipes, and that the files, folders and packages they name exist, without loading anything."""
    from ...recipe.load import load_recipe
    from ...recipe.local_files import missing_files
    from ...recipe.problems import raise_problems
    from ...recipe.resolve import list_recipes

    overrides = [word for word in words or () if "=" in word and not is_file(Path(word))]
    given = [word for word in words or () if word not in overrides]
    wrong: list[str] = []
    for name in given or list_recipes():
        try:
            loaded = load_recipe(name, overrides, smoke=smoke)
            # Packaged recipes name models of packages that are installed only where they are used.
            if problems := missing_files(loaded.model_dump()) if given else []:
                raise_problems(problems, "in the recipe")
        except DistillError as error:
            wrong.append(f"{name}: {error}" if len(given) != 1 else str(error))
        else:
            out.print(f"{name} is a valid recipe.")
    if wrong:
        raise DistillError("\n".join(wrong))


@recipes.command()
def preview(
    recipe: Recipe,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 3,
    smoke: Smoke = False,
    yes: Yes = False,
) -> None:
    """The first rows of a recipe as training sees them: what is asked is green, or between «» where it is piped."""
    from ...recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], smoke=smoke)
    confirm_downloads(recipe, loaded, yes)
    from ...runner.preview import preview_rows

    disable_library_progress_bars()
    for document in preview_rows(loaded, rows):
        counts = (
            f"row {document.row} · {document.source} · {document.tokens} tokens · {document.num_targets} target tokens"
        )
        out.print(counts, style="bold", highlight=False)
        if out.is_terminal:
            out.print(Text.assemble(*((text, "green" if asked else "dim") for text, asked in document.spans)))
        else:
            write_text("".join(f"«{text}»" if asked else text for text, asked in document.spans) + "\n")


@recipes.command()
def schema() -> None:
    """The JSON Schema of recipes, for editors."""
    from ...recipe.losses import packaged_schema

    sys.stdout.write(json.dumps(packaged_schema(), indent=2) + "\n")
