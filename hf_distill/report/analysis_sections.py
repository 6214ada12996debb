"""Sections of a report with the results of the analysis commands."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from ..analysis.agreement import Part
from ..analysis.curve import Curve
from ..analysis.diagnosis import Diagnosis
from ..analysis.draft import DraftMeasurement
from ..analysis.evaluation import Retention
from ..analysis.inspector import Inspection, Position
from ..analysis.successive_halving import Rung
from ..analysis.temperature_search import SearchResult
from ..core import run_files
from ..core.io import damage_reported, read_json
from ..core.pruned_sizes import millions
from ..runner.run_results import WRITTEN_BY, Run
from . import plots
from .run_sections import Figure, Section, Table
from .samples import Sample

_Record = TypeVar("_Record")


def _read(file: Path, record: type[_Record], complete_key: str | None = None) -> _Record | None:
    """Return the result that an analysis command wrote; None if there is none.

    Args:
        file: of the result.
        record: the class of the result.
        complete_key: key that only the file of a complete result has.

    Raises:
        DistillError: the file is malformed.
    """
    values = read_json(file)
    if not values or (complete_key and complete_key not in values):
        return None
    with damage_reported(file):
        return TypeAdapter(record).validate_python(values)


def inspection(run: Run) -> Section:
    """Measures of the teacher's soft labels, from inspection.json."""
    result = _read(run.folder / run_files.INSPECTION, Inspection)
    if result is None:
        return _missing(run, "measures of the teacher's soft labels", run_files.INSPECTION)
    counts, masses = ", ".join(map(str, result.mass)), ", ".join(f"{share:.1%}" for share in result.mass.values())
    text = [
        f"Over {result.tokens:,} held-out tokens the entropy is {result.entropy:.2f} nats "
        f"({result.entropy_bits:.2f} bits) per token, the mass of the likeliest {counts} ids is {masses}, and the "
        f"likeliest id is the label for {result.accuracy:.1%} of the tokens.",
        *result.advice,
    ]
    figures = [
        Figure("teacher_entropy", plots.entropy_histogram(result)),
        Figure("teacher_t", plots.effect_of_temperature(result)),
    ]
    return Section("inspection", "Teacher", text, [_likeliest(p) for p in result.positions], figures)


def _likeliest(position: Position) -> Table:
    """Return the likeliest ids at a position, with the label marked."""
    rows = [[("→ " if c.is_target else "") + repr(c.text), f"{c.probability:.2%}"] for c in position.candidates]
    if not any(c.is_target for c in position.candidates):
        rows.append([f"→ {position.target!r}, rank {position.rank:,}", f"{position.target_probability:.2%}"])
    return Table([f"after {position.context[-60:]!r}", "probability"], rows)


def temperature(run: Run) -> Section:
    """The search of T and alpha for the run's recipe, from the folder RUN-temperature."""
    result = _read(Path(f"{run.folder}-temperature") / run_files.TEMPERATURE_SEARCH, SearchResult, "overrides")
    if result is None:
        return _missing(run, "a search of T and alpha", run_files.TEMPERATURE_SEARCH)
    rows = [[f"{c.temperature:g}", f"{c.alpha:g}", *_metrics(c.rungs[-1])] for c in result.candidates if c.rungs]
    text = [
        f"Successive halving, judged by {result.by} on the held-out rows, with the steps of {result.runs:.2f} "
        f"full runs. The best values are {' '.join(result.overrides)}."
    ]
    table = Table(["T", "alpha", "steps", "NLL", "KL", "agreement"], rows)
    figures = [Figure("temperature", plots.search(result))]
    return Section("temperature", "Temperature and alpha", text, [table], figures)


def _metrics(rung: Rung) -> list[str]:
    compared = ["-", "-"] if rung.kl is None else [f"{rung.kl:.4f}", f"{rung.agreement:.3f}"]
    return [f"{rung.step}", f"{rung.nll:.4f}", *compared]


def diagnosis(run: Run) -> Section:
    """Failure modes by name, from diagnosis.json."""
    result = _read(run.folder / run_files.DIAGNOSIS, Diagnosis)
    if result is None:
        return _missing(run, "a diagnosis of the run", run_files.DIAGNOSIS)
    a = result.agreement
    text = [result.conclusion, *(f"Not checked: {line}." for line in result.not_looked_at)]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in a.gradient.items())
    shifted = "; ".join(f"{a.kl_at[offset]:.2f}" if offset in a.kl_at else "-" for offset in (-1, 1))
    rows = [
        ["KL to the teacher, nats/token", f"{a.kl:.4f}"],
        ["KL with the teacher shifted by -1; +1 position", shifted],
        ["correlation of log-probabilities: Pearson; Spearman", f"{a.pearson:.3f}; {a.spearman:.3f}"],
        ["entropy, nats: teacher; student", f"{a.teacher_entropy:.3f}; {a.student_entropy:.3f}"],
        ["NLL of the labels, nats: teacher; student", f"{a.teacher_nll:.3f}; {a.student_nll:.3f}"],
        ["label less likely under the teacher than under the student", f"{a.teacher_worse:.1%}"],
        ["share of the gradient", shares],
    ]
    tables = [Table([f"{a.tokens:,} held-out target tokens", ""], rows), _parts("position in the row", a.positions)]
    tables += [_parts("source", a.sources)] if a.sources else []
    return Section("diagnosis", "Diagnosis", text, tables, verdicts=result.verdicts)


