"""A default that several interfaces have (recipe, config, function, command) is declared once."""

import ast
from collections import defaultdict
from pathlib import Path

import hf_distill

ROOT = Path(hf_distill.__file__).parent


def literal_defaults(tree: ast.Module):
    """Yield (name, value) of each parameter and field whose default is a literal number or word.

    False, True, 0, 1 and empty texts are not counted: they turn something off or on, or change nothing.
    """
    for node in ast.walk(tree):
        pairs: list[tuple[str, ast.expr | None]] = []
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            positional = [*arguments.posonlyargs, *arguments.args]
            first = len(positional) - len(arguments.defaults)
            pairs += zip([one.arg for one in positional[first:]], arguments.defaults, strict=True)
            pairs += zip([one.arg for one in arguments.kwonlyargs], arguments.kw_defaults, strict=True)
        elif isinstance(node, ast.ClassDef):
            fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
            pairs += [(one.target.id, one.value) for one in fields]
        for name, value in pairs:
            if isinstance(value, ast.Call) and getattr(value.func, "id", "") in ("Field", "field"):
                keywords = {keyword.arg: keyword.value for keyword in value.keywords}
                value = value.args[0] if value.args else keywords.get("default")
            if isinstance(value, ast.Constant) and value.value not in (None, Ellipsis, "", 0, 1):
                yield name, value.value


def test_no_default_is_declared_in_two_modules():
    modules = defaultdict(set)
    for path in ROOT.rglob("*.py"):
        for name, value in literal_defaults(ast.parse(path.read_text())):
            modules[name, value].add(path.relative_to(ROOT).as_posix())
    repeated = {default: paths for default, paths in modules.items() if len(paths) > 1}
    assert not repeated
