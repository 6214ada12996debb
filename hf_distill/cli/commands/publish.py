"""The command publish."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ..app import RunFolder, app, out

if TYPE_CHECKING:
    from ...runner.run_results import Run


@app.command()
def publish(
    run: RunFolder,
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Id of the repository: org/name, or a name in your namespace.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    include: Annotated[str, typer.Option("--include", help="cache, report, or both: cache,report.")] = "",
    license: Annotated[str | None, typer.Option("--license", help="Id of the license; by default inherited.")] = None,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Publish despite license conflicts; the card states them.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Id of the base model, if the recipe names a file or a package.")
    ] = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Replace another model, weights of any format, or a card in the repository."),
    ] = False,
    allow_smoke: Annotated[
        bool,
        typer.Option(
            "--allow-smoke", help="Publish a smoke run, whose initial weights are random; the card states it."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the card, files and license; needs no token and no connection.")
    ] = False,
) -> None:
    """Publish the student of a run on the Hub with a model card and its measurements."""
    from ...runner.run_results import open_run

    parts = [part.strip() for part in include.split(",") if part.strip()]
    if dry_run:
        _show(open_run(run), repo, parts, license, base_model)
        return
    publish_run(open_run(run), repo, private, parts, license, accept_license, base_model, replace, allow_smoke)


def publish_run(
    run: "Run",
    repo: str,
    private: bool,
    parts: Sequence[str] = (),
    license: str | None = None,
    accept_license: bool = False,
    base_model: str | None = None,
    replace: bool = False,
    allow_smoke: bool = False,
) -> None:
    """Publish a run and print the result; see `publishing.publish`."""
    from huggingface_hub.utils import disable_progress_bars

    from ...publishing import publish as publish_student
    from ..progress import RichProgress

    if not out.is_terminal:
        disable_progress_bars()
    with RichProgress(out) as progress:
        options = (license, accept_license, base_model, replace, allow_smoke)
        published = publish_student(run, repo, private, parts, *options, progress.log_stage)
    out.print(
        f"Published {len(published.files)} files to {published.url} in commit {published.commit[:12]}.",
        soft_wrap=True,
        highlight=False,
    )
    lines = [f"The teacher cache: {published.cache}"] if published.cache else []
    lines += [f"  deleted: {', '.join(published.deleted)}"] if published.deleted else []
    lines += [f"  {note}" for note in published.notes]
    if not any(name.startswith("figures/") for name in published.files):
        lines.append(f"  No plots were published; `hf-distill report {run.folder}` draws them.")
    for line in lines:
        out.print(line, soft_wrap=True, highlight=False)


def _show(run: "Run", repo: str, parts: Sequence[str], license: str | None, base_model: str | None) -> None:
    """Print what would be published; see `publishing.dry_run`."""
    from rich.table import Table

    from ...publishing import dry_run
    from ..confirm import format_bytes

    preview = dry_run(run, repo, parts, license, base_model)
    refused = [f"{preview.smoke} Publishing it needs --allow-smoke."] if preview.smoke else []
    for line in refused:
        out.print(line, style="bold", soft_wrap=True, highlight=False)
    out.rule("README.md")
    out.print(preview.card, soft_wrap=True, highlight=False)
    table = Table(title=f"Files of {repo}", title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    for name, size in preview.sizes.items():
        table.add_row(name, format_bytes(size))
    table.add_section()
    table.add_row(f"{len(preview.sizes)} files", format_bytes(sum(preview.sizes.values())))
    out.print(table)
    lines = [f"Not published: {', '.join(preview.left_out)}"] if preview.left_out else []
    lines += [f"The teacher cache, {repo}-cache: {format_bytes(preview.cache)}"] if preview.cache is not None else []
    lines.append(f"License: {preview.license.id or 'unknown'}")
    lines += [f"  {note}" for note in preview.license.notes]
    lines += [f"  License conflict, which needs --accept-license: {conflict}" for conflict in preview.license.conflicts]
    lines += [f"  The license of {model} could not be looked up: {why}" for model, why in preview.unknown.items()]
    lines += [f"  {note}" for note in preview.notes]
    lines += refused
    lines.append("Nothing was uploaded. The repository is checked when you publish.")
    for line in lines:
        out.print(line, soft_wrap=True, highlight=False)