def _parts(heading: str, parts: list[Part]) -> Table:
    rows = [[p.name, f"{p.tokens:,}", f"{p.kl:.3f}", f"{p.agreement:.1%}", f"{p.student_nll:.3f}"] for p in parts]
    return Table([heading, "tokens", "KL", "top-1 agreement", "student NLL"], rows)


def retention(run: Run) -> Section:
    """Scores on evaluation tasks relative to the teacher, from retention.json."""
    result = _read(run.folder / run_files.RETENTION, Retention, "tasks")
    if result is None:
        return _missing(run, "scores on evaluation tasks", run_files.RETENTION)
    models = [*result.tasks[0].scores]
    rows = []
    for task in result.tasks:
        direction = "" if task.higher_is_better else " (lower is better)"
        cells = [f"{task.scores[m].value:.3f} ± {task.scores[m].stderr:.3f}" for m in models]
        rows.append([f"{task.task}: {task.metric}{direction}", f"{task.examples}", *cells])
    text = [
        "The table shows scores with standard errors. The plot shows percents of the teacher's score with 95 % "
        "intervals from a bootstrap over examples, where each model is resampled together with its teacher."
    ]
    figure = plots.relative_scores(result)
    figures = [Figure("retention", figure)] if figure is not None else []
    return Section("retention", "Evaluation tasks", text, [Table(["task", "examples", *models], rows)], figures)


def draft(run: Run) -> Section:
    """The student as a draft model of its teacher, from draft.json."""
    result = _read(run.folder / run_files.DRAFT, DraftMeasurement, "drafts")
    if result is None:
        return _missing(run, "the student as a draft model", run_files.DRAFT)
    parameters, alone = millions(result.teacher_parameters), f"{result.teacher_tokens_per_second:.1f}"
    rows = [["teacher alone", parameters, "", "", alone, ""]]
    for name, score in result.drafts.items():
        accepted, speed = f"{score.accepted_tokens:.2f}", f"{score.tokens_per_second:.1f}"
        cells = [millions(score.parameters), f"{score.acceptance_rate:.1%}", accepted, speed]
        rows.append([f"with {name}", *cells, f"{score.speedup:.2f}x"])
    text = [
        f"Speculative decoding of {result.prompts} held-out prompts, one at a time, with up to {result.new_tokens} new "
        f"tokens: the draft model proposes {result.drafted_tokens} tokens for each forward pass of the teacher. The "
        "acceptance rate is the probability that the teacher accepts a drafted token when it samples, over held-out "
        "tokens; all other columns are of greedy decoding."
    ]
    headings = ["", "parameters", "acceptance rate", "accepted tokens", "tokens/s", "speed-up"]
    return Section("draft", "Draft model", text, [Table(headings, rows)])


def curve(run: Run) -> Section:
    """Quality over tokens, and compute compared with pretraining, from curve.json."""
    result = _read(run.folder / run_files.CURVE, Curve)
    if result is None:
        return _missing(run, "quality over tokens, and compute", run_files.CURVE)
    c = result.compute
    text = [
        f"{share:.0%} of the fall in NLL was reached after {tokens:,} tokens."
        for share, tokens in result.reached.items()
    ]
    text += [
        f"The run took {c.teacher + c.student:.3g} FLOP over {c.tokens:,} tokens (teacher {c.teacher:.3g}, "
        f"student {c.student:.3g}), which is {c.share:.2g} of pretraining the student on "
        f"{c.pretraining_tokens:.3g} tokens."
    ]
    return Section("curve", "Data and compute", text, figures=[Figure("curve", plots.curve(result))])


def samples(run: Run) -> Section:
    """Texts that the models generated, from samples.json."""
    result = _read(run.folder / run_files.SAMPLES, _Samples, "samples")
    if result is None or not result.samples:
        return _missing(run, "generated samples", run_files.SAMPLES)
    note = "Each model continues the same prompts of the held-out rows with greedy decoding."
    return Section("samples", "Samples", [note], samples=result.samples)


@dataclass(frozen=True)
class _Samples:
    samples: list[Sample]


def _missing(run: Run, content: str, file: str) -> Section:
    """Return an empty section that names the missing content and the command that adds it."""
    command = WRITTEN_BY[file].replace("RUN", str(run.folder)).replace("RECIPE", str(run.folder / run_files.RECIPE))
    return Section(file, content, missing={content: command})
