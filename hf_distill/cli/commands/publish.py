"""publish."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..app import RunFolder, app, out


@app.command()
def publish(
    run: RunFolder,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="org/name, or a name of your own.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    include: Annotated[str, typer.Option("--with", help="cache, report, or both with a comma between.")] = "",
    license: Annotated[str | None, typer.Option("--license", help="In the place of the inherited one.")] = None,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Publish against what the licences say; the card says so.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Id of what the student began as, where the recipe names a file or a package.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace another model, weights of any format or a card that is there.")
    ] = False,
    allow_smoke: Annotated[
        bool,
        typer.Option("--allow-smoke", help="Publish a smoke run, whose weights began as random; the card says so."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show card, files and licences; needs no token and no connection.")
    ] = False,
) -> None:
    """A run's student to the Hub: one commit, with a card that carries the evidence, and the report's plots."""
    from ...runner.run_results import open_run

    parts = [part.strip() for part in include.split(",") if part.strip()]
    if dry_run:
        _show(open_run(run), repo, parts, license, base_model)
        return
    publish_run(open_run(run), repo, private, parts, license, accept_license, base_model, replace, allow_smoke)


def publish_run(
    run: Any,
    repo: str,
    private: bool,
    parts: Sequence[str] = (),
    license: str | None = None,
    accept_license: bool = False,
    base_model: str | None = None,
    replace: bool = False,
    allow_smoke: bool = False,
) -> None:
    """Publish a run and say what came of it; see `publishing.publish`."""
    from huggingface_hub.utils import disable_progress_bars

    from ...publishing import publish as publish_it
    from ..progress import RichProgress

    if not out.is_terminal:
        disable_progress_bars()
    with RichProgress(out) as progress:
        options = (license, accept_license, base_model, replace, allow_smoke)
        done = publish_it(run, repo, private, parts, *options, progress.stage)
    out.print(f"{done.url} at {done.commit[:12]}: {len(done.files)} files", soft_wrap=True, highlight=False)
    lines = [f"The cache: {done.cache}"] if done.cache else []
    lines += [f"  deleted: {', '.join(done.deleted)}"] if done.deleted else []
    lines += [f"  {note}" for note in done.notes]
    if not any(name.startswith("figures/") for name in done.files):
        lines.append(f"  without plots: `hf-distill report {run.folder}` draws them")
    for line in lines:
        out.print(line, soft_wrap=True, highlight=False)


def _show(run: Any, repo: str, parts: Sequence[str], license: str | None, base_model: str | None) -> None:
    """Print what would be published; see `publishing.dry_run`."""
    from rich.table import Table

    from ...publishing import dry_run
    from ..confirm import in_units

    found = dry_run(run, repo, parts, license, base_model)
    refused = [f"{found.smoke} Publishing it is refused without --allow-smoke."] if found.smoke else []
    for line in refused:
        out.print(line, style="bold", soft_wrap=True, highlight=False)
    out.rule("README.md")
    out.print(found.card, soft_wrap=True, highlight=False)
    table = Table(title=f"Files of {repo}", title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    for name, size in found.sizes.items():
        table.add_row(name, in_units(size))
    table.add_section()
    table.add_row(f"{len(found.sizes)} files", in_units(sum(found.sizes.values())))
    out.print(table)
    lines = [f"Not published: {', '.join(found.left_out)}"] if found.left_out else []
    lines += [f"The teacher's cache, {repo}-cache: {in_units(found.cache)}"] if found.cache is not None else []
    lines.append(f"Licence: {found.licence.id or 'not known'}")
    lines += [f"  {note}" for note in found.licence.notes]
    lines += [f"  refused without --accept-license: {conflict}" for conflict in found.licence.conflicts]
    lines += [f"  not looked up: {model}: {why}" for model, why in found.unknown.items()]
    lines += [f"  {note}" for note in found.notes]
    lines += refused
    lines.append("Nothing was sent. The repository itself is looked at when you publish.")
    for line in lines:
        out.print(line, soft_wrap=True, highlight=False)
