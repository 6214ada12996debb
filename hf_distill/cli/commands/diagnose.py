"""The `diagnose` command: names the failure modes of a run, with advice."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ...core import run_files
from ...core.defaults import HELD_OUT_TOKENS
from ...core.references import path_exists
from ...errors import DistillError
from ..app import AllowPickles, AsJson, RunFolder, TrustRemoteCode, app, disable_library_progress_bars, out

if TYPE_CHECKING:
    from ...analysis.agreement import Part
    from ...analysis.diagnosis import Diagnosis


@app.command()
def diagnose(
    run: RunFolder,
    student: Annotated[
        str, typer.Option(help="The model to diagnose: student, control, or the folder of a model.")
    ] = "student",
    tokens: Annotated[
        int, typer.Option(min=1, help="Read batches up to this number of held-out tokens.")
    ] = HELD_OUT_TOKENS,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickles: AllowPickles = False,
) -> None:
    """Compare student and teacher over held-out tokens, and name what went wrong, with advice."""
    from ...runner.run_results import open_run

    opened = open_run(run)
    name = student if student in ("student", "control") else str(Path(student).absolute())
    if name != student and not (path_exists(name) and Path(name).is_dir()):
        raise DistillError(f"There is no folder {name}: --student is student, control, or the folder of a model.")
    opened.path(name)
    logs = opened.logs(name)
    out.quiet |= as_json
    disable_library_progress_bars()
    from ...analysis.closeness import References
    from ...analysis.diagnosis import diagnose as diagnose_pair
    from ...analysis.model_pair import ModelPair
    from ...core.io import read_json, write_json
    from ...runner.model_loading import LoadPolicy, load_policy
    from ..progress import RichProgress

    with RichProgress(out) as progress, load_policy(LoadPolicy(trust_remote_code, allow_pickles)):
        pair = ModelPair.of_run(opened, name, progress.log_stage)
        if name == "control" and opened.recipe.control == "sft":
            pair = replace(pair, alpha=0.0)
        progress.log_stage(f"Comparing both models over at most {tokens:,} target tokens")
        references = References.of_evidence(read_json(opened.folder / run_files.RESULTS), name)
        diagnosis = diagnose_pair(pair, tokens, logs, references)
    if name == "student":
        write_json(opened.folder / run_files.DIAGNOSIS, asdict(diagnosis))
    if as_json:
        sys.stdout.write(json.dumps(asdict(diagnosis), indent=2) + "\n")
        return
    for part in _render(diagnosis):
        out.print(part, highlight=False)


def _render(diagnosis: "Diagnosis") -> list[RenderableType]:
    parts: list[RenderableType] = [Text(diagnosis.conclusion, "bold"), ""] if diagnosis.smoke else []
    parts += [_measurements(diagnosis), "", _parts("By position in the row", diagnosis.agreement.positions)]
    if diagnosis.agreement.sources:
        parts += ["", _parts("By source", diagnosis.agreement.sources)]
    if diagnosis.smoke:
        return parts
    parts.append("")
    is_complete = not diagnosis.verdicts and not diagnosis.not_looked_at
    parts.append(Text(diagnosis.conclusion, "green" if is_complete else "bold"))
    for verdict in diagnosis.verdicts:
        parts += [Text(verdict.name, "bold red"), f"  {verdict.text}", f"  → {verdict.advice}"]
    return [*parts, *(f"Not checked: {line}." for line in diagnosis.not_looked_at)]


def _measurements(diagnosis: "Diagnosis") -> Table:
    from ...analysis.closeness import NO_REFERENCES

    a = diagnosis.agreement
    table = Table(title=f"{a.tokens:,} held-out target tokens", box=None, pad_edge=False, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in a.gradient.items())
    rows = [
        ("KL to the teacher, nats/token", f"{a.kl:.4f}"),
        ("  with the teacher shifted by -1, +1 position", _at_offsets(a.kl_at)),
        ("top-1 agreement", f"{a.agreement:.1%}"),
        ("correlation of log-probabilities: Pearson, Spearman", f"{a.pearson:.3f}, {a.spearman:.3f}"),
        ("entropy of teacher, student, nats", f"{a.teacher_entropy:.3f}, {a.student_entropy:.3f}"),
        ("NLL of the labels: teacher, student, nats", f"{a.teacher_nll:.3f}, {a.student_nll:.3f}"),
        ("  of the unigram baseline", f"{a.counts_nll:.3f}"),
        ("  teacher's, with the label at offset -1, +1", _at_offsets(a.label_at)),
        ("label less likely under teacher than student", f"{a.teacher_worse:.1%}"),
        ("  than under the unigram baseline", f"{a.below_counts:.1%}"),
        (
            "confident teacher errors; copied by the student",
            f"{a.confident_teacher_errors:.1%}; {a.copied_errors:.1%}",
        ),
        ("mass outside teacher's likeliest: teacher, student", f"{a.teacher_tail:.1%}, {a.student_tail:.1%}"),
        ("share of the gradient", shares),
        ("  of the soft term, outside teacher's likeliest", f"{a.soft_tail:.1%}"),
        (
            "target tokens of all; special, padding of these",
            f"{a.target_share:.1%}; {a.special:.1%}, {a.padding:.1%}",
        ),
    ]
    references = diagnosis.references or NO_REFERENCES
    for title, held_out in (("before training", references.before), ("control", references.control)):
        if held_out is not None:
            kl = "-" if held_out.kl is None else f"{held_out.kl:.4f}"
            rows.append((f"{title}: KL to the teacher; NLL of the labels", f"{kl}; {held_out.nll:.3f}"))
    if diagnosis.tokenizer is not None:
        check = diagnosis.tokenizer
        rows.append(("ids equal after decode and encode; unknown", f"{check.kept:.1%}; {check.unknown:.1%}"))
    for row in rows:
        table.add_row(*row)
    return table


def _at_offsets(values: dict[int, float]) -> str:
    return ", ".join(f"{values[offset]:.2f}" if offset in values else "-" for offset in (-1, 1))


def _parts(title: str, parts: "list[Part]") -> Table:
    table = Table(title=title, box=None, pad_edge=False)
    for heading in ("", "tokens", "KL", "top-1 agreement", "teacher NLL", "student NLL"):
        table.add_column(heading, justify="right" if heading else "left")
    for part in parts:
        values = (f"{part.kl:.3f}", f"{part.agreement:.1%}", f"{part.teacher_nll:.3f}", f"{part.student_nll:.3f}")
        table.add_row(part.name, f"{part.tokens:,}", *values)
    return table
