"""Evaluation of a generated data set: what the filters took, diversity, lengths and examples, for its card and reports.

Imports no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..core.json_types import JSONObject
from ..filters import StepCount
from ..filters.diversity import measure_completions
from ..filters.rows import Row, completion_text, prompt_text
from .prompts import REFERENCE

GENERATED, KEPT, REFERENCES = "generated", "kept", "references"  # parts of a data set that are measured
_EXAMPLES, _EXAMPLE_CHARACTERS, _BINS = 3, 1_500, 24


@dataclass(frozen=True)
class Example:
    """A completion, for a reader.

    prompt:     text of the prompt
    completion: text of the teacher's completion
    reference:  text of the completion in the data; None if it has none
    removed_by: name of the filter or selection that removed it; None for a kept completion
    """

    prompt: str
    completion: str
    reference: str | None
    removed_by: str | None


@dataclass(frozen=True)
class Histogram:
    """Numbers of completions by their length in tokens.

    edges:  the B + 1 edges of the bins, in ascending order; the last bin includes its upper edge
    counts: GENERATED (if there are filters) and KEPT -> numbers of completions in the B bins
    """

    edges: list[float]
    counts: dict[str, list[int]]


@dataclass(frozen=True)
class Evaluation:
    """Measures of a generated data set.

    model:    name of the teacher, without local folders
    filters:  counts of each filter, the selection last; see `StepCount.as_json`
    measures: GENERATED (all completions, if there are filters), KEPT (the rows of the data set), REFERENCES (the data's
              completions of the same prompts, if they all have one) -> measures; see `measure_completions`
    lengths:  numbers of generated tokens
    examples: of kept completions, and of those that each filter removed
    """

    model: str
    filters: list[dict[str, Any]]
    measures: dict[str, dict[str, Any]]
    lengths: Histogram
    examples: list[Example]

    def as_json(self) -> JSONObject:
        """Return the values for JSON."""
        return asdict(self)


def evaluate_data_set(model: str, rows: Sequence[Row], kept: Sequence[Row], counts: Sequence[StepCount]) -> Evaluation:
    """Measure a data set and choose examples.

    Self-BLEU is None if sacrebleu is not installed.

    Args:
        model: name of the teacher.
        rows: all completions, before the filters.
        kept: the rows of the data set.
        counts: counts of the filters, whose examples are positions in `rows`.
    """
    parts: dict[str, Sequence[Row]] = {GENERATED: rows, KEPT: kept} if counts else {KEPT: kept}
    if references := _references(rows):
        parts[REFERENCES] = references
    with_bleu = find_spec("sacrebleu") is not None
    return Evaluation(
        model,
        [count.as_json() for count in counts],
        {name: measure_completions(part, with_bleu) for name, part in parts.items()},
        token_histogram({name: part for name, part in parts.items() if name != REFERENCES}),
        _examples(rows, kept, counts),
    )


def measures_table(measures: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return measures as a table for readers: headings of the parts, and rows of a title with a text for each part.

    Args:
        measures: see `Evaluation.measures`.
    """
    rows = [[title, *(format_measure(part) for part in measures.values())] for title, format_measure in _ROWS.items()]
    return [TITLES[name] for name in measures], [row for row in rows if {*row[1:]} != {"-"}]


def _mean(part: Mapping[str, Any], name: str) -> str:
    return f"{part[name]['mean']:,.1f}" if part.get(name) else "-"


def _percentiles(part: Mapping[str, Any], name: str) -> str:
    return " / ".join(f"{part[name][key]:,.0f}" for key in ("p10", "p50", "p90")) if part.get(name) else "-"


def _number(part: Mapping[str, Any], name: str, digits: int) -> str:
    return "-" if part.get(name) is None else f"{part[name]:,.{digits}f}"


TITLES = {GENERATED: "generated", KEPT: "kept", REFERENCES: "in the data"}
_ROWS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "rows": partial(_number, name="rows", digits=0),
    "prompts": partial(_number, name="prompts", digits=0),
    "tokens, mean": partial(_mean, name="tokens"),
    "tokens, 10 / 50 / 90 %": partial(_percentiles, name="tokens"),
    "characters, mean": partial(_mean, name="characters"),
    "characters, 10 / 50 / 90 %": partial(_percentiles, name="characters"),
    **{f"distinct-{n}": partial(_number, name=f"distinct_{n}", digits=3) for n in (1, 2, 3)},
    "self-BLEU of the samples of a prompt": partial(_number, name="self_bleu_of_samples", digits=1),
    "self-BLEU of completions of different prompts": partial(_number, name="self_bleu_of_prompts", digits=1),
}


def token_histogram(parts: Mapping[str, Sequence[Row]]) -> Histogram:
    """Count completions by their number of tokens, in bins of equal width from 0 to the largest number.

    Args:
        parts: name of a part -> its rows.
    """
    lengths = {name: [int(str(row["tokens"])) for row in part] for name, part in parts.items()}
    longest = max(1, *(max(values, default=1) for values in lengths.values()))
    edges = np.linspace(0, longest, _BINS + 1)
    counts = {name: np.histogram(values, edges)[0].tolist() for name, values in lengths.items()}
    return Histogram(edges.tolist(), counts)


def _references(rows: Sequence[Row]) -> list[Mapping[str, object]]:
    """Return a row with the data's completion for each prompt; none if a prompt has no completion."""
    first = [row for row in rows if not row.get("sample")]
    if any(row.get(REFERENCE) is None for row in first):
        return []
    return [
        {"prompt": row["prompt"], "source": row.get("source"), "row": row.get("row"), "completion": row[REFERENCE]}
        for row in first
    ]


def _examples(rows: Sequence[Row], kept: Sequence[Row], counts: Sequence[StepCount]) -> list[Example]:
    number = min(_EXAMPLES, len(kept))
    examples = [_example(kept[i * len(kept) // number], None) for i in range(number)]
    return examples + [_example(rows[position], count.label) for count in counts for position in count.examples]


def _example(row: Row, removed_by: str | None) -> Example:
    reference = row.get(REFERENCE)
    return Example(
        _clip(prompt_text(row)),
        _clip(completion_text(row)),
        None if reference is None else _clip(str(reference)),
        removed_by,
    )


def _clip(text: str) -> str:
    """Return a text of limited length; the middle of a longer one is left out."""
    if len(text) <= _EXAMPLE_CHARACTERS:
        return text
    half = _EXAMPLE_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
