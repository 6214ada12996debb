"""Every command, with no arguments and with wrong ones, answers with exit code 2 and words."""

import pytest
import typer
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.cli import app


def commands(group, above=()):
    """(words, whether it needs an argument) of every command."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*above, name))
        else:
            yield (*above, name), any(p.param_type_name == "argument" and p.required for p in command.params)


ALL = list(commands(typer.main.get_command(app)))
WRONG = [["--nope"], ["no-such-thing"], ["no-such-file.yaml"], ["", ""], ["\x00"], ["hf://"], ["x" * 5000]]
WRONG += [["quickstart", "=="]]


def refused(words: list[str]) -> str:
    """What is said; the exit code is 2."""
    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, DistillError):  # which the program turns into words and exit code 2
        return str(result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, (words, result.output)
    return result.output


@pytest.mark.parametrize("words", [words for words, needs in ALL if needs], ids=" ".join)
def test_without_arguments_the_missing_one_is_named(words):
    assert "Missing argument" in refused([*words])


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: " ".join(w)[:20].replace("\x00", "nul"))
@pytest.mark.parametrize("words", [words for words, _ in ALL], ids=" ".join)
def test_wrong_arguments_are_told(words, wrong, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert refused([*words, *wrong]).strip()
    assert not list(tmp_path.iterdir()), "something was written"
