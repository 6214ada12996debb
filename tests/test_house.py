"""The house keeps its shape: imports point one way, and importing costs nothing."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import hf_distill

ROOT = Path(hf_distill.__file__).parent
# Lower floors first; a module may import from its own floor and from those below.
FLOORS = [
    {"version", "errors", "names", "escape"},
    {"hub", "locks", "processes", "local_paths", "upstream", "module_state", "finite_weights"},
    {"sources", "layers", "options", "projectors", "schedule", "zero", "kinds", "label_shift"},
    {"signals", "tasks"},
    {"losses", "blocks"},
    {"objective", "capture", "sidecar", "mtp", "model_call"},
    {"statistics"},
    {"sweep", "features", "aux_losses", "output_head"},
    {"head", "forward", "student", "speculative"},
    {"data", "cache"},
    {"teachers"},
    {"distiller"},
    {"config", "by_source"},
    {"evidence", "finite", "weights", "interrupts"},
    {"checkpoints"},
    {
        "arguments",
        "changed_arguments",
        "teacher_callback",
        "card",
        "saving",
        "selfcheck",
        "finite_trainer",
        "sidecar_trainer",
        "metrics_trainer",
        "weights_trainer",
    },
    {"trainer_facts"},
    {"hub_trainer"},
    {"trainer"},
    {"trl"},
    {"recipe"},
    {"running"},
    {"progress"},
    {"planning"},
    {"analysis"},
    {"publishing"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}


def imports_of(path: Path) -> set[str]:
    """Top-level parts of the package that a file imports, wherever in the file."""
    package = ("hf_distill", *path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = package[: len(package) - node.level + 1]
        target = (*base, *(node.module or "").split(".")) if node.module else base
        names = [target[1]] if len(target) > 1 else [alias.name for alias in node.names]
        found |= set(names)
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports_of(path) - {part, "__version__"}:
        assert FLOOR[name] < FLOOR[part], f"{path.name} ({part}) imports {name}, which is not below it"


def test_files_and_functions_stay_small():
    for path in ROOT.rglob("*.py"):
        assert path.read_text().count("\n") <= 400, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 60, f"{path}: {node.name}"


def test_importing_the_package_imports_no_torch():
    code = "import sys, hf_distill; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_recipes_are_read_and_checked_without_torch():
    modules = [f"hf_distill.recipe.{path.stem}" for path in (ROOT / "recipe").glob("[a-z]*.py")]
    code = f"import sys, {', '.join(modules)}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_is_there_and_an_unknown_one_is_told():
    for name in hf_distill.__all__:
        assert getattr(hf_distill, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'DistilTrainer'"):
        _ = hf_distill.DistilTrainer


def test_the_wheel_holds_recipes_and_cards_and_no_package_called_recipes(tmp_path):
    import zipfile

    root = ROOT.parent
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(root),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "hf_distill/recipes/quickstart.yaml" in names
    assert "hf_distill/recipe/schema.json" in names
    assert "hf_distill/planning/shapes.json" in names
    assert "hf_distill/py.typed" in names
    assert {name.split("/")[0] for name in names if not name.startswith("hf_distill-")} <= {
        "hf_distill",
        "hf_distill.egg-info",
    }


@pytest.mark.parametrize("path", sorted((ROOT.parent / "benchmarks").glob("*.py")), ids=lambda p: p.name)
def test_benchmarks_name_what_is_there(path):
    """They run seldom, so that a move would be noticed late."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_distill"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
