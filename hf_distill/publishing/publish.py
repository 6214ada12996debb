"""One commit that brings a student to the Hub, or nothing."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError

from ..core.references import reference_kind
from ..errors import DistillError
from ..hub import translate_hub_errors
from ..hub.licenses import License, LicenseDecision, get_license
from ..recipe.downloads import smoke_run
from ..recipe.schema import Recipe
from ..runner.run_results import Run
from .card_data import judged_of, run_card_data, teachers_of
from .files import Contents, contents_of
from .repository import CARD, Repository, check_repository, check_repository_id, look_at, to_delete

WITH = ("cache", "report")


@dataclass(frozen=True)
class Published:
    """A student on the Hub.

    url:      of its page
    commit:   that brought it; the newest one, if nothing had changed
    files:    of it
    left_out: files of the student's folder that did not go up
    notes:    what licences ask for, and what others will stumble over
    cache:    address of the teacher's cache, where that went up too
    deleted:  files that were in the repository and are not any more
    """

    url: str
    commit: str
    files: list[str]
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cache: str | None = None
    deleted: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DryRun:
    """What would be published.

    card:     README.md
    sizes:    file -> bytes
    left_out: files of the student's folder that would not go up
    licence:  see `hub.licences.Judged`; of the licences that are known
    unknown:  model -> why its licence could not be looked up
    notes:    what others will stumble over
    cache:    bytes of the teacher's cache; None: it would not go up
    smoke:    why the run is a smoke run, which is refused without `allow_smoke`; None: it is none
    """

    card: str
    sizes: dict[str, int]
    left_out: list[str]
    licence: LicenseDecision
    unknown: dict[str, str]
    notes: list[str]
    cache: int | None = None
    smoke: str | None = None


def publish(
    run: Run,
    repo: str,
    private: bool = False,
    include: Collection[str] = (),
    licence: str | None = None,
    accept_licence: bool = False,
    base_model: str | None = None,
    replace: bool = False,
    allow_smoke: bool = False,
    on_stage: Callable[[str], None] = lambda text: None,
) -> Published:
    """Bring a run's student to the Hub, with its card, its facts and its plots, in one commit.

    Whatever interrupts it leaves the repository as it was: files go up first, and nobody sees them before the commit.
    Again, nothing goes up twice.

    Args:
        run: see `open_run`.
        repo: org/name, or a name of one's own; made if there is none.
        private: a new repository is.
        include: "report" for report.html; "cache" for the teacher's cache, as the data set repository org/name-cache.
        licence: that its author wants; None: inherited.
        accept_licence: publish against what the licences of teacher and base say.
        base_model: id of what the student began as, where the recipe names a file or a package.
        replace: take the place of another model, of weights of any format, and of a card that somebody wrote.
        allow_smoke: publish a smoke run, whose models began with random weights; its card says so.
        on_stage: told in a few words what begins.

    Raises:
        DistillError: the run is not over, or is a smoke run; `repo` is no id; no token; a licence conflict; the
            repository holds what publishing did not write, or is public while `private` is wanted; see `hub.asking` and
            `repository.check_repository`.
    """
    _check_arguments(repo, include, base_model)
    if (random := smoke_run(run.recipe)) and not allow_smoke:
        raise DistillError(f"{random} If you want to publish it nevertheless, add --allow-smoke; the card will say so.")
    api = HfApi()
    repo = _whole_name(api, repo)
    on_stage(f"Gathering what is known of {run.folder}")
    facts = run_card_data(run, repo, licence, base_model)
    _check_licence(facts.licence, accept_licence)
    contents = contents_of(run, facts, "report" in include)
    there = look_at(api, repo)
    check_repository(there, contents.files, private, replace, facts)
    gone = to_delete(there, contents.files, replace)
    cache = _push_cache(run, repo, private, replace, on_stage) if "cache" in include else None
    commit = _commit(api, there, private, contents, gone, on_stage)
    url = f"{api.endpoint}/{repo}"
    notes = [*facts.licence.notes, *contents.notes]
    return Published(url, commit, sorted(contents.files), contents.left_out, notes, cache, gone)


def dry_run(
    run: Run, repo: str, include: Collection[str] = (), licence: str | None = None, base_model: str | None = None
) -> DryRun:
    """What `publish` would upload. The repository is not looked at; neither a token nor a connection is needed.

    Args:
        run: see `open_run`.
        repo: org/name, or a name of one's own.
        include: see `publish`.
        licence: see `publish`.
        base_model: see `publish`.

    Raises:
        DistillError: the run is not over; `repo` is no id; or a file that would be published is missing or damaged.
    """
    _check_arguments(repo, include, base_model)
    unknown: dict[str, str] = {}

    def lookup(model: str, revision: str | None) -> License | None:
        try:
            return get_license(model, revision)
        except DistillError as error:
            unknown[model] = str(error)
            return None

    facts = run_card_data(run, repo, licence, base_model, lookup)
    contents = contents_of(run, facts, "report" in include)
    sizes = {name: content.stat().st_size if isinstance(content, Path) else len(content)
             for name, content in sorted(contents.files.items())}  # fmt: skip
    cache = _size_of_cache(run) if "cache" in include else None
    card = bytes(contents.files[CARD]).decode()
    return DryRun(card, sizes, contents.left_out, facts.licence, unknown, contents.notes, cache, smoke_run(run.recipe))


def _check_arguments(repo: str, include: Collection[str], base_model: str | None) -> None:
    """Refuse arguments that the Hub would refuse, without asking it."""
    check_repository_id(repo)
    if "cache" in include:
        check_repository_id(f"{repo}-cache", "The name of the cache's repository")
    if base_model is not None:
        check_repository_id(base_model, "--base-model")
    if unknown := sorted({*include} - {*WITH}):
        raise DistillError(f"--with takes {', '.join(WITH)}; got {', '.join(unknown)}.")


def check_ready(recipe: Recipe, repo: str, accept_licence: bool = False) -> None:
    """Before a run whose student is to be published: token, licences and repository, as far as they can be known.

    Raises:
        DistillError: see `publish`.
    """
    check_repository_id(repo, "train.hub_model_id")
    api = HfApi()
    repo = _whole_name(api, repo)
    _check_licence(judged_of(recipe, teachers_of(recipe), repo, None, None), accept_licence)
    check_repository(look_at(api, repo), [CARD], private=False, replace=False)
    if random := smoke_run(recipe):
        raise DistillError(
            f"{random} Leave train.push_to_hub out, or publish it with `hf-distill publish --allow-smoke`."
        )


def _check_licence(judged: LicenseDecision, accepted: bool) -> None:
    if judged.conflicts and not accepted:
        lines = "\n".join(f"  {line}" for line in judged.conflicts)
        raise DistillError(
            f"The licences say otherwise:\n{lines}\nRead them. If you may publish it nevertheless, add "
            "--accept-license (and --license ID to say under which); the card will say so."
        )


def _whole_name(api: HfApi, repo: str) -> str:
    """org/name; checks that somebody is logged in."""
    with translate_hub_errors(repo):
        try:
            user = api.whoami()["name"]
        except LocalTokenNotFoundError:
            raise DistillError(
                "No token is set: run `hf auth login`, or set HF_TOKEN to one with write access."
            ) from None
    return repo if "/" in repo else f"{user}/{repo}"


def _commit(
    api: HfApi, there: Repository, private: bool, contents: Contents, gone: Collection[str], on_stage: Callable
) -> str:
    repo = there.name
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.files.items()]
    operations += [CommitOperationDelete(name) for name in gone]
    size = sum(operation.upload_info.size for operation in operations if isinstance(operation, CommitOperationAdd))
    on_stage(f"Uploading {len(contents.files)} files, {size / 1e6:,.1f} MB, to {repo}")
    with translate_hub_errors(repo):
        ModelCard(contents.files[CARD].decode()).validate()  # type: ignore[union-attr]
        if there.commit is None:  # not exist_ok: what somebody else made meanwhile has not been looked at
            api.create_repo(repo, private=private)
        parent = there.commit or api.model_info(repo).sha
        done = api.create_commit(repo, operations, commit_message="Student, card and evidence", parent_commit=parent)
    return str(done.oid)


def _cache_of(run: Run) -> str:
    """The folder of the cache that taught a run.

    Raises:
        DistillError: its teacher is no cache on this machine.
    """
    teacher = run.recipe.teacher
    path = teacher.path if teacher and teacher.kind == "cached" else None
    if path is None or reference_kind(path) == "address" or not Path(path).is_dir():
        raise DistillError("--with cache: the run's teacher is no cache on this machine.")
    return path


def _size_of_cache(run: Run) -> int:
    """Bytes of the cache that taught a run; its files are checked, as they are before an upload."""
    from ..cache import verify_cache

    path = Path(_cache_of(run))
    verify_cache(path)
    return sum(file.stat().st_size for file in path.iterdir())


def _push_cache(run: Run, repo: str, private: bool, replace: bool, on_stage: Callable[[str], None]) -> str:
    from ..cache.hub import push_cache

    path = _cache_of(run)
    on_stage(f"Uploading the teacher's cache to datasets/{repo}-cache")
    return push_cache(path, f"{repo}-cache", private, replace)
