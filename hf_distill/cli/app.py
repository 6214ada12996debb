"""The program, its console, and the arguments that its commands share."""

from typing import Annotated

import typer

from .terminal import TextConsole

app = typer.Typer(
    name="hf-distill",
    help="Distil language models with the Hugging Face Trainer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = TextConsole()

Recipe = Annotated[str, typer.Argument(help="A packaged name, a .yaml file, or hf://org/name[@revision]/file.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.max_steps=20.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Tiny random models of the same families: proves the plumbing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before a recipe from the Hub is read.")]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Everything that was found, as JSON.")]


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Say the version.")] = False) -> None:
    if version:
        from ..version import __version__

        out.print(__version__)
        raise typer.Exit


def disable_library_progress_bars() -> None:
    """Leave the terminal to our own progress."""
    from datasets import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
