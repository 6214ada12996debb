"""Publish a student on the Hub in one commit; an error leaves the repository unchanged."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError

from ..core.references import reference_kind
from ..errors import DistillError
from ..hub import translate_hub_errors
from ..hub.licenses import License, LicenseDecision, get_license
from ..recipe.downloads import smoke_run
from ..recipe.schema import Recipe
from ..runner.run_results import Run
from .card_data import decide_student_license, run_card_data, teacher_cards
from .files import Contents, collect_files
from .repository import CARD, Repository, check_repository, check_repository_id, files_to_delete, read_repository

INCLUDABLE = ("cache", "report")


@dataclass(frozen=True)
class Published:
    """A published student.

    url:      URL of its page
    commit:   the commit that published it; the newest commit if nothing had changed
    files:    paths of the published files
    left_out: files of the student's folder that were not published
    notes:    requirements of licenses, and problems that users of the model will have
    cache:    URI of the teacher cache, if it was published too
    deleted:  files that were deleted from the repository
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
    """The files that `publish` would upload, and problems of their licenses.

    card:     content of README.md
    sizes:    file -> bytes
    left_out: files of the student's folder that would not be published
    license:  the decision from the licenses that are known
    unknown:  model -> why its license could not be looked up
    notes:    problems that users of the model will have
    cache:    bytes of the teacher cache; None: it would not be published
    smoke:    why the run is a smoke run, which needs `allow_smoke`; None: it is not a smoke run
    """

    card: str
    sizes: dict[str, int]
    left_out: list[str]
    license: LicenseDecision
    unknown: dict[str, str]
    notes: list[str]
    cache: int | None = None
    smoke: str | None = None


def publish(
    run: Run,
    repo: str,
    private: bool = False,
    include: Collection[str] = (),
    license: str | None = None,
    accept_license: bool = False,
    base_model: str | None = None,
    replace: bool = False,
    allow_smoke: bool = False,
    on_stage: Callable[[str], None] = lambda message: None,
) -> Published:
    """Publish a run's student with its model card, its distillation.json and its plots, in one commit.

    An interruption leaves the repository unchanged: files are uploaded first, and become visible with the commit.
    A second call uploads only files that have changed.

    Args:
        run: see `open_run`.
        repo: org/name, or a name in the user's namespace; the repository is created if it does not exist.
        private: create the repository as private.
        include: "report" for report.html; "cache" for the teacher cache, as the dataset repository org/name-cache.
        license: id of the license that the author chooses; None: inherited.
        accept_license: publish despite conflicts with the licenses of the teacher and the base model.
        base_model: id of the model that the student was initialized from, where the recipe names a file or a package.
        replace: replace another model, weights of any format, and a card that `publish` did not write.
        allow_smoke: publish a smoke run, whose models have random initial weights; the card states it.
        on_stage: called with a short message when a stage begins.

    Returns:
        the address and the commit of the published student.

    Raises:
        DistillError: the run is not finished, or is a smoke run; `repo` is not a repository id; there is no token;
            licenses conflict; the repository contains files that `publish` did not write, or is public although
            `private` is set; the Hub refuses a request. See `check_repository` and `translate_hub_errors`.
    """
    _check_arguments(repo, include, base_model)
    if (smoke := smoke_run(run.recipe)) and not allow_smoke:
        raise DistillError(f"{smoke} To publish it nevertheless, add --allow-smoke; the card will state it.")
    api = HfApi()
    repo = _full_repo_id(api, repo)
    on_stage(f"Collecting the files and the card of {run.folder}")
    card_data = run_card_data(run, repo, license, base_model)
    _check_license(card_data.license, accept_license)
    contents = collect_files(run, card_data, "report" in include)
    repository = read_repository(api, repo)
    check_repository(repository, contents.files, private, replace, card_data)
    deleted = files_to_delete(repository, contents.files, replace)
    cache = _push_cache(run, repo, private, replace, on_stage) if "cache" in include else None
    commit = _commit(api, repository, private, contents, deleted, on_stage)
    url = f"{api.endpoint}/{repo}"
    notes = [*card_data.license.notes, *contents.notes]
    return Published(url, commit, sorted(contents.files), contents.left_out, notes, cache, deleted)


def dry_run(
    run: Run, repo: str, include: Collection[str] = (), license: str | None = None, base_model: str | None = None
) -> DryRun:
    """Return what `publish` would upload, without reading the repository; it needs no token and no connection.

    Args:
        run: see `open_run`.
        repo: org/name, or a name in the user's namespace.
        include: see `publish`.
        license: see `publish`.
        base_model: see `publish`.

    Raises:
        DistillError: the run is not finished; `repo` is not a repository id; or a file that would be published is
            missing or damaged.
    """
    _check_arguments(repo, include, base_model)
    unknown: dict[str, str] = {}

    def lookup(model: str, revision: str | None) -> License | None:
        try:
            return get_license(model, revision, retries=False)
        except DistillError as error:
            unknown[model] = str(error)
            return None

    card_data = run_card_data(run, repo, license, base_model, lookup)
    contents = collect_files(run, card_data, "report" in include)
    sizes = {name: content.stat().st_size if isinstance(content, Path) else len(content)
             for name, content in sorted(contents.files.items())}  # fmt: skip
    cache = _cache_bytes(run) if "cache" in include else None
    card = bytes(contents.files[CARD]).decode()
    smoke = smoke_run(run.recipe)
    return DryRun(card, sizes, contents.left_out, card_data.license, unknown, contents.notes, cache, smoke)


