"""The Typer app, its console, and the arguments that its commands share."""

import os
from typing import Annotated

import typer

from .terminal import TextConsole

app = typer.Typer(
    name="hf-distill",
    help="Distill language models with the Hugging Face Trainer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = TextConsole()

# Typer renders help texts as rich markup, so a bracket in a text needs a backslash.
Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help=r"Name of a packaged recipe, path of a .yaml file, or hf://org/name\[@revision]/file.yaml.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values of the recipe to override, such as train.max_steps=20."),
]
Smoke = Annotated[bool, typer.Option("--smoke", help="Replace the models by tiny random ones, to test the setup.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation of a recipe from the Hub.")]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow Python code from the repositories of the models.")
]
AllowPickles = Annotated[
    bool, typer.Option("--allow-pickles", help="Allow pickled weights; loading them can run arbitrary code.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print all results as JSON.")]


@app.callback(invoke_without_command=True)
def _start(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    out.quiet = os.environ.get("RANK", "0") != "0"  # only the first process prints; a command before may have set it
    if version:
        from ..version import __version__

        out.print(__version__)
        raise typer.Exit


def disable_library_progress_bars() -> None:
    """Disable the progress bars of datasets and transformers, so that only ours is shown."""
    from datasets import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
