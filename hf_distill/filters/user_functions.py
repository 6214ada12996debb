"""Functions of the user, named as `module:function`, and the filter that calls one. Imports no torch."""

import math
import os
import re
import sys
from collections.abc import Callable
from numbers import Real
from pkgutil import resolve_name
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from ..errors import DistillError, did_you_mean
from .base import RowFilter, Verdict
from .rows import Row

SCORE = "score"
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def check_function_name(name: str) -> str:
    """Return the name of a function of the user.

    Raises:
        ValueError: it does not have the form module:function.
    """
    if not _FUNCTION.fullmatch(name):
        raise ValueError("give a function as module:function, such as checks:is_polite")
    return name


FunctionName = Annotated[str, AfterValidator(check_function_name)]


def load_function(name: str) -> Callable[[Row], Any]:
    """Import a function of the user.

    The module may be a file in the current folder, an installed one, or one on PYTHONPATH.

    Args:
        name: `module:function`.

    Raises:
        DistillError: the module cannot be imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = resolve_name(module_name)
    except Exception as error:
        raise DistillError(
            f"The module of {name!r} cannot be imported ({type(error).__name__}: {error}). Give module:function, with "
            f"a module that is a file in {os.getcwd()}, is installed, or is on PYTHONPATH."
        ) from error
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DistillError(
            f"The module {module_name} has no function {function_name!r}{did_you_mean(function_name, functions)}"
        )
    return function


def finite_score(value: object, name: str) -> float:
    """Return a score as a float.

    Args:
        value: the score.
        name: what returned it, for the message.

    Raises:
        ValueError: it is not a finite number.
    """
    value = _as_python(value)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"the score by {name} is {value!r}; a score must be a finite number")
    return float(value)


def _as_python(value: Any) -> object:
    """Return numbers and booleans of numpy and torch as those of Python."""
    return value.item() if hasattr(value, "item") else value


class FunctionFilter(RowFilter):
    """Calls a function of the user, `function(row)`, which returns whether the row is kept, or a score.

    A score is stored in the column `score`, and the row is kept if the score is at least `min_score`. Rows for which
    the function raises an exception are set aside. Not allowed in recipes from the Hub.
    """

    name: Literal["function"] = "function"
    function: FunctionName = Field(description="The function as module:function. It gets a row, a dict of columns.")
    min_score: float | None = Field(
        None, description="Minimum score of a row, if the function returns scores. Default (null): no minimum."
    )

    @property
    def label(self) -> str:
        """The name in counts and messages."""
        return f"function {self.function}"

    @property
    def added_columns(self) -> tuple[str, ...]:
        """The columns that it may add to the rows."""
        return (SCORE,)

    def start(self) -> Callable[[Row], Verdict]:
        """Return the function that judges the rows of one data set in order."""
        function = load_function(self.function)

        def judge(row: Row) -> Verdict:
            result = function(dict(row))
            result = _as_python(result)
            if isinstance(result, bool):
                if self.min_score is not None:
                    raise TypeError(f"{self.function} returned {result}; with min_score it must return a number")
                return result
            score = finite_score(result, self.function)
            return {SCORE: score} if self.min_score is None or score >= self.min_score else False

        return judge
