"""`torch_compile` of a trainer: compiles the transformer layers of the student, and of frozen teachers if requested.

A Trainer lets accelerate compile the whole model when it prepares it. A trainer that distills compiles the layers
itself and keeps accelerate from compiling; `models/compilation.py` gives the reason.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn
from transformers import TrainingArguments

from ..core.loss_kinds import EMBEDDING
from ..errors import DistillError, raise_if_any
from ..losses.objective import Term
from ..models.compilation import compile_blocks, compiled_around_head, compiled_modules, transformer_blocks
from ..models.model_types import is_zero3_partitioned, unwrap_model
from ..teachers import FrozenTeacher, Teacher
from ..teachers.group import teachers_by_name

# PyTorch keeps the graphs of all layers in one list: of students and teachers, for training and evaluation, and for
# different shapes. It runs layers eagerly beyond this number, which by default is 8.
MAX_GRAPHS = 64
_ZERO3 = (
    "hooks of DeepSpeed gather the weights of each module and change in each step, so that the layers would be "
    "compiled again and again"
)


def compile_options(args: TrainingArguments) -> dict[str, Any] | None:
    """Return the arguments of `torch.compile` for the layers; None if nothing is compiled.

    As in a Trainer, the settings of `accelerate launch` and `accelerate config` apply if an argument is not set.
    """
    plugin = TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    if plugin.backend is DynamoBackend.NO:
        return None
    return {
        "backend": plugin.backend.value.lower(),
        "mode": plugin.mode,
        "fullgraph": plugin.fullgraph,
        "dynamic": plugin.dynamic,
        "recompile_limit": MAX_GRAPHS,
    }


@contextmanager
def whole_model_uncompiled(accelerator: Accelerator) -> Iterator[None]:
    """Keep accelerate from compiling the whole model when it prepares it in a `with` block."""
    state = accelerator.state  # shared by all accelerators of the process
    before, state.dynamo_plugin = state.dynamo_plugin, TorchDynamoPlugin(backend="no")
    try:
        yield
    finally:
        state.dynamo_plugin = before


def compile_student(student: nn.Module, args: TrainingArguments) -> None:
    """Compile the layers of a student in place if `torch_compile` is set."""
    options = compile_options(args)
    if options is not None:
        compile_blocks(student, options)


def compile_frozen_teachers(teacher: Teacher, args: TrainingArguments) -> None:
    """Compile the layers of prepared frozen teachers in place if `compile_teacher` is set.

    Raises:
        DistillError: no teacher is a frozen model, or its layers are not found.
    """
    options = compile_options(args) if getattr(args, "compile_teacher", False) else None
    if options is None:
        return
    frozen = {name: each for name, each in teachers_by_name(teacher).items() if isinstance(each, FrozenTeacher)}
    if not frozen:
        raise DistillError(
            f"compile_teacher compiles frozen models, and {type(teacher).__name__} has none. Set compile_teacher=False"
        )
    problems = []
    for name, each in frozen.items():
        owner = "the teacher" if name is None else f"the teacher {name}"
        if is_zero3_partitioned(each.model):
            problems.append(
                f"compile_teacher: {owner} is sharded with ZeRO-3, where {_ZERO3}. Shard it with FSDP2, or set "
                "compile_teacher=False"
            )
            continue
        try:
            compile_blocks(each.model, options)
        except DistillError as error:
            problems.append(
                f"compile_teacher: the transformer layers of {owner} are not found ({error}). Set compile_teacher=False"
            )
    raise_if_any(problems)


def incompatible_compilation(student: nn.Module, args: TrainingArguments) -> list[str]:
    """Return why a student cannot be trained with its compiled modules and the arguments of compilation."""
    if names := compiled_around_head(student):
        part = f"{names[0]} of the student" if names[0] else "the student"
        return [
            f"{part} is compiled. A compiled output head does not see that its forward is replaced in "
            "each step, and torch.compile(module) changes the names of weights in checkpoints. Pass the student "
            "without compilation, and set torch_compile=True, which compiles its transformer layers"
        ]
    options = compile_options(args)
    if options is None:
        is_unused = getattr(args, "compile_teacher", False)
        return ["compile_teacher=True needs torch_compile=True. Set it, or remove compile_teacher"] if is_unused else []
    plugin = getattr(args, "deepspeed_plugin", None)
    if is_zero3_partitioned(student) or (plugin is not None and plugin.zero_stage == 3):
        return [f"torch_compile does not work with ZeRO-3: {_ZERO3}. Use ZeRO-2 or FSDP2, or set torch_compile=False"]
    try:
        blocks = transformer_blocks(student)
    except DistillError as error:
        return [f"torch_compile compiles transformer layers, and those of the student are not found: {error}"]
    compiled = compiled_modules(student)
    if outside := [name for name, module in compiled.items() if not any(module is block for block in blocks)]:
        return [
            f"torch_compile compiles the transformer layers of the student, but its {outside[0]} is compiled already. "
            "Pass the student without compilation, or remove torch_compile"
        ]
    return _backend_problems(options, args.device)


def _backend_problems(options: dict[str, Any], device: torch.device) -> list[str]:
    """Compile a small function: a backend looks for its compiler and checks its options only when it compiles."""
    try:
        torch.compile(lambda x: x + 1, **options)(torch.zeros(8, device=device))
    except Exception as error:  # of PyTorch, the backend, Triton or the C compiler
        cause = getattr(error, "inner_exception", error)
        reason = f"{type(cause).__name__}: {cause}".strip().splitlines()[0]
        return [
            f"torch_compile_backend={options['backend']!r} with torch_compile_mode={options['mode']!r} fails on "
            f"{device.type} ({reason}). Install what it needs (inductor needs a C compiler, and on a GPU Triton), use "
            "another backend or mode, or set torch_compile=False"
        ]
    return []


def incompatible_features(
    terms: Sequence[Term], student: nn.Module, teacher: Teacher, args: TrainingArguments
) -> list[str]:
    """Return why losses on features do not work with compilation.

    Args:
        terms: the terms of the student's objective.
        student: the student.
        teacher: the teacher.
        args: the training arguments.
    """
    names = ", ".join(term.name for term in terms if term.loss.feature not in (None, EMBEDDING))
    if not names:
        return []
    reason = (
        f"{names}: these losses read hidden states and attention inside the layers, where a compiled graph hides them"
    )
    if compile_options(args) is not None:
        return [f"torch_compile does not work with {reason}. Set torch_compile=False, or remove these losses"]
    models = {"student": student} | {
        "teacher" if name is None else f"teacher {name}": each.model
        for name, each in teachers_by_name(teacher).items()
        if each.model is not None
    }
    return [
        f"the {owner}'s {next(iter(compiled))} is compiled, which does not work with {reason}. Pass a {owner} that is "
        "not compiled (an earlier trainer with torch_compile compiles its models), or remove these losses"
        for owner, model in models.items()
        if (compiled := compiled_modules(unwrap_model(model)))
    ]
