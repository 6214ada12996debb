"""Sections of a report with the results of the analysis commands."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from ..core.io import damage_reported, read_json
from ..runner.run_results import WRITTEN_BY, Run
from . import plots
from .run_sections import Figure, Section, Table


def _reads(file: str) -> Callable[[Callable[[Run], Section]], Callable[[Run], Section]]:
    """Decorate a section that reads a file of the run: a malformed file gives an error that names it."""

    def decorate(section: Callable[[Run], Section]) -> Callable[[Run], Section]:
        @wraps(section)
        def wrapped(run: Run) -> Section:
            with damage_reported(run.folder / file):
                return section(run)

        return wrapped

    return decorate


@_reads("inspection.json")
def inspection(run: Run) -> Section:
    """Measures of the teacher's soft labels, from inspection.json."""
    values = read_json(run.folder / "inspection.json")
    if not values:
        return _missing(run, "measures of the teacher's soft labels", "inspection.json")
    counts, masses = ", ".join(values["mass"]), ", ".join(f"{share:.1%}" for share in values["mass"].values())
    text = [
        f"Over {values['tokens']:,} held-out tokens the entropy is {values['entropy']:.2f} nats "
        f"({values['entropy_bits']:.2f} bits) per token, the mass of the likeliest {counts} ids is {masses}, and the "
        f"likeliest id is the label for {values['accuracy']:.1%} of the tokens.",
        *values["advice"],
    ]
    figures = [
        Figure("teacher_entropy", plots.entropy_histogram(values)),
        Figure("teacher_t", plots.effect_of_temperature(values)),
    ]
    return Section("inspection", "Teacher", text, [_likeliest(p) for p in values["positions"]], figures)


def _likeliest(position: dict[str, Any]) -> Table:
    """Return the likeliest ids at a position, with the label marked."""
    rows = [
        [("→ " if c["is_target"] else "") + repr(c["text"]), f"{c['probability']:.2%}"] for c in position["candidates"]
    ]
    if not any(c["is_target"] for c in position["candidates"]):
        rows.append([f"→ {position['target']!r}, rank {position['rank']:,}", f"{position['target_probability']:.2%}"])
    return Table([f"after {position['context'][-60:]!r}", "probability"], rows)


def temperature(run: Run) -> Section:
    """The search of T and alpha for the run's recipe, from the folder RUN-temperature."""
    file = Path(f"{run.folder}-temperature") / "temperature.json"
    values = read_json(file)
    if "overrides" not in values:
        return _missing(run, "a search of T and alpha", "temperature.json")
    with damage_reported(file):
        return _search(values)


def _search(values: dict[str, Any]) -> Section:
    rows = [
        [f"{c['temperature']:g}", f"{c['alpha']:g}", *_metrics(c["rungs"][-1])]
        for c in values["candidates"]
        if c["rungs"]
    ]
    text = [
        f"Successive halving, judged by {values['by']} on the held-out rows, with the steps of {values['runs']:.2f} "
        f"full runs. The best values are {' '.join(values['overrides'])}."
    ]
    table = Table(["T", "alpha", "steps", "NLL", "KL", "agreement"], rows)
    figures = [Figure("temperature", plots.search(values))]
    return Section("temperature", "Temperature and alpha", text, [table], figures)


def _metrics(rung: dict[str, Any]) -> list[str]:
    compared = ["-", "-"] if rung["kl"] is None else [f"{rung['kl']:.4f}", f"{rung['agreement']:.3f}"]
    return [f"{rung['step']}", f"{rung['nll']:.4f}", *compared]


