"""Random mutations of recipes, as text and as `key=value`, and the response of the command line to them."""

import contextlib
import io
import random
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_distill import DistillError
from hf_distill.cli import main
from hf_distill.recipe import list_recipes, load_recipe
from hf_distill.recipe.resolve import find_recipe

RECIPES = [yaml.safe_load(find_recipe(name).text) for name in list_recipes()]
# YAML that replaces a value.
VALUES = [
    *(".nan", ".inf", "-.inf", "1e999", "'nan'", "'inf'", "'1e999'", "-1", "0", "1.5", "1e-400", "'2'", "1_000"),
    *("true", "false", "no", "null", "~", "[true, false]", "[[0, true], [1, .nan]]", "[]", "{}", "[[]]", "''", "' '"),
    *("2147483648", "4294967296", "18446744073709551616", "-9223372036854775809", "9" * 5000, f"-{'9' * 5000}"),
    *(f"'{'9' * 5000}'", f"'{'1' * 300}'", f"0x{'f' * 5000}", f"0b{'1' * 6000}", f"{'1:' * 2000}59", f"{'9' * 400}.0"),
    *("!!bool maybe", "!!bool ''", "!!int x", "!!int ''", "!!int '-'", "!!int 0x", "!!float ''", "!!float x"),
    *("!!float 1:x", "!!float '-'", f"!!float {'9' * 400}:1.5", "!!null x", "!!timestamp 2001-01-01", "2001-01-01"),
    *("!!binary aGk=", "!!set {a: null}", "!!omap [a: 1]", "!!python/object:os.system x", "!x y", "!!str [a]"),
    *(
        '"\\0"',
        '"a\\0b"',
        '"\\uD800"',
        '"a\\uDC00"',
        '"\\e[31m"',
        '"\\x9b"',
        '"\\u202e"',
        '"\\n"',
        "'[/b]x'",
        "'[red]'",
    ),
    *("a" * 300, "a/" * 3000, "é" * 200, "'~/x'", "'~'", "/nowhere/x", "../x", "./x", ".", "/", "x.jsonl", "hf://a"),
    *("package:x", "package:", "smoke:x/y", "hf://datasets/a/b@c/d.jsonl", "'{{ x }}'", "=", "auto", "zero3.json"),
    *("{1: 2}", "{null: 1}", "{true: 1}", "{1.5: x}", "{[a]: b}", "&a [*a]", "*nope", "{<<: 5}", "{<<: {a: 1}}"),
    *("{name: js, beta: 2}", "{name: js, beta: true}", "{name: js, beta: '0.5'}", "{name: js, beta: .nan}"),
    *("{name: skew_kl, lam: 1}", "{name: forward_kl, temperature: 0}", "{name: 5}", "{name: [js]}", "{name: null}"),
    *("{name: cross_entropy}", "{name: hidden_mse, layers: [[0, true]]}", "[{name: hidden_mse, stack: x}]", "[{}]"),
    *("{model: x, kind: ema}", "{kind: cached, path: x}", "{path: x, weight: [[0, 1], [1, true]]}", "{path: [x]}"),
    *("{keep: used}", "{keep: 0}", "{keep: [used]}", "{target_parameters: 80M}", "{target_parameters: -1K}", "{by: x}"),
    *(
        "{scheme: int4_weight_only, group_size: 0}",
        "{scheme: x}",
        "{scheme: nvfp4, group_size: .nan}",
        "{generate: true}",
    ),
    *(
        "{hidden_size: 1, keep_layers: .inf}",
        "{teacher: {loss: sft}}",
        "{column: score, temperature: 0}",
        "[{name: x}]",
    ),
    *(
        "{samples: 0, filters: [length]}",
        "{backend: vllm, cache: top_k}",
        "{url: 'http://[::1', model: 5}",
        "full_precision",
    ),
    *("[{student: {model: x}}]", "[{student: {model: x}, train: {lerning_rate: 1}}]", "{zero_optimization: []}"),
]
KEYS = [
    "model",
    "path",
    "train",
    "losses",
    "seed",
    "layers",
    "stages",
    "teachers",
    "extends",
    "requires",
    "on_policy",
    "from_teacher",
    "quantize",
    "vocab",
]
KEYS += ["generate", "by_origin", "loss_weight", "cross_tokenizer", "control", "url"]
ODD_KEYS = [
    "1",
    "null",
    "true",
    "''",
    "'a.b'",
    '"\\0"',
    '"\\uD800"',
    '"\\e[2J"',
    "a" * 300,
    "'[/x]'",
    ".nan",
    "<<",
    "é",
]