def _check_arguments(repo: str, include: Collection[str], base_model: str | None) -> None:
    """Check the arguments without a request to the Hub."""
    check_repository_id(repo)
    if "cache" in include:
        check_repository_id(f"{repo}-cache", "The repository id of the cache")
    if base_model is not None:
        check_repository_id(base_model, "--base-model")
    if unknown := sorted({*include} - {*INCLUDABLE}):
        raise DistillError(f"--include accepts {', '.join(INCLUDABLE)}; got {', '.join(unknown)}.")


def check_ready(recipe: Recipe, repo: str, accept_license: bool = False) -> None:
    """Check token, licenses and repository before a run whose student is to be published, as far as possible.

    Args:
        recipe: the recipe of the run.
        repo: org/name, or a name in the user's namespace.
        accept_license: see `publish`.

    Raises:
        DistillError: see `publish`.
    """
    check_repository_id(repo, "train.hub_model_id")
    api = HfApi()
    repo = _full_repo_id(api, repo)
    _check_license(decide_student_license(recipe, teacher_cards(recipe), repo, None, None), accept_license)
    check_repository(read_repository(api, repo), [CARD], private=bool(recipe.train.hub_private_repo), replace=False)
    if smoke := smoke_run(recipe):
        raise DistillError(
            f"{smoke} Do not set train.push_to_hub, or publish it with `hf-distill publish --allow-smoke`."
        )


def _check_license(decision: LicenseDecision, is_accepted: bool) -> None:
    if decision.conflicts and not is_accepted:
        lines = "\n".join(f"  {line}" for line in decision.conflicts)
        raise DistillError(
            f"The licenses of the models do not permit publishing this student:\n{lines}\nRead the licenses. If you "
            "may publish it nevertheless, add --accept-license, and --license ID to choose its license; the card will "
            "state the conflict."
        )


def _full_repo_id(api: HfApi, repo: str) -> str:
    """Return org/name; raise if there is no token."""
    with translate_hub_errors(repo):
        try:
            user = api.whoami()["name"]
        except LocalTokenNotFoundError:
            raise DistillError(
                "No token is set. Run `hf auth login`, or set HF_TOKEN to a token with write access."
            ) from None
    return repo if "/" in repo else f"{user}/{repo}"


def _commit(
    api: HfApi, repository: Repository, private: bool, contents: Contents, deleted: Collection[str], on_stage: Callable
) -> str:
    repo = repository.name
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content) for name, content in contents.files.items()
    ]
    operations += [CommitOperationDelete(name) for name in deleted]
    size = sum(operation.upload_info.size for operation in operations if isinstance(operation, CommitOperationAdd))
    on_stage(f"Uploading {len(contents.files)} files, {size / 1e6:,.1f} MB, to {repo}")
    with translate_hub_errors(repo):
        try:
            ModelCard(contents.files[CARD].decode()).validate()  # type: ignore[union-attr]
        except ValueError as error:
            raise DistillError(f"The Hub does not accept the card of the student: {error}") from None
        if repository.commit is None:  # without exist_ok, because a repository created meanwhile has not been checked
            api.create_repo(repo, private=private)
        parent = repository.commit or api.model_info(repo).sha
        commit = api.create_commit(repo, operations, commit_message="Student, card and evidence", parent_commit=parent)
    return str(commit.oid)


def _cache_folder(run: Run) -> str:
    """Return the folder of the teacher cache of a run.

    Raises:
        DistillError: its teacher is not a local cache.
    """
    teacher = run.recipe.teacher
    path = teacher.path if teacher and teacher.kind == "cached" else None
    if path is None or reference_kind(path) == "address" or not Path(path).is_dir():
        raise DistillError(
            "--include cache needs a run whose teacher is a teacher cache in a local folder (teacher.kind=cached); "
            "the teacher of this run is not."
        )
    return path


def _cache_bytes(run: Run) -> int:
    """Return the bytes of the teacher cache of a run, and verify its files as before an upload."""
    from ..cache import verify_cache

    path = Path(_cache_folder(run))
    verify_cache(path)
    return sum(file.stat().st_size for file in path.iterdir())


def _push_cache(run: Run, repo: str, private: bool, replace: bool, on_stage: Callable[[str], None]) -> str:
    from ..cache.hub import push_cache

    path = _cache_folder(run)
    on_stage(f"Uploading the teacher cache to datasets/{repo}-cache")
    return push_cache(path, f"{repo}-cache", private, replace)
