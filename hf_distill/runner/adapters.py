"""Checks which modules of a student get the adapters that its recipe names."""

import re

from torch import nn

from ..errors import DistillError

_ALL_LINEAR = "all-linear"  # of peft: every linear layer but the output head


def check_target_modules(model: nn.Module, target_modules: str | list[str]) -> None:
    """Check that `student.lora.target_modules` finds modules of the student; peft ignores names that find none.

    Args:
        model: The student without adapters.
        target_modules: all-linear; a list of names, each of which finds the modules with this name or with a path that
            ends with it; or a regular expression for full paths.

    Raises:
        DistillError: A name or the expression finds no module, or the expression is not valid.
    """
    if target_modules == _ALL_LINEAR:
        return
    paths = [path for path, _ in model.named_modules()]
    names = sorted({path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear)})
    possible = f"The linear layers of the student are {', '.join(names)}: name some of these, or give {_ALL_LINEAR}."
    if isinstance(target_modules, str):
        try:
            is_known = any(re.fullmatch(target_modules, path) for path in paths)
        except re.error as error:
            raise DistillError(
                f"student.lora.target_modules: {target_modules!r} is not a regular expression: {error}. {possible}"
            ) from None
        if not is_known:
            raise DistillError(
                f"student.lora.target_modules: {target_modules!r}, a regular expression for full paths, finds no "
                f"module of the student. {possible}"
            )
        return
    unknown = [name for name in target_modules if not any(f".{path}".endswith(f".{name}") for path in paths)]
    if unknown or not target_modules:
        given = f"the student has no module {' and no module '.join(unknown)}" if unknown else "the list is empty"
        raise DistillError(f"student.lora.target_modules: {given}. {possible}")
