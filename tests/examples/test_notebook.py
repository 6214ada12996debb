"""The notebook of a first distillation runs from top to bottom, and is saved with the outputs of its code."""

import json
import re
from pathlib import Path

import matplotlib
import pytest
from tiny import build
from transformers import AutoModelForCausalLM

from hf_distill.recipe.smoke import byte_tokenizer

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_all_cells_run_and_the_student_approaches_its_teacher(tmp_path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    build("llama", 1, layers=4, vocab=len(tokenizer)).save_pretrained("teacher")
    tokenizer.save_pretrained("teacher")
    changes = {"TEACHER": "teacher", "STEPS": 30, "KEPT_LAYERS": 2, "MAX_LENGTH": 64, "HELD_OUT_ROWS": 4}
    names = {}
    for number, cell in enumerate(CODE):
        exec(compile(source(cell), f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert changes.keys() <= names.keys()
            names |= changes
    assert names["trainer"].state.global_step == 30
    assert 0 < names["after"]["eval_kl"] < names["before"]["eval_kl"]
    assert names["control_after"]["eval_kl"] != names["after"]["eval_kl"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / names["folder"]).config.num_hidden_layers == 2


def test_the_outputs_are_those_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from execute_notebook import DIGEST, digest_of

    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    assert json.loads(NOTEBOOK.read_text())["metadata"][DIGEST] == digest_of([source(cell) for cell in CODE])


def test_the_outputs_are_small_and_have_no_warnings_and_no_paths_of_a_machine():
    assert NOTEBOOK.stat().st_size < 200_000
    assert {output.get("name", "stdout") for output in OUTPUTS} == {"stdout"}
    assert {output["output_type"] for output in OUTPUTS} <= {"stream", "display_data"}
    assert [output for output in OUTPUTS if "image/png" in output.get("data", ())]
    texts = [text for output in OUTPUTS for key, text in output.get("data", output).items() if key != "image/png"]
    assert not re.search(
        r"(?<![\w.<}])/\w+/|[A-Z]:\\\\|warning", json.dumps([texts, [source(cell) for cell in CELLS]]), re.I
    )


@pytest.mark.parametrize(
    "cell", [cell for cell in CELLS if cell["cell_type"] == "markdown"], ids=lambda cell: cell["id"]
)
def test_links_of_the_notebook_lead_to_files(cell):
    for target in re.findall(r"\]\(([^)]+)\)", source(cell)):
        assert "://" in target or (NOTEBOOK.parent / target).exists(), target
