"""publish."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .app import RunFolder, app, out


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
    replace: Annotated[bool, typer.Option("--replace", help="In the place of a model with another base.")] = False,
) -> None:
    """A run's student to the Hub: one commit, with a card that carries the evidence, and the report's plots."""
    from ..analysis.folder import open_run

    parts = [part.strip() for part in include.split(",") if part.strip()]
    publish_run(open_run(run), repo, private, parts, license, accept_license, base_model, replace)


def publish_run(
    run: Any,
    repo: str,
    private: bool,
    parts: Sequence[str] = (),
    license: str | None = None,
    accept_license: bool = False,
    base_model: str | None = None,
    replace: bool = False,
) -> None:
    """Publish a run and say what came of it; see `publishing.publish`."""
    from huggingface_hub.utils import disable_progress_bars

    from ..progress import RichProgress
    from ..publishing import publish as publish_it

    if not out.is_terminal:
        disable_progress_bars()
    with RichProgress(out) as progress:
        done = publish_it(run, repo, private, parts, license, accept_license, base_model, replace, progress.stage)
    out.print(f"{done.url} at {done.commit[:12]}: {len(done.files)} files", soft_wrap=True, highlight=False)
    lines = [f"The cache: {done.cache}"] if done.cache else []
    lines += [f"  {note}" for note in done.notes]
    if not any(name.startswith("figures/") for name in done.files):
        lines.append(f"  without plots: `hf-distill report {run.folder}` draws them")
    for line in lines:
        out.print(line, soft_wrap=True, highlight=False)