@_reads("diagnosis.json")
def diagnosis(run: Run) -> Section:
    """Failure modes by name, from diagnosis.json."""
    values = read_json(run.folder / "diagnosis.json")
    if not values:
        return _missing(run, "a diagnosis of the run", "diagnosis.json")
    a = values["agreement"]
    text = [values["conclusion"]]
    text += [f"Not checked: {line}." for line in values["not_looked_at"]]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in a["gradient"].items())
    shifted = "; ".join(f"{a['kl_at'][offset]:.2f}" if offset in a["kl_at"] else "-" for offset in ("-1", "1"))
    rows = [
        ["KL to the teacher, nats/token", f"{a['kl']:.4f}"],
        ["KL with the teacher shifted by -1; +1 position", shifted],
        ["correlation of log-probabilities: Pearson; Spearman", f"{a['pearson']:.3f}; {a['spearman']:.3f}"],
        ["entropy, nats: teacher; student", f"{a['teacher_entropy']:.3f}; {a['student_entropy']:.3f}"],
        ["NLL of the labels, nats: teacher; student", f"{a['teacher_nll']:.3f}; {a['student_nll']:.3f}"],
        ["label less likely under the teacher than under the student", f"{a['teacher_worse']:.1%}"],
        ["share of the gradient", shares],
    ]
    tables = [
        Table([f"{a['tokens']:,} held-out target tokens", ""], rows),
        _parts("position in the row", a["positions"]),
    ]
    tables += [_parts("source", a["sources"])] if a["sources"] else []
    return Section("diagnosis", "Diagnosis", text, tables, verdicts=values["verdicts"])


def _parts(heading: str, parts: list[dict[str, Any]]) -> Table:
    rows = [
        [p["name"], f"{p['tokens']:,}", f"{p['kl']:.3f}", f"{p['agreement']:.1%}", f"{p['student_nll']:.3f}"]
        for p in parts
    ]
    return Table([heading, "tokens", "KL", "top-1 agreement", "student NLL"], rows)


@_reads("retention.json")
def retention(run: Run) -> Section:
    """Scores on evaluation tasks relative to the teacher, from retention.json."""
    values = read_json(run.folder / "retention.json")
    if "tasks" not in values:
        return _missing(run, "scores on evaluation tasks", "retention.json")
    models = [*values["tasks"][0]["scores"]]
    rows = []
    for task in values["tasks"]:
        direction = "" if task["higher_is_better"] else " (lower is better)"
        cells = [f"{task['scores'][m]['value']:.3f} ± {task['scores'][m]['stderr']:.3f}" for m in models]
        rows.append([f"{task['task']}: {task['metric']}{direction}", f"{task['examples']}", *cells])
    text = [
        "The table shows scores with standard errors. The plot shows percents of the teacher's score with 95 % "
        "intervals from a bootstrap over examples, where each model is resampled together with its teacher."
    ]
    figure = plots.relative_scores(values)
    figures = [Figure("retention", figure)] if figure is not None else []
    return Section("retention", "Evaluation tasks", text, [Table(["task", "examples", *models], rows)], figures)


@_reads("curve.json")
def curve(run: Run) -> Section:
    """Quality over tokens, and compute compared with pretraining, from curve.json."""
    values = read_json(run.folder / "curve.json")
    if not values:
        return _missing(run, "quality over tokens, and compute", "curve.json")
    c = values["compute"]
    text = [
        f"{float(share):.0%} of the fall in NLL was reached after {tokens:,} tokens."
        for share, tokens in values["reached"].items()
    ]
    text += [
        f"The run took {c['teacher'] + c['student']:.3g} FLOP over {c['tokens']:,} tokens (teacher {c['teacher']:.3g}, "
        f"student {c['student']:.3g}), which is {c['share']:.2g} of pretraining the student on "
        f"{c['pretraining_tokens']:.3g} tokens."
    ]
    return Section("curve", "Data and compute", text, figures=[Figure("curve", plots.curve(values))])


@_reads("samples.json")
def samples(run: Run) -> Section:
    """Texts that the models generated, from samples.json."""
    values = read_json(run.folder / "samples.json").get("samples")
    if not values:
        return _missing(run, "generated samples", "samples.json")
    note = "Each model continues the same prompts of the held-out rows with greedy decoding."
    shown = [{key: sample[key] for key in ("prompt", "reference", "written")} for sample in values]
    return Section("samples", "Samples", [note], samples=shown)


def _missing(run: Run, content: str, file: str) -> Section:
    """Return an empty section that names the missing content and the command that adds it."""
    command = WRITTEN_BY[file].replace("RUN", str(run.folder)).replace("RECIPE", str(run.folder / "recipe.yaml"))
    return Section(file, content, missing={content: command})
