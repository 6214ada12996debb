"""The package: imports point one way, and importing it loads no torch."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import hf_distill

ROOT = Path(hf_distill.__file__).parent
# From the lowest layer to the highest: a module may import from its own layer and from those before it.
LAYERS = [
    {"version", "errors", "lazy_imports"},
    {"core"},
    {"hub"},
    {"layers"},
    {"losses"},
    {"head"},
    {"models"},
    {"student", "model_types"},
    {"data", "cache"},
    {"filters"},
    {"teachers"},
    {"generation"},
    {"model_card"},
    {"trainer"},
    {"trl"},
    {"recipe"},
    {"runner"},
    {"serving"},
    {"planning"},
    {"analysis"},
    {"report"},
    {"publishing"},
    {"cli"},
    {"__init__", "__main__"},
]
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
# Public names that a package imports from a later one when they are first used.
RE_EXPORTED = {("recipe", "runner")}


def module_of(path: Path) -> tuple[str, ...]:
    """The package that a file is in, as a path from the root of the repository."""
    return ("hf_distill", *path.relative_to(ROOT).parts[:-1])


def absolute(name: str, package: tuple[str, ...]) -> list[str]:
    """An imported module's full name, in parts: `..core.io` in `hf_distill.cache` is `hf_distill.core.io`."""
    level = len(name) - len(name.lstrip("."))
    rest = [part for part in name.lstrip(".").split(".") if part]
    return [*package[: len(package) - level + 1], *rest] if level else rest


def imports_of(path: Path) -> set[str]:
    """Top-level parts of the package that a file imports, by any statement anywhere in the file."""
    package = module_of(path)
    tree = ast.parse(path.read_text())
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            dot = "" if base.endswith(".") else "."
            names += [base + dot + alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif path == ROOT / "lazy_imports.py":
            continue  # it imports names that the packages also import under TYPE_CHECKING
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names += _called_with(node.args[0])
    modules = [absolute(name, package) for name in names]
    return {parts[1] for parts in modules if parts[0] == "hf_distill" and len(parts) > 1}


def _called_with(argument: ast.expr) -> list[str]:
    """The name that `import_module` is called with."""
    assert isinstance(argument, ast.Constant), f"{ast.unparse(argument)}: only lazy_imports.py imports by a variable"
    return [argument.value]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports_of(path) - {part, "__version__"}:
        if path.name == "__init__.py" and (part, name) in RE_EXPORTED:
            continue
        assert LAYER[name] < LAYER[part], f"{path.relative_to(ROOT)} imports {name}, which is not below {part}"


@pytest.mark.parametrize(
    "source",
    [
        "import hf_distill.cli.app",
        "from hf_distill import cli",
        "from ..cli.app import app",
        "from .. import cli",
        "import_module('hf_distill.cli')",
        "__import__('hf_distill.cli')",
    ],
)
def test_all_forms_of_imports_are_recognized(source, monkeypatch):
    path = ROOT / "cache" / "imports.py"
    monkeypatch.setattr(Path, "read_text", lambda self: source)
    assert imports_of(path) == {"cli"}


def test_importing_the_package_does_not_import_torch():
    code = "import sys, hf_distill; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_recipes_are_validated_without_importing_torch():
    modules = [f"hf_distill.recipe.{path.stem}" for path in (ROOT / "recipe").glob("[a-z]*.py")]
    code = f"import sys, {', '.join(modules)}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names_exist_and_an_unknown_name_is_an_attribute_error():
    for name in hf_distill.__all__:
        assert getattr(hf_distill, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'DistilTrainer'"):
        _ = hf_distill.DistilTrainer


@pytest.mark.parametrize("package", ["", "analysis", "planning", "recipe", "report", "trainer"])
def test_type_checkers_see_every_name_that_is_imported_on_first_use(package):
    module = importlib.import_module(f"hf_distill.{package}".rstrip("."))
    tree = ast.parse(Path(module.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = {
        alias.asname: (importlib.import_module("." * node.level + node.module, module.__name__), alias.name)
        for node in block.body
        for alias in node.names
    }
    assert {*imported} == {*module._HOME}
    for name, (home, original) in imported.items():
        assert getattr(home, original) is getattr(module, name)


@pytest.mark.parametrize("path", sorted((ROOT.parent / "benchmarks").rglob("*.py")), ids=lambda p: p.name)
def test_benchmarks_import_existing_names(path):
    """Benchmarks run rarely, so a renamed module would be noticed late."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_distill"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
