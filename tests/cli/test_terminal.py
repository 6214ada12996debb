"""Commands print text: markup, emoji codes and escape sequences in names and files are not interpreted."""

import io
import re
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

import hf_distill
from hf_distill.cli import app, main
from hf_distill.cli.app import out
from hf_distill.cli.progress import RichProgress
from hf_distill.cli.terminal import TextConsole

NAMES = ["runs/a[/b]x", "[bold]x[/bold]", "[link=https://evil.example]x[/link]", ":smile:", "a\\[b]", "[red"]
ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e"
RECIPE = "extends: quickstart\ntrain: {max_steps: 2}\n"


def printed(*things, terminal: bool = False, **options) -> str:
    file = io.StringIO()
    TextConsole(file=file, force_terminal=terminal, width=200, color_system=None).print(*things, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_markup_in_names_is_printed_and_not_interpreted(name):
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    assert printed(name).strip() == name
    assert printed(table).count(name) == 3
    assert printed(Text(name, "bold")).strip() == name


@pytest.mark.parametrize("terminal", [False, True])
def test_escape_sequences_are_removed(terminal):
    table = Table()
    table.add_row(f"cell{ESCAPES}")
    for thing in (f"line{ESCAPES}", Text(f"text{ESCAPES}", "bold"), table):
        shown = printed(thing, terminal=terminal)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown), repr(shown)
        assert re.search("line|text|cell", shown)
    assert "\x1b[1m" in TextConsoleWithColor().printed(Text("bold", "bold")), "styles of the program are kept"


class TextConsoleWithColor(TextConsole):
    def __init__(self):
        super().__init__(file=io.StringIO(), force_terminal=True, color_system="truecolor")

    def printed(self, thing) -> str:
        self.print(thing)
        return self.file.getvalue()


def test_markup_in_stages_and_losses_is_printed_and_not_interpreted():
    console = TextConsole(file=io.StringIO(), width=200)
    with RichProgress(console) as progress:
        for name in NAMES:
            progress.log_stage(f"{name}{ESCAPES}")
        progress._start("training", 3)
        progress.on_log(None, None, None, logs={"loss": 1.0, "[/b]_loss": 1.0})
    lines = console.file.getvalue().splitlines()
    assert [line.removeprefix("· ") for line in lines[: len(NAMES)]] == [f"{name}[2J]0;title31m" for name in NAMES]


@pytest.mark.parametrize("folder", ["a[/b]x", "[red]", ":smile:"])
def test_a_path_that_looks_like_markup_is_printed(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir(parents=True)
    Path(folder, "r.yaml").write_text(RECIPE)
    result = CliRunner().invoke(app, ["recipes", "validate", f"{folder}/r.yaml"])
    assert result.exit_code == 0, result.exception
    assert f"{folder}/r.yaml is a valid recipe." in result.output.replace("\n", "")


@pytest.mark.parametrize("command", [["show"], ["preview", "teacher.model=smoke:llama/teacher"]])
def test_escape_sequences_in_recipes_and_rows_are_removed(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.txt").write_text("\n\n".join(f"Paragraph {i} {ESCAPES} of text that is long enough" for i in range(20)))
    data = "data: {task: {path: rows.txt}, eval: {holdout: 0.2}}\n"
    Path("r.yaml").write_text(f"# title \u202e\x9b31m\n{RECIPE}{data}" if command == ["show"] else RECIPE + data)
    result = CliRunner().invoke(app, ["recipes", command[0], "r.yaml", *command[1:]])
    assert result.exit_code == 0, result.exception
    assert ("quickstart" if command == ["show"] else "Paragraph") in result.output
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", result.output)


def test_a_command_prints_after_one_that_printed_json(tmp_path, monkeypatch):
    monkeypatch.setattr(out, "quiet", True)  # as `hf-distill diagnose --json` leaves it
    Path(tmp_path, "r.yaml").write_text(RECIPE)
    result = CliRunner().invoke(app, ["recipes", "validate", f"{tmp_path}/r.yaml"])
    assert "is a valid recipe" in " ".join(result.output.split())


def test_escape_sequences_in_errors_are_removed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hf-distill", "recipes", "show", f"no[/b]such{ESCAPES}.yaml"])
    with pytest.raises(SystemExit):
        main()
    error = capsys.readouterr().err
    assert "no[/b]such" in error
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", error)


def test_no_module_uses_another_console():
    for path in Path(hf_distill.__file__).parent.rglob("*.py"):
        assert path.name == "terminal.py" or not re.search(r"(?<!Text)\bConsole\(", path.read_text()), path
