"""Sections of what other commands left in a run's folder."""

from pathlib import Path
from typing import Any

from ..evidence import read_json
from . import plots
from .folder import WRITTEN_BY, Run
from .sections import Figure, Section, Table


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
    found = read_json(Path(f"{run.folder}-temperature") / "temperature.json")
    if "overrides" not in found:
        return _absent(run, "a search of T and alpha", "temperature.json")
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


def samples(run: Run) -> Section:
    """What the models write."""
    found = read_json(run.folder / "samples.json").get("samples")
    if not found:
        return _absent(run, "samples of what the models write", "samples.json")
    note = "Each model's likeliest next tokens (greedy) after the same prompt of the held-out rows."
    return Section("samples", "Samples", [note], samples=found)


def _absent(run: Run, what: str, file: str) -> Section:
    command = WRITTEN_BY[file].replace("RUN", str(run.folder)).replace("RECIPE", str(run.folder / "recipe.yaml"))
    return Section(file, what, missing={what: command})
