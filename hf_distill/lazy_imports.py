"""Public names that are imported when they are first used, so that importing a package loads no torch."""

from collections.abc import Callable, Mapping
from importlib import import_module


def import_on_first_use(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """Return the `__getattr__` of a package, which imports the module of a name when the name is first used.

    Type checkers cannot follow it, so the package also imports the same names under `TYPE_CHECKING`.

    Args:
        package: name of the package.
        modules: public name -> the module that defines it, relative to the package, such as ".config".

    Returns:
        a function of a name. It raises an AttributeError for a name without a module.
    """

    def get_attribute(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name], package), name)

    return get_attribute
