"""Figures are computed from JSON by a small language: paths, filters of lists, arithmetic and a few functions.

models.student.perplexity                       keys; on a list, the values of all its items
runs[0].seconds, models["a-b"].kl               an item by number, a key that is no name
cases[who == "ours", chunk == 64].seconds       the only item with these values, or a list of several
    cases[who == "ours", chunk == None]             the items without a chunk
100 * (a / b - 1), median(runs.seconds)         arithmetic on numbers and lists of numbers; FUNCTIONS
"""

import ast
import math
import operator
import statistics
from collections.abc import Callable, Mapping
from typing import Any

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "len": len,
    "max": max,
    "mean": statistics.mean,
    "median": statistics.median,
    "min": min,
    "round": round,
    "sum": sum,
    "exp": math.exp,
    "log": math.log,
    # Bounds such as "at most 2e-7" are the computed value, rounded up or down.
    "ceil": lambda value, digits: math.ceil(value * 10**digits) / 10**digits,
    "floor": lambda value, digits: math.floor(value * 10**digits) / 10**digits,
    "keys": list,
    "values": lambda mapping: list(mapping.values()),
    "flat": lambda lists: [item for items in lists for item in items],
}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def evaluate(expression: str, names: Mapping[str, Any]) -> Any:
    """The value of an expression over the names of JSON values."""
    return _value(ast.parse(expression.strip(), mode="eval").body, names)


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return names[node.id]
        case ast.Attribute():
            return _member(_value(node.value, names), node.attr)
        case ast.Subscript(slice=ast.Compare() | ast.Tuple()):
            return _filtered(_value(node.value, names), node.slice, names)
        case ast.Subscript():
            return _member(_value(node.value, names), _value(node.slice, names))
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, names)
        case ast.BinOp() if type(node.op) in OPERATORS:
            return _arithmetic(OPERATORS[type(node.op)], _value(node.left, names), _value(node.right, names))
        case ast.Call(func=ast.Name(id=name)) if name in FUNCTIONS and not node.keywords:
            return FUNCTIONS[name](*(_value(argument, names) for argument in node.args))
    raise ValueError(f"not part of the language of figures: {ast.unparse(node)}")


def _member(value: Any, key: str | int) -> Any:
    if isinstance(value, list) and isinstance(key, str):
        return [item[key] for item in value]
    return value[key]


def _filtered(items: list[Any], conditions: ast.expr, names: Mapping[str, Any]) -> Any:
    """The only item that meets all conditions, or the list of those that do."""
    for condition in conditions.elts if isinstance(conditions, ast.Tuple) else [conditions]:
        match condition:
            case ast.Compare(left=ast.Name(id=key), ops=[ast.Eq() | ast.NotEq() as sign], comparators=[right]):
                wanted, equal = _value(right, names), isinstance(sign, ast.Eq)
                items = [item for item in items if (item.get(key) == wanted) is equal]
            case _:
                raise ValueError(f"a filter is KEY == VALUE or KEY != VALUE, not {ast.unparse(condition)}")
    if not items:
        raise LookupError(f"no item has {ast.unparse(conditions)}")
    return items[0] if len(items) == 1 else items


def _arithmetic(operation: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    if isinstance(left, list) and isinstance(right, list):
        return [operation(one, other) for one, other in zip(left, right, strict=True)]
    if isinstance(left, list):
        return [operation(one, right) for one in left]
    if isinstance(right, list):
        return [operation(left, other) for other in right]
    return operation(left, right)


def format_like(quoted: str, value: float) -> str:
    """The value with the decimals, the thousands separator and the exponent of a quoted figure."""
    digits = quoted.lower().partition("e")[0].partition(".")[2]
    kind = "e" if "e" in quoted.lower() else "f"
    text = f"{value:{'+' if quoted.startswith('+') else ''}{',' if ',' in quoted else ''}.{len(digits)}{kind}}"
    mantissa, exponent = text.split("e") if kind == "e" else (text, "")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa
