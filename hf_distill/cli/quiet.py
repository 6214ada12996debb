"""Silence warnings of other packages that a user of the program cannot act on, unless `--verbose` is passed."""

import logging
import warnings
from typing import TYPE_CHECKING, Annotated

import typer
from typer.main import get_command

if TYPE_CHECKING:
    from typer._click import Command, Parameter

# DeepSpeed logs the accelerator that it selected, bitsandbytes and torchao the kernels that are missing. transformers
# imports torchao where it is installed, which registers constants of its own in PyTorch's pytree.
_LOGGERS = ("DeepSpeed", "bitsandbytes", "torchao", "torch.utils._pytree")
_PACKAGES = r"(torch|transformers|accelerate|datasets|deepspeed|bitsandbytes|peft|trl|triton|torchao)(\.|$)"
_CATEGORIES = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def silence_other_packages() -> None:
    """Silence warnings of other packages; their errors and the log of transformers are still shown."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        logger.addFilter(_is_error)  # DeepSpeed sets its level when it is imported
    for category in _CATEGORIES:
        warnings.filterwarnings("ignore", category=category, module=_PACKAGES)


def restore_other_packages() -> None:
    """Undo `silence_other_packages`."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.NOTSET)
        logger.removeFilter(_is_error)
    for category in _CATEGORIES:
        warnings.filterwarnings("default", category=category, module=_PACKAGES)


def add_verbose(command: "Command") -> "Command":
    """Add `--verbose` to a command and all its subcommands.

    Args:
        command: the result of `typer.main.get_command`.
    """
    command.params.append(_verbose_option())
    for sub in getattr(command, "commands", {}).values():
        add_verbose(sub)
    return command


def _verbose_option() -> "Parameter":
    """Return the option that Typer makes from the parameter of a command."""
    option_app = typer.Typer(add_completion=False)

    @option_app.command()
    def _command(
        verbose: Annotated[
            bool,
            typer.Option(
                "--verbose",
                help="Also show warnings of other packages.",
                is_eager=True,
                expose_value=False,
                callback=lambda value: restore_other_packages() if value else None,
            ),
        ] = False,
    ) -> None:
        pass

    return next(option for option in get_command(option_app).params if option.name == "verbose")
