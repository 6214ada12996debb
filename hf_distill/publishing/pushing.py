"""One commit that brings a student to the Hub, or nothing."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError

from ..analysis.folder import Run
from ..card import Facts
from ..errors import DistillError
from ..hub import asking
from ..hub.licences import Judged
from ..names import is_id, kind_of
from ..recipe.schema import Recipe
from .contents import Contents, contents_of, is_ours
from .gathering import facts_of, judged_of, teachers_of

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
    """

    url: str
    commit: str
    files: list[str]
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cache: str | None = None


def publish(
    run: Run,
    repo: str,
    private: bool = False,
    include: Collection[str] = (),
    licence: str | None = None,
    accept_licence: bool = False,
    base_model: str | None = None,
    replace: bool = False,
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
        replace: take the place of a model with another base.
        on_stage: told in a few words what begins.

    Raises:
        DistillError: the run is not over; no token; a licence conflict; the repository is of a model with another base,
            or public while `private` is wanted; see `hub.asking`.
    """
    if unknown := sorted({*include} - {*WITH}):
        raise DistillError(f"--with takes {', '.join(WITH)}; got {', '.join(unknown)}.")
    api = HfApi()
    repo = _whole_name(api, repo)
    on_stage(f"Gathering what is known of {run.folder}")
    facts = facts_of(run, repo, licence, base_model)
    _check_licence(facts.licence, accept_licence)
    contents = contents_of(run, facts, "report" in include)
    before = _before(api, repo)
    _check_before(before, facts, private, replace)
    cache = _push_cache(run, repo, private, on_stage) if "cache" in include else None
    commit = _commit(api, repo, private, before, contents, on_stage)
    url = f"{api.endpoint}/{repo}"
    return Published(
        url, commit, sorted(contents.files), contents.left_out, [*facts.licence.notes, *contents.notes], cache
    )


def check_ready(recipe: Recipe, repo: str, accept_licence: bool = False) -> None:
    """Before a run whose student is to be published: token, licences and repository, as far as they can be known.

    Raises:
        DistillError: see `publish`.
    """
    api = HfApi()
    repo = _whole_name(api, repo)
    _check_licence(judged_of(recipe, teachers_of(recipe), repo, None, None), accept_licence)
    _before(api, repo)


def _check_licence(judged: Judged, accepted: bool) -> None:
    if judged.conflicts and not accepted:
        lines = "\n".join(f"  {line}" for line in judged.conflicts)
        raise DistillError(
            f"The licences say otherwise:\n{lines}\nRead them. If you may publish it nevertheless, add "
            "--accept-license (and --license ID to say under which); the card will say so."
        )


def _whole_name(api: HfApi, repo: str) -> str:
    """org/name; checks that somebody is logged in."""
    with asking(repo):
        try:
            user = api.whoami()["name"]
        except LocalTokenNotFoundError:
            raise DistillError(
                "No token is set: run `hf auth login`, or set HF_TOKEN to one with write access."
            ) from None
    return repo if "/" in repo else f"{user}/{repo}"


def _before(api: HfApi, repo: str) -> Any:
    """The repository's info; None if there is none."""
    with asking(repo):
        try:
            return api.model_info(repo)
        except RepositoryNotFoundError:
            return None


def _check_before(info: Any, facts: Facts, private: bool, replace: bool) -> None:
    if info is None:
        return
    if private and not info.private:
        raise DistillError(f"{facts.repo} is public already, and --private is wanted: make it private on its page.")
    then = info.card_data.to_dict().get("base_model") if info.card_data else None
    then = [then] if isinstance(then, str) else then or []
    own = facts.student.get("base_model") or facts.student.get("model")
    own = [own] if is_id(own) else []
    weights = any(sibling.rfilename.endswith(".safetensors") for sibling in info.siblings or ())
    if weights and then != own and not replace:
        raise DistillError(
            f"{facts.repo} holds a model with another base ({', '.join(then) or 'not said'}; this one's: "
            f"{', '.join(own) or 'not said'}). Give another name, or add --replace."
        )


def _commit(
    api: HfApi, repo: str, private: bool, before: Any, contents: Contents, on_stage: Callable[[str], None]
) -> str:
    there = [sibling.rfilename for sibling in before.siblings or ()] if before else []
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.files.items()]
    operations += [CommitOperationDelete(n) for n in there if is_ours(n) and n not in contents.files]
    size = sum(operation.upload_info.size for operation in operations if isinstance(operation, CommitOperationAdd))
    on_stage(f"Uploading {len(contents.files)} files, {size / 1e6:,.1f} MB, to {repo}")
    with asking(repo):
        ModelCard(contents.files["README.md"].decode()).validate()  # type: ignore[union-attr]
        api.create_repo(repo, private=private, exist_ok=True)
        parent = before.sha if before else api.model_info(repo).sha
        done = api.create_commit(repo, operations, commit_message="Student, card and evidence", parent_commit=parent)
    return str(done.oid)


def _push_cache(run: Run, repo: str, private: bool, on_stage: Callable[[str], None]) -> str:
    from ..cache.hub import push_cache

    teacher = run.recipe.teacher
    path = teacher.path if teacher and teacher.kind == "cached" else None
    if path is None or kind_of(path) == "address":
        raise DistillError("--with cache: the run's teacher is no cache on this machine.")
    on_stage(f"Uploading the teacher's cache to datasets/{repo}-cache")
    return push_cache(path, f"{repo}-cache", private)
