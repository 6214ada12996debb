"""The figures that pages quote, listed in tests/figures/*.yaml, and those that look measured.

A list has a page and `measured`: groups of entries with the JSON `file` (in benchmarks/results; its keys are names, and
`file` is all of it) or several named `files` (a pattern gives a list), `names` for repeated expressions, and `figures`.
An entry has the quoted `text` with its figures in braces, and `values`: an expression for each (expressions.py),
evaluated in the file, or in the part of it that `at` selects (a list is named `row`). `not_measured` lists quoted texts
whose figures are no results, by category.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from expressions import evaluate, format_like

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# Why the figures of a text need no JSON.
NOT_MEASURED = {
    "arithmetic": "follows from sizes that the text states",
    "bound of a test": "the bound that a test of the suite asserts",
    "code": "constant, default or limit of the code",
    "definition": "defines a term or a format",
    "example": "invented for an example",
    "other software": "default, limit or version of other software",
    "paper": "a figure of a paper that the text names",
    "recipe": "setting of a recipe or of an experiment",
    "estimate": "an expectation that the text marks as such",
    "not recorded": "measured in a run whose results.json was not kept; to be measured again",
    "plan": "printed by `hf-distill plan`",
    "requirement": "memory or hardware that suffices",
    "target": "a figure that was aimed at",
}


@dataclass(frozen=True)
class Entry:
    """A quoted text of a page and where its figures come from."""

    page: str
    text: str
    files: dict[str, str]  # "": the only file, whose keys are names
    values: tuple[str, ...]
    names: dict[str, str] = field(default_factory=dict, hash=False)
    at: str = ""

    def __str__(self) -> str:
        return f"{self.page}: {self.quoted[:50]}"

    @property
    def quoted(self) -> str:
        return re.sub(r"[{}]", "", self.text)

    @property
    def figures(self) -> list[str]:
        return re.findall(r"\{([^}]*)\}", self.text)

    def computed(self) -> list[str]:
        """The figures as the JSON gives them, formatted as they are quoted."""
        names = self._names()
        return [
            format_like(quoted, evaluate(value, names)) for quoted, value in zip(self.figures, self.values, strict=True)
        ]

    def _names(self) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for name, pattern in self.files.items():
            data = read(pattern)
            names |= {name: data} if name else {**data, "file": data}
        for name, expression in self.names.items():
            names[name] = evaluate(expression, names)
        if self.at:
            row = evaluate(self.at, names)
            names |= {"row": row} if isinstance(row, list) else row
        return names


@cache
def read(pattern: str) -> Any:
    """A file of results, or the list of those that a pattern names."""
    paths = sorted(RESULTS.glob(pattern))
    if not paths:
        raise LookupError(f"no file {pattern} in {RESULTS.relative_to(ROOT)}")
    contents = [json.loads(path.read_text()) for path in paths]
    return contents if "*" in pattern else contents[0]


def lists() -> list[dict[str, Any]]:
    """A list of each page; a file has one list or several."""
    return [listed for path in sorted(HERE.glob("*.yaml")) for listed in yaml.safe_load_all(path.read_text())]


def entries() -> Iterator[Entry]:
    for listed in lists():
        for group in listed.get("measured", []):
            files = group["files"] if "files" in group else {"": group["file"]}
            for figure in group["figures"]:
                yield Entry(
                    listed["page"],
                    figure["text"],
                    files,
                    tuple(figure["values"]),
                    group.get("names", {}),
                    figure.get("at", ""),
                )


def exemptions() -> Iterator[tuple[str, str, str]]:
    """Page, category and quoted text of the figures that are not measured."""
    for listed in lists():
        for category, texts in listed.get("not_measured", {}).items():
            for text in texts:
                yield listed["page"], category, text


def occurrences(text: str, page: str, any_figures: bool = False) -> list[re.Match[str]]:
    """Where a page has a text, whose figures may be in braces; each of them is a group. Line breaks do not count."""
    pattern = re.escape(re.sub(r"\s+", " ", text.strip()))
    group = r"(\\d[\\d.,e-]*)" if any_figures else r"(\1)"
    pattern = re.sub(r"\\\{(.*?)\\\}", group, pattern).replace("\\ ", r"\s+(?:#\s+)?")
    return list(re.finditer(rf"(?<![\d.,]){pattern}(?![\d]|[.,]\d)", page))


_NUMBER = r"(?<![\w.,:/=<>])(?<!\w-)(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?"
_UNIT = (
    r"(?:times|x|%|[kMGT]i?B|ms|µs|(?:CPU )?(?:seconds?|minutes|hours)|s|tokens (?:per|a) second|tok/s|tokens/s|"
    r"nats?|bits per byte|[kM]bit/s|points)"
)
_WITH_UNIT = re.compile(rf"({_NUMBER})\s+{_UNIT}(?![\w/])|({_NUMBER})(?:%|x)(?!\w)")
_CODE = re.compile(r"^```.*?^```|^(?: {4}|\t)\S.*?$|`[^`\n]*`|\]\([^)]*\)|\b\d{4}\.\d{4,5}\b", re.M | re.S)
_SOFTWARE = (
    r"TRL(?:'s chunked loss)?|torch|PyTorch|transformers|Python|vLLM|SGLang|Liger|Triton|CUDA|version|Llama|Gemma|Qwen|"
    r"bitsandbytes|torchao|datasets|accelerate|DeepSpeed|peft|GPT|lm-eval"
)
_VERSION = re.compile(rf"\b(?:{_SOFTWARE}|T) ?(?:= )?-?\d[\d.]*\w*")


def looks_measured(page: str) -> Iterator[re.Match[str]]:
    """Figures with a unit, and decimals, outside code, links and versions."""
    text = page
    for pattern in (_CODE, _VERSION):
        text = pattern.sub(lambda match: re.sub(r"[^\n|]", " ", match[0]), text)
    found = {match.start(): match for match in _WITH_UNIT.finditer(text)}
    found |= {match.start(): match for match in re.finditer(rf"{_NUMBER}(?![\w])", text) if is_decimal(match[0])}
    yield from (found[start] for start in sorted(found))


def difference(entry: Entry, page: str) -> str:
    """What is wrong with an entry, given the text of its page: the page, or the list, differs from the JSON."""
    if len(entry.figures) != len(entry.values):
        return f"{entry.page}: {entry.quoted!r} has {len(entry.figures)} figures and {len(entry.values)} values"
    computed, problems = entry.computed(), []
    if entry.figures != computed:
        problems.append(f"listed are {entry.figures}, {', '.join(entry.files.values())} gives {computed}")
    if not occurrences(entry.text, page):
        others = [list(match.groups()) for match in occurrences(entry.text, page, any_figures=True)]
        problems.append(f"the page has {others}, the JSON {computed}" if others else "the page does not have this text")
    return f"{entry.page}: {entry.quoted!r}: {'; '.join(problems)}" if problems else ""


def unlisted(text: str, listed: Iterable[Entry], not_measured: Iterable[str]) -> list[str]:
    """The figures of a text that look measured and are not in an entry, with their line."""
    covered: set[int] = set()
    for entry in listed:
        for match in occurrences(entry.text, text):
            covered |= {at for group in range(len(entry.figures)) for at in range(*match.span(group + 1))}
    for quoted in not_measured:
        for match in occurrences(quoted, text):
            covered |= set(range(*match.span()))
    return [
        f"line {text.count(chr(10), 0, found.start()) + 1}: {text[max(0, found.start() - 40) : found.end() + 30]!r}"
        for found in looks_measured(text)
        if found.start() not in covered
    ]


def is_decimal(figure: str) -> bool:
    return "." in figure or "e" in figure