@dataclass(frozen=True)
class Mutation:
    """The bytes of a recipe file, and overrides on the command line."""

    text: bytes
    overrides: list[str]


def locations(value: Any, location: tuple = ()) -> Iterator[tuple]:
    """Paths of all values inside a value."""
    yield location
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from locations(item, (*location, key))


def mutated(seed: int) -> Mutation:
    """Return a packaged recipe with other values and keys, with changed bytes, or with unusual overrides."""
    draw = random.Random(seed)
    kind = draw.choice(["values", "values", "values", "bytes", "overrides"])
    if kind == "overrides":
        recipe = draw.choice(RECIPES)
        overrides = [_override(draw, recipe) for _ in range(draw.randint(1, 3))]
        return Mutation(yaml.safe_dump(recipe).encode(), overrides)
    text = _text(draw, deepcopy(draw.choice(RECIPES)), draw.randint(1, 3))
    return Mutation(_spoiled(draw, text.encode()) if kind == "bytes" else text.encode(), [])


def _text(draw: random.Random, recipe: dict, count: int) -> str:
    """Return YAML in which some values and keys are replaced by text that a YAML writer would not produce."""
    marks = {}
    for number in range(count):
        *above, last = draw.choice([location for location in locations(recipe) if location] or [("student",)])
        owner: Any = recipe
        for key in above:
            owner = owner[key]
        mark = f"MARK{number}"
        if draw.random() < 0.75 or not isinstance(owner, dict):
            owner[last], marks[mark] = mark, draw.choice(VALUES)
        elif draw.random() < 0.5:
            owner[mark], marks[mark] = (
                owner.pop(last),
                draw.choice([*KEYS, *ODD_KEYS, f"{last}x", f"{last}"[1:] or "q"]),
            )
        elif draw.random() < 0.5:
            owner[draw.choice(KEYS)], marks[mark] = mark, draw.choice(VALUES)
        else:
            del owner[last]
    text = yaml.safe_dump(recipe, allow_unicode=True, width=10**6)
    for mark, value in marks.items():
        text = text.replace(mark, value)
    return text


def _override(draw: random.Random, recipe: dict) -> str:
    location = [str(part) for part in draw.choice([location for location in locations(recipe) if location])]
    if draw.random() < 0.3:
        location[-1] = draw.choice([*KEYS, *ODD_KEYS])
    return f"{'.'.join(location)}{draw.choice(['=', '=', '=', '', '=='])}{draw.choice(VALUES)}"


def _spoiled(draw: random.Random, content: bytes) -> bytes:
    spoiled = bytearray(content)
    for _ in range(draw.randint(1, 5)):
        at = draw.randrange(len(spoiled))
        match draw.choice(["flip", "cut", "insert", "end"]):
            case "flip":
                spoiled[at] ^= 1 << draw.randrange(8)
            case "cut":
                del spoiled[at : at + draw.randint(1, 20)]
            case "insert":
                spoiled[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 6)))
            case "end":
                del spoiled[at:]
        spoiled = spoiled or bytearray(b"x")
    return bytes(spoiled)


def answer(*words: str) -> tuple[int, str]:
    """Return the exit code of `hf-distill` and everything that it prints, which must be valid UTF-8."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    before = sys.argv
    try:
        sys.argv = ["hf-distill", *words]
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main()
        code: Any = 0
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    printed.flush()
    return code or 0, printed.buffer.getvalue().decode()  # type: ignore[attr-defined]


def fault(mutation: Mutation, file: Path) -> str | None:
    """Return what is wrong with the response of `recipes validate` to a mutation; None if it is correct."""
    file.write_bytes(mutation.text)
    try:
        code, printed = answer("recipes", "validate", str(file), *mutation.overrides)
        if code == 0:
            with contextlib.suppress(DistillError):
                load_recipe(str(file), mutation.overrides, smoke=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if code not in (0, 2) or "Traceback" in printed:
        return f"exit code {code}: {printed[-600:]}"
    lines = printed.splitlines()
    if code == 2 and not any(line.strip().removeprefix("Error:").strip() for line in lines):
        return "it is refused without a reason"
    if any(len(line) > 2000 for line in lines):
        return f"a line of {max(map(len, lines))} characters"
    odd = {character for character in printed if ord(character) < 32 or 127 <= ord(character) < 160} - {"\n", "\t"}
    return f"control characters {sorted(odd)} are printed" if odd else None
