"""diagnose."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ...core.references import path_exists
from ...errors import DistillError
from ..app import AsJson, RunFolder, app, disable_library_progress_bars, out


@app.command()
def diagnose(
    run: RunFolder,
    student: Annotated[str, typer.Option(help="student, control, or the folder of a model.")] = "student",
    tokens: Annotated[int, typer.Option(min=1, help="Look at so many held-out tokens.")] = 4096,
    as_json: AsJson = False,
) -> None:
    """Why a run is worse than it should be: failures by name, each with its advice."""
    from ...runner.run_results import open_run

    opened = open_run(run)
    name = student if student in ("student", "control") else str(Path(student).absolute())
    if name != student and not (path_exists(name) and Path(name).is_dir()):
        raise DistillError(f"There is no folder {name}: --student is student, control, or the folder of a model.")
    opened.path(name)
    logs = opened.logs(name)
    out.quiet = as_json
    disable_library_progress_bars()
    from ...analysis.closeness import References
    from ...analysis.diagnosis import diagnose as look
    from ...analysis.model_pair import ModelPair
    from ...core.io import read_json, write_json
    from ..progress import RichProgress

    with RichProgress(out) as progress:
        pair = ModelPair.of_run(opened, name, progress.stage)
        if name == "control" and opened.recipe.control == "sft":
            pair = replace(pair, alpha=0.0)
        progress.stage(f"Comparing both models over {tokens:,} tokens")
        references = References.of_evidence(read_json(opened.folder / "results.json"), name)
        found = look(pair, tokens, logs, references)
    if name == "student":
        write_json(opened.folder / "diagnosis.json", asdict(found))
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), indent=2) + "\n")
        return
    for part in _shown(found):
        out.print(part, highlight=False)


def _shown(found: Any) -> list[Any]:
    parts: list[Any] = [Text(found.conclusion, "bold"), ""] if found.smoke else []
    parts += [_measures(found), "", _parts("Within rows", found.agreement.positions)]
    if found.agreement.sources:
        parts += ["", _parts("Sources", found.agreement.sources)]
    if found.smoke:
        return parts
    parts.append("")
    judged = not found.verdicts and not found.not_looked_at
    parts.append(Text(found.conclusion, "green" if judged else "bold"))
    for verdict in found.verdicts:
        parts += [Text(verdict.name, "bold red"), f"  {verdict.text}", f"  → {verdict.advice}"]
    return [*parts, *(f"Not looked at: {line}." for line in found.not_looked_at)]


def _measures(found: Any) -> Table:
    a = found.agreement
    table = Table(title=f"{a.tokens:,} held-out tokens", box=None, pad_edge=False, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in a.gradient.items())
    rows = [
        ("KL to the teacher, nats/token", f"{a.kl:.4f}"),
        ("  with the teacher's token before, after", _beside(a.kl_at)),
        ("same first choice", f"{a.agreement:.1%}"),
        ("correlation of log-probabilities: Pearson, rank", f"{a.pearson:.3f}, {a.spearman:.3f}"),
        ("entropy of teacher, student, nats", f"{a.teacher_entropy:.3f}, {a.student_entropy:.3f}"),
        ("nll of the labels: teacher, student, nats", f"{a.teacher_nll:.3f}, {a.student_nll:.3f}"),
        ("  of who only knows how often each occurs", f"{a.counts_nll:.3f}"),
        ("  the teacher's of the label before, after", _beside(a.label_at)),
        ("teacher gives the label less than the student", f"{a.teacher_worse:.1%}"),
        ("  less than the label's share of all labels", f"{a.below_counts:.1%}"),
        (
            "teacher is sure and wrong; student says the same",
            f"{a.confident_teacher_errors:.1%}; {a.copied_errors:.1%}",
        ),
        ("mass outside the teacher's likeliest: its, student's", f"{a.teacher_tail:.1%}, {a.student_tail:.1%}"),
        ("share of the gradient", shares),
        ("  of the soft one outside the teacher's likeliest", f"{a.soft_tail:.1%}"),
        ("asked of all tokens; special, padding of these", f"{a.asked:.1%}; {a.special:.1%}, {a.padding:.1%}"),
    ]
    references = found.references
    for title, one in (
        ("before training", references and references.before),
        ("control", references and references.control),
    ):
        if one is not None:
            kl = "-" if one.kl is None else f"{one.kl:.4f}"
            rows.append((f"{title}: KL to the teacher; nll of the labels", f"{kl}; {one.nll:.3f}"))
    if found.tokenizer is not None:
        t = found.tokenizer
        rows.append(("ids that come back from their text; unknown", f"{t.kept:.1%}; {t.unknown:.1%}"))
    for row in rows:
        table.add_row(*row)
    return table


def _beside(values: dict[int, float]) -> str:
    return ", ".join(f"{values[offset]:.2f}" if offset in values else "-" for offset in (-1, 1))


def _parts(title: str, parts: Any) -> Table:
    table = Table(title=title, box=None, pad_edge=False)
    for heading in ("", "tokens", "KL", "same first choice", "teacher's nll", "student's"):
        table.add_column(heading, justify="right" if heading else "left")
    for part in parts:
        values = (f"{part.kl:.3f}", f"{part.agreement:.1%}", f"{part.teacher_nll:.3f}", f"{part.student_nll:.3f}")
        table.add_row(part.name, f"{part.tokens:,}", *values)
    return table
