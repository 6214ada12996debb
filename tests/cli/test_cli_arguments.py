"""Every command shows its help, and ends with exit code 2 and a message for missing or wrong arguments."""

import pytest
import typer
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.cli import app


def commands(group, parents=()):
    """Yield (names, whether it needs an argument) of every command."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*parents, name))
        else:
            yield (*parents, name), any(p.param_type_name == "argument" and p.required for p in command.params)


ALL = list(commands(typer.main.get_command(app)))
WRONG = [["--nope"], ["no-such-thing"], ["no-such-file.yaml"], ["", ""], ["\x00"], ["hf://"], ["x" * 5000]]
WRONG += [["quickstart", "=="]]


def refused(arguments: list[str]) -> str:
    """Run a command that must end with exit code 2; return what it prints."""
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, DistillError):  # which the program turns into a message and exit code 2
        return str(result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, (arguments, result.output)
    return result.output


@pytest.mark.parametrize("command", [command for command, needs_argument in ALL if needs_argument], ids=" ".join)
def test_a_missing_argument_is_named(command):
    assert "Missing argument" in refused([*command])


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: " ".join(w)[:20].replace("\x00", "nul"))
@pytest.mark.parametrize("command", [command for command, _ in ALL], ids=" ".join)
def test_wrong_arguments_are_refused_with_a_message(command, wrong, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # `serve` looks for a model of this name
    assert refused([*command, *wrong]).strip()
    assert not list(tmp_path.iterdir()), "a file was written"


@pytest.mark.parametrize("command", [(), *(command for command, _ in ALL)], ids=" ".join)
def test_the_help_of_a_command_shows_brackets(command):
    """Typer reads `[@revision]` as markup, and `[/folder]` as an error, unless it is escaped."""
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.exception
    assert ("hf://" in result.output) == ("[@revision]" in result.output)
