"""The commands recipes list, show, pull, validate, preview and schema."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ...core.defaults import PREVIEWED_ROWS
from ...core.references import is_file
from ...errors import DistillError
from ..app import Overrides, Recipe, Smoke, TrustRemoteCode, Yes, app, disable_library_progress_bars, out
from ..confirm import confirm_downloads
from ..terminal import write_text

recipes = typer.Typer(help="List, show, validate and preview recipes.", no_args_is_help=True)
app.add_typer(recipes, name="recipes")


@recipes.command("list")
def list_command(
    where: Annotated[
        str | None,
        typer.Argument(metavar="HUB", help=r"hf://org/name\[@revision]\[/folder]; by default the packaged recipes."),
    ] = None,
) -> None:
    """List the packaged recipes, or those of a repository, with a short description."""
    from ...recipe.resolve import list_recipes

    titles = list_recipes()
    if where is not None:
        from ...hub import format_uri, parse_uri
        from ...recipe.hub_recipes import list_remote

        remote = {parse_uri(uri): title for uri, title in list_remote(where).items()}
        out.print(Text(format_uri(replace(next(iter(remote)), path_in_repo="")), "dim"), soft_wrap=True)
        titles = {uri.path_in_repo: title for uri, title in remote.items()}
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    for name, title in titles.items():
        table.add_row(Text(name, "bold"), Text(title))
    out.print(table)


@recipes.command()
def show(recipe: Recipe) -> None:
    """Show the YAML of a recipe."""
    from ...recipe.resolve import find_recipe

    text = find_recipe(recipe).text
    if out.is_terminal:
        from rich.syntax import Syntax

        out.print(Syntax(text, "yaml", background_color="default"))
    else:
        write_text(text)


@recipes.command()
def pull(
    recipe: Annotated[str, typer.Argument(metavar="HUB", help=r"hf://org/name\[@revision]/file.yaml")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder to write it to.")] = ".",
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Validate a recipe from the Hub and copy it to a folder, with the DeepSpeed files that it names."""
    from ...recipe.hub_recipes import pull_recipe

    for path in pull_recipe(recipe, output, force):
        out.print(str(path), soft_wrap=True, highlight=False)


@recipes.command()
def validate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE|KEY=VALUE", help="Recipes and overrides; by default all packaged recipes."),
    ] = None,
    smoke: Smoke = False,
) -> None:
    """Check recipes, and that the files, folders and packages that they name exist; loads no model."""
    from ...recipe.load import load_recipe
    from ...recipe.local_files import missing_caches, missing_files
    from ...recipe.plain_yaml import short_text
    from ...recipe.problems import raise_problems
    from ...recipe.resolve import list_recipes

    overrides = [argument for argument in arguments or () if "=" in argument and not is_file(Path(argument))]
    names = [argument for argument in arguments or () if argument not in overrides]
    errors: list[str] = []
    for name in names or list_recipes():
        try:
            loaded = load_recipe(name, overrides, smoke=smoke)
            # Packaged recipes name models of packages that may not be installed, so they are checked only if named.
            if problems := missing_files(loaded.model_dump()) if names else []:
                raise_problems(problems, "in the recipe")
        except DistillError as error:
            errors.append(f"{short_text(name)}: {error}" if len(names) != 1 else str(error))
        else:
            out.print(f"{name} is a valid recipe.")
            for line in missing_caches(loaded, shlex.join([name, *overrides])) if names else []:
                out.print(line, soft_wrap=True, highlight=False, markup=False)
    if errors:
        raise DistillError("\n".join(errors))


@recipes.command()
def preview(
    recipe: Recipe,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of rows.")] = PREVIEWED_ROWS,
    smoke: Smoke = False,
    yes: Yes = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show the first training rows of a recipe, with target tokens in green, or between «» without a terminal."""
    from ...recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], smoke=smoke)
    confirm_downloads(recipe, loaded, yes)
    from ...runner.model_loading import LoadPolicy, load_policy
    from ...runner.preview import preview_rows

    disable_library_progress_bars()
    with load_policy(LoadPolicy(trust_remote_code)):
        documents = preview_rows(loaded, rows)
    for document in documents:
        out.print(f"row {document.row} · {document.source} · {document.counts}", style="bold", highlight=False)
        if out.is_terminal:
            out.print(Text.assemble(*((text, "green" if is_target else "dim") for text, is_target in document.spans)))
        else:
            write_text("".join(f"«{text}»" if is_target else text for text, is_target in document.spans) + "\n")


@recipes.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from ...recipe.losses import packaged_schema

    sys.stdout.write(json.dumps(packaged_schema(), indent=2) + "\n")
