"""Sections of what other commands left in a run's folder."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from ..core.io import damage_reported, read_json
from ..runner.run_results import WRITTEN_BY, Run
from . import plots
from .run_sections import Figure, Section, Table


def _reads(file: str) -> Callable[[Callable[[Run], Section]], Callable[[Run], Section]]:
    """A section of a file, which is named where its values are not what its command writes."""

    def decorate(section: Callable[[Run], Section]) -> Callable[[Run], Section]:
        @wraps(section)
        def wrapped(run: Run) -> Section:
            with damage_reported(run.folder / file):
                return section(run)

        return wrapped

    return decorate


@_reads("inspection.json")
def inspection(run: Run) -> Section:
    """What the teacher's soft labels hold."""
    found = read_json(run.folder / "inspection.json")
    if not found:
        return _absent(run, "what the teacher's soft labels hold", "inspection.json")
    masses = ", ".join(f"the likeliest {k} ids hold {share:.1%}" for k, share in found["mass"].items())
    text = [
        f"Over {found['tokens']:,} held-out tokens: entropy {found['entropy']:.2f} nats "
        f"({found['entropy_bits']:.2f} bits) a token; {masses}; its first choice is the label for "
        f"{found['accuracy']:.1%}.",
        *found["advice"],
    ]
    figures = [Figure("teacher_entropy", plots.entropy_histogram(found)), Figure("teacher_t", plots.effect_of_t(found))]
    return Section("inspection", "The teacher", text, [_likeliest(p) for p in found["positions"]], figures)


def _likeliest(position: dict[str, Any]) -> Table:
    """A position's likeliest ids; the data's own is marked."""
    rows = [
        [("→ " if c["is_target"] else "") + repr(c["text"]), f"{c['probability']:.2%}"] for c in position["candidates"]
    ]
    if not any(c["is_target"] for c in position["candidates"]):
        rows.append([f"→ {position['target']!r}, number {position['rank']:,}", f"{position['target_probability']:.2%}"])
    return Table([f"after {position['context'][-60:]!r}", "probability"], rows)


def temperature(run: Run) -> Section:
    """A search of T and alpha for the run's recipe, where there is one beside the run."""
    file = Path(f"{run.folder}-temperature") / "temperature.json"
    found = read_json(file)
    if "overrides" not in found:
        return _absent(run, "a search of T and alpha", "temperature.json")
    with damage_reported(file):
        return _search(found)


def _search(found: dict[str, Any]) -> Section:
    rows = [
        [f"{c['temperature']:g}", f"{c['alpha']:g}", *_last(c["rungs"][-1])] for c in found["candidates"] if c["rungs"]
    ]
    text = [
        f"Successive halving, judged by {found['by']} on the held-out rows, in the steps of {found['runs']:.2f} whole "
        f"runs. The best: {' '.join(found['overrides'])}."
    ]
    table = Table(["T", "alpha", "steps", "NLL", "KL", "agreement"], rows)
    return Section("temperature", "Temperature and alpha", text, [table], [Figure("temperature", plots.search(found))])


def _last(rung: dict[str, Any]) -> list[str]:
    return [f"{rung['step']}", f"{rung['nll']:.4f}", f"{rung['kl']:.4f}", f"{rung['agreement']:.3f}"]


@_reads("diagnosis.json")
def diagnosis(run: Run) -> Section:
    """What went wrong, by name."""
    found = read_json(run.folder / "diagnosis.json")
    if not found:
        return _absent(run, "what may have gone wrong", "diagnosis.json")
    a = found["agreement"]
    text = [found["conclusion"]]
    text += [f"Not looked at: {line}." for line in found["not_looked_at"]]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in a["gradient"].items())
    beside = "; ".join(f"{a['kl_at'][at]:.2f}" if at in a["kl_at"] else "-" for at in ("-1", "1"))
    rows = [
        ["KL to the teacher, nats/token", f"{a['kl']:.4f}"],
        ["the same with the teacher's token before; after", beside],
        ["correlation of log-probabilities: Pearson; rank", f"{a['pearson']:.3f}; {a['spearman']:.3f}"],
        ["entropy, nats: teacher; student", f"{a['teacher_entropy']:.3f}; {a['student_entropy']:.3f}"],
        ["nll of the labels, nats: teacher; student", f"{a['teacher_nll']:.3f}; {a['student_nll']:.3f}"],
        ["teacher gives the label less than the student", f"{a['teacher_worse']:.1%}"],
        ["share of the gradient", shares],
    ]
    tables = [Table([f"{a['tokens']:,} held-out tokens", ""], rows), _parts("within rows", a["positions"])]
    tables += [_parts("source", a["sources"])] if a["sources"] else []
    return Section("diagnosis", "Diagnosis", text, tables, verdicts=found["verdicts"])


def _parts(heading: str, parts: list[dict[str, Any]]) -> Table:
    rows = [
        [p["name"], f"{p['tokens']:,}", f"{p['kl']:.3f}", f"{p['agreement']:.1%}", f"{p['student_nll']:.3f}"]
        for p in parts
    ]
    return Table([heading, "tokens", "KL", "same first choice", "student's nll"], rows)


@_reads("retention.json")
def retention(run: Run) -> Section:
    """What the student kept, task by task."""
    found = read_json(run.folder / "retention.json")
    if "tasks" not in found:
        return _absent(run, "what was kept on tasks", "retention.json")
    models = [*found["tasks"][0]["scores"]]
    rows = []
    for task in found["tasks"]:
        arrow = "" if task["higher_is_better"] else " (less is better)"
        cells = [f"{task['scores'][m]['value']:.3f} ± {task['scores'][m]['stderr']:.3f}" for m in models]
        rows.append([f"{task['task']}: {task['metric']}{arrow}", f"{task['examples']}", *cells])
    text = [
        "Scores with their standard errors, and percents of the teacher's score with 95 % intervals: a bootstrap over "
        "the examples, each model resampled with its teacher."
    ]
    drawn = plots.kept(found)
    figures = [Figure("retention", drawn)] if drawn is not None else []
    return Section("retention", "What was kept", text, [Table(["task", "examples", *models], rows)], figures)


@_reads("curve.json")
def curve(run: Run) -> Section:
    """Quality over tokens, and what they cost."""
    found = read_json(run.folder / "curve.json")
    if not found:
        return _absent(run, "quality over tokens, and operations", "curve.json")
    c = found["compute"]
    text = [
        f"{float(share):.0%} of the fall in NLL after {tokens:,} tokens." for share, tokens in found["reached"].items()
    ]
    text += [
        f"{c['teacher'] + c['student']:.3g} FLOP over {c['tokens']:,} tokens (teacher {c['teacher']:.3g}, student "
        f"{c['student']:.3g}): {c['share']:.2g} of pretraining the student on {c['pretraining_tokens']:.3g} tokens."
    ]
    return Section("curve", "Data and compute", text, figures=[Figure("curve", plots.curve(found))])


@_reads("samples.json")
def samples(run: Run) -> Section:
    """What the models write."""
    found = read_json(run.folder / "samples.json").get("samples")
    if not found:
        return _absent(run, "samples of what the models write", "samples.json")
    note = "Each model's likeliest next tokens (greedy) after the same prompt of the held-out rows."
    kept = [{key: sample[key] for key in ("prompt", "reference", "written")} for sample in found]
    return Section("samples", "Samples", [note], samples=kept)


def _absent(run: Run, what: str, file: str) -> Section:
    command = WRITTEN_BY[file].replace("RUN", str(run.folder)).replace("RECIPE", str(run.folder / "recipe.yaml"))
    return Section(file, what, missing={what: command})
