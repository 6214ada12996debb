import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hf_distill.cli import app, main
from hf_distill.recipe import list_recipes

runner = CliRunner()


def test_the_module_is_the_program():
    command = [sys.executable, "-m", "hf_distill", "rum"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "No such command" in done.stderr


def test_a_smoke_run_prints_the_table_and_exits_with_0(run_cli, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = run_cli("run", "quickstart", "--smoke", f"train.output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    for text in ("teacher", "student before", "student after", "control", "KL to the teacher", "Run folder"):
        assert text in done.stdout
    assert "Traceback" not in done.stderr
    assert "{'loss'" not in done.stdout
    resumed = run_cli("run", "quickstart", "--smoke", "--resume", f"train.output_dir={tmp_path / 'run'}")
    assert resumed.returncode == 0
    assert "complete already" in resumed.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quickstart", "train.lerning_rate=1"], "did you mean 'learning_rate'"),
        (["run", "nowhere.yaml"], "no recipe file"),
        (["recipes", "validate", "quickstart", "distill.alpha=3"], "less than or equal to 1"),
        (["recipes", "show", "quickstrat"], "did you mean 'quickstart'"),
        (["plan", "llama-70b-to-8b-zero3", "--gpus", "1"], "needs at least 2 processes"),
        (["plan", "llama-70b-to-8b-nf4", "--gpus", "0"], "gpus is 0; it must be above 0"),
        (["plan", "llama-70b-to-8b-nf5"], "did you mean 'llama-70b-to-8b-nf4'"),
        (["run"], "Missing argument"),
    ],
)
def test_wrong_input_exits_with_2_and_a_message_without_a_traceback(run_cli, arguments, message):
    done = run_cli(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_recipes_show_prints_plain_yaml_without_a_terminal(run_cli):
    from hf_distill.recipe.resolve import find_recipe

    assert run_cli("recipes", "show", "quickstart").stdout == find_recipe("quickstart").text


def test_recipes_list_validate_and_schema_print_their_results():
    listed = runner.invoke(app, ["recipes", "list"])
    assert all(name in listed.output for name in list_recipes())
    assert "valid" in runner.invoke(app, ["recipes", "validate", "quickstart", "--smoke"]).output
    import json

    assert "train" in json.loads(runner.invoke(app, ["recipes", "schema"]).output)["properties"]


@pytest.mark.parametrize("columns", [80, 120])
def test_plan_fits_the_terminal_and_shows_memory_cost_and_advice(run_cli, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    done = run_cli("plan", "llama-70b-to-8b-zero3", "--gpus", "8", "--gpu-memory", "80")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= columns
    texts = (">*zero3 + zero3", "nf4 + zero2", "torch's counter", "GPU-hours", "pretraining the student")
    for text in texts:
        assert text in done.stdout
    assert ("DeepSpeed" in done.stdout) == (columns == 120)


def test_the_console_reads_the_width_when_it_prints(monkeypatch):
    from hf_distill.cli.terminal import TextConsole

    monkeypatch.setenv("COLUMNS", "80")
    console = TextConsole()
    monkeypatch.setenv("COLUMNS", "120")
    assert console.width == 120


def test_plan_json_prints_only_json(run_cli):
    import json

    done = run_cli("plan", "quickstart", "--smoke", "--json", "--gpus", "2")
    plan = json.loads(done.stdout)
    (row,) = (row for row in plan["rows"] if row["is_recipe_strategy"])
    assert row["strategy"]["student"] == "ddp"
    assert row["total"] == sum(row["parts"].values()) - row["parts"]["host"]


def test_brackets_in_an_error_are_printed(monkeypatch, capsys):
    """`hf-distill[quant]` is a package to install, not markup."""
    from hf_distill import DistillError, cli

    def broken():
        raise DistillError('pip install "hf-distill[quant]", or [/this]')

    monkeypatch.setattr(cli, "program", broken)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert 'Error: pip install "hf-distill[quant]", or [/this]' in capsys.readouterr().err


def test_a_failed_run_exits_with_1(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the machine is on fire")

    monkeypatch.setattr("hf_distill.runner.run.run_recipe", broken)
    monkeypatch.setattr(sys, "argv", ["hf-distill", "run", "quickstart", "--smoke"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
