"""Warnings of other packages that a user of the program cannot act on: silenced unless `--verbose` is given."""

import logging
import warnings
from typing import Annotated, Any

import typer
from typer.main import get_command

# DeepSpeed names the accelerator that it chose, bitsandbytes the kernels that it does not have.
_LOGGERS = ("DeepSpeed", "bitsandbytes")
_PACKAGES = r"(torch|transformers|accelerate|datasets|deepspeed|bitsandbytes|peft|trl|triton)(\.|$)"
_CATEGORIES = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def silence_other_packages() -> None:
    """Leave out warnings of other packages; their errors stay, and so does transformers' log."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        logger.addFilter(_is_error)  # DeepSpeed sets its level when it is imported
    for category in _CATEGORIES:
        warnings.filterwarnings("ignore", category=category, module=_PACKAGES)


def hear_other_packages() -> None:
    """Undo `silence_other_packages`."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.NOTSET)
        logger.removeFilter(_is_error)
    for category in _CATEGORIES:
        warnings.filterwarnings("default", category=category, module=_PACKAGES)


def add_verbose(command: Any) -> Any:
    """Give `--verbose` to a command and all its subcommands.

    Args:
        command: what `typer.main.get_command` returns.
    """
    command.params.append(_verbose_option())
    for sub in getattr(command, "commands", {}).values():
        add_verbose(sub)
    return command


def _verbose_option() -> Any:
    """The option as typer makes it of a command's argument."""
    maker = typer.Typer(add_completion=False)

    @maker.command()
    def _command(
        verbose: Annotated[
            bool,
            typer.Option(
                "--verbose",
                help="Show warnings of other packages too.",
                is_eager=True,
                expose_value=False,
                callback=lambda value: hear_other_packages() if value else None,
            ),
        ] = False,
    ) -> None:
        pass

    return next(option for option in get_command(maker).params if option.name == "verbose")
