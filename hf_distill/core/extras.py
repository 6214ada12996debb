"""The optional packages that a recipe needs, as extras of the pip package. Imports no torch."""

from collections.abc import Iterator
from typing import cast

from .json_types import JSON, JSONObject


def install_command(recipe: JSONObject) -> str:
    """Return the command that installs the package with the extras that a recipe certainly needs.

    The format of the data is not known, so that trl, which reads conversations, may be needed too.

    Args:
        recipe: the values of a recipe.
    """
    extras = sorted({extra for extra, is_needed in _needed_extras(recipe) if is_needed})
    return f'pip install "hf-distill[{",".join(extras)}]"' if extras else "pip install hf-distill"


def _needed_extras(recipe: JSONObject) -> Iterator[tuple[str, bool]]:
    student, data, generate = (_section(recipe.get(name)) for name in ("student", "data", "generate"))
    teachers = [_section(recipe.get("teacher"))]
    teachers += [_section(teacher) for teacher in cast(list[JSON], recipe.get("teachers") or [])]
    yield "torchao", bool(student.get("quantize"))
    yield "peft", bool(student.get("lora"))
    yield "trl", bool(recipe.get("on_policy")) or bool(data.get("packing"))
    yield "vllm", generate.get("backend") == "vllm"
    yield "generate", bool(generate.get("filters"))
    for model in (student, *teachers, *(_section(teacher.get("source")) for teacher in teachers)):
        yield "quant", bool(model.get("quantization"))
        yield "gguf", str(model.get("model")).endswith(".gguf")
        yield "deepspeed", bool(model.get("deepspeed"))


def _section(value: JSON) -> JSONObject:
    return value if isinstance(value, dict) else {}
