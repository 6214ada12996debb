"""Private names of other libraries that this package uses are listed, and exist as they were when it was written."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from private_names import NAMES, PrivateName

import hf_distill
from hf_distill.trainer import upstream

ROOT = Path(hf_distill.__file__).parent
STANDARD_LIBRARY = {"_exit", "_current_frames", "_fields", "_replace"}
NO_NAMES_OF_LIBRARIES = {  # endings of metrics and options, prefixes, marks of this package
    "_entropy",
    "_id",
    "_layer_",
    "_layerdrop",
    "_forward_",
    "_backward_",
    "_loss",
    "_loss_",
    "_hf_distill_model_type",
}
GENERATED_BY_PYTHON = {"_abc_impl", "_backward_cls"}
WITHOUT_TRITON = "hf_distill.losses.kernels.row_kernel"


def problem_of(name: PrivateName) -> str | None:
    """What differs between a listed name and the installed library, as a sentence; None if nothing does."""
    full = f"{name.owner}.{name.name}"
    try:
        owner = name.find_owner()
    except (ImportError, AttributeError):
        return f"{name.owner} does not exist any more; hf_distill uses {full}: it {name.use}"
    value = getattr(owner, name.name, None)
    if name.parameters is None:
        is_known = hasattr(owner, name.name) or re.search(rf"\b{name.name}\b", inspect.getsource(owner))
        return None if is_known else f"{full} does not exist any more; check what uses it: it {name.use}"
    if value is None:
        return f"{full} does not exist any more; check what uses it: it {name.use}"
    actual = tuple(parameter for parameter in inspect.signature(value).parameters if parameter != "self")
    if actual == name.parameters:
        return None
    return (
        f"{full} has the parameters {actual}; hf_distill was written for {name.parameters}: "
        f"check what uses it: it {name.use}"
    )


OVERRIDDEN = [
    PrivateName(owner, name, "is overridden in hf_distill", parameters)
    for owner, table in {
        "transformers.Trainer": upstream.TRAINER,
        "transformers.Seq2SeqTrainer": upstream.SEQ2SEQ_TRAINER,
        "trl.DistillationTrainer": upstream.DISTILLATION_TRAINER,
    }.items()
    for name, parameters in table.items()
]


@pytest.mark.parametrize("name", [*NAMES, *OVERRIDDEN], ids=lambda name: f"{name.owner}.{name.name}")
def test_a_private_name_is_as_it_was_when_its_use_was_written(name):
    assert problem_of(name) is None, problem_of(name)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (PrivateName("transformers.Trainer", "_gone", "logs"), "Trainer._gone does not exist any more"),
        (PrivateName("transformers.Trainer", "_gone", "logs", ()), "Trainer._gone does not exist any more"),
        (PrivateName("transformers.Gone", "_gone", "logs"), "transformers.Gone does not exist any more"),
        (
            PrivateName("transformers.Trainer", "_get_output_dir", "finds", ("folder",)),
            r"has the parameters \('trial',\); hf_distill was written for \('folder',\): check what uses it: it finds",
        ),
    ],
)
def test_a_change_is_named_in_a_sentence(changed, sentence):
    assert re.search(sentence, problem_of(changed))


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name.isidentifier()


def names_of(tree: ast.AST) -> tuple[set[str], set[str]]:
    """The private names that a file uses and those that it defines."""
    used, defined = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute):
            is_own = isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls")
            (defined if is_own else used).add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            used.add(node.value)  # an argument of getattr, hasattr or a table of patches
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            used |= {alias.name for alias in node.names} | {*(node.module or "").split(".")}
    return {name for name in used if private(name)}, {name for name in defined if private(name)}


def listed_parts() -> set[str]:
    """All listed names, and the private parts of the modules that define them."""
    return {part for name in [*NAMES, *OVERRIDDEN] for part in (*name.owner.split("."), name.name)}


def test_no_private_name_of_a_library_is_used_without_being_listed():
    per_file = {path: names_of(ast.parse(path.read_text())) for path in ROOT.rglob("*.py")}
    defined = set().union(*(names for _, names in per_file.values()))
    known = defined | listed_parts() | STANDARD_LIBRARY | NO_NAMES_OF_LIBRARIES
    unlisted = {(str(path.relative_to(ROOT)), name) for path, (used, _) in per_file.items() for name in used - known}
    assert not unlisted, "list these names in tests/trainer/private_names.py"


def test_no_listed_name_is_unused():
    text = "\n".join(path.read_text() for path in ROOT.rglob("*.py"))
    starts = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks"}  # found by their beginning
    unused = {name.name for name in NAMES if not re.search(rf"\b{name.name}\b", text)} - starts
    assert not unused, "delete these names from tests/trainer/private_names.py"


def subclasses_of_libraries() -> Iterator[tuple[type, list[type], list[type]]]:
    """Classes of this package that derive from a class of a library, with their own bases and the libraries'."""
    for module in pkgutil.walk_packages(hf_distill.__path__, "hf_distill."):
        if module.name.endswith("__main__") or module.name == WITHOUT_TRITON:
            continue
        for cls in vars(importlib.import_module(module.name)).values():
            if not inspect.isclass(cls) or cls.__module__ != module.name:
                continue
            own = [base for base in cls.__mro__ if base.__module__.startswith("hf_distill")]
            libraries = [base for base in cls.__mro__ if base not in own and is_of_library(base)]
            if libraries:
                yield cls, own, libraries


def is_of_library(base: type) -> bool:
    return base.__module__.partition(".")[0] not in sys.stdlib_module_names


def test_no_private_name_of_a_base_class_is_overridden_or_used_without_being_listed():
    unlisted = set()
    for cls, own, libraries in subclasses_of_libraries():
        names = set().union(*(attributes(base) for base in own)) & set().union(
            *(attributes(base) for base in libraries)
        )
        unlisted |= {(cls.__qualname__, name) for name in names - listed_parts() - GENERATED_BY_PYTHON}
    assert not unlisted, "list these names in trainer/upstream.py (overridden) or tests/trainer/private_names.py (used)"


def attributes(cls: type) -> set[str]:
    """The private names that a class defines, or reads and sets on `self`."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        source = ""
    return {name for name in {*vars(cls), *re.findall(r"\bself\.(_\w+)", source)} if private(name)}
