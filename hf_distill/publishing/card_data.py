"""What a run's folder says of its student, as the facts of a card."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from ..analysis.curve import compute, trained_tokens
from ..core.io import damage_reported, read_json
from ..core.references import public_name
from ..errors import DistillError
from ..hub.licenses import License, LicenseDecision, decide_license, get_license
from ..model_card import CardData, unmeasured
from ..recipe.downloads import random_models
from ..recipe.models import Student, TeacherSpec
from ..recipe.schema import Recipe
from ..runner.run_results import Run

_PLAIN, _PROMPT = 20, 120  # characters, at least and at most, of the line of a sample's prompt that a card shows


Lookup: TypeAlias = Callable[[str, str | None], License | None]


def run_card_data(
    run: Run, repo: str, licence: str | None = None, base_model: str | None = None, lookup: Lookup = get_license
) -> CardData:
    """The evidence of a run that is over.

    Args:
        run: see `open_run`.
        repo: org/name of the student.
        licence: that its author wants; None: inherited.
        base_model: id of what the student began as, where the recipe names a file or a package.
        lookup: the licence of a model at a revision; None where it is not looked up.

    Raises:
        DistillError: the run is not over; a model's licence cannot be looked up.
    """
    evidence = run.results
    if evidence.get("status") != "done":
        raise DistillError(
            f"The run in {run.folder} is not over: `hf-distill run {run.folder / 'recipe.yaml'} --resume` ends it."
        )
    known = evidence.get("provenance", {})
    held_out = {name: _metrics(metrics) for name, metrics in evidence["models"].items()}
    retention = read_json(run.folder / "retention.json").get("tasks", [])
    diagnosis = _verdicts(run)
    teachers = teachers_of(run.recipe, evidence, lookup)
    return CardData(
        repo=repo,
        task="text-generation",
        student=_student(run, known) | ({"base_model": base_model} if base_model else {}),
        teachers=teachers,
        objective=run.recipe.distill.model_dump() | {"losses": [loss.model_dump() for loss in run.recipe.losses]},
        data=evidence.get("data", {}) | {"sources": _sources(run, known)},
        training=_training(run),
        held_out=held_out,
        environment=evidence.get("environment", {}),
        licence=judged_of(run.recipe, teachers, repo, licence, base_model, lookup),
        not_measured=[*_smoke_note(run.recipe), *unmeasured(held_out, retention, diagnosis)],
        retention=retention,
        diagnosis=diagnosis,
        recipe=_recipe(run),
        origin=run.recipe.origin,
        prompt=_prompt(run),
    )


def _smoke_note(recipe: Recipe) -> list[str]:
    if not random_models(recipe):
        return []
    return ["Anything: this is a smoke run of tiny models that began with random weights, so no figure means anything."]


def _recipe(run: Run) -> dict[str, Any]:
    """The recipe as it ran, without what is as by default; its folder is named as others would name theirs."""
    values = run.recipe.model_dump(exclude_none=True, exclude_defaults=True)
    values["distill"] = run.recipe.distill.model_dump()
    values["train"] = {**values["train"], "output_dir": f"runs/{run.folder.resolve().name}"}
    return values


def _metrics(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name != "train_seconds"}


def _verdicts(run: Run) -> dict[str, str] | None:
    file = run.folder / "diagnosis.json"
    found = read_json(file)
    with damage_reported(file):
        if not found or found.get("smoke"):  # the figures of a smoke run are not judged
            return None
        return {verdict["name"]: verdict["text"] for verdict in found["verdicts"]}


def _student(run: Run, known: dict[str, Any]) -> dict[str, Any]:
    """What the student is, and of whose weights it was made."""
    spec, evidence = run.recipe.student, run.results
    donor: Student | TeacherSpec = (
        run.recipe.primary_teacher if spec.from_teacher and run.recipe.primary_teacher.model else spec
    )
    role = "teacher" if donor is not spec else "student"
    return {
        "model": public_name(donor.model),
        "revision": known.get(role, {}).get("revision"),
        "adapters": spec.lora is not None and run.recipe.export == "adapter",
        **{key: value for key, value in evidence.get("student", {}).items() if key in _SIZES},
    }


_SIZES = ("parameters", "blocks", "layers_kept")


def teachers_of(
    recipe: Recipe, evidence: Mapping[str, Any] = MappingProxyType({}), lookup: Lookup = get_license
) -> dict[str, dict[str, Any]]:
    """What is known of each teacher, its licence too.

    Args:
        recipe: as it ran, or will.
        evidence: of its run; empty before it.
        lookup: see `run_card_data`.

    Raises:
        DistillError: see `get_license`.
    """
    found = {}
    for spec in recipe.all_teachers:
        name, spoken = getattr(spec, "name", "teacher"), spec.source_teacher
        known = evidence.get("provenance", {}).get(name, {})
        facts = known | {"kind": spec.kind, "model": public_name(spoken.model)}
        facts |= {"quantization": spoken.quantization} if spoken.quantization else {}
        if spoken is recipe.primary_teacher:
            sizes = evidence.get("teacher", {})
            facts |= {key: sizes[key] for key in ("parameters", "blocks") if key in sizes}
        if spoken.model and (licence := lookup(spoken.model, spoken.revision)):
            facts |= {"licence": licence.id, "link": licence.link, "forbids": licence.forbids}
        found[name] = facts
    return found


def judged_of(
    recipe: Recipe,
    teachers: dict[str, dict[str, Any]],
    repo: str,
    wanted: str | None,
    base_model: str | None,
    lookup: Lookup = get_license,
) -> LicenseDecision:
    """The licence of a recipe's student; of one that was cut from its teacher, the teacher's is its own base's.

    Args:
        recipe: as it ran, or will.
        teachers: see `teachers_of`.
        repo: org/name of the student.
        wanted: the licence that its author wants; None: inherited.
        base_model: see `run_card_data`.
        lookup: see `run_card_data`.
    """
    given = {name: License(t["licence"], t["link"], t["forbids"]) for name, t in teachers.items() if "licence" in t}
    spec, own = recipe.student, None
    if base_model:
        own = lookup(base_model, None)
    elif not spec.from_teacher or not recipe.primary_teacher.model:
        own = lookup(str(spec.model), spec.revision)
    return decide_license(given, own, repo, wanted)


def _sources(run: Run, known: dict[str, Any]) -> dict[str, dict[str, Any]]:
    sources: dict[str, Any] = dict(run.recipe.data.sources)
    if run.recipe.data.eval.path:
        sources["eval"] = run.recipe.data.eval
    return {
        name: {"dataset": public_name(source.path), **_of_hub(known.get(f"data {name}", {}))}
        for name, source in sources.items()
    }


def _of_hub(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("revision", "version") if key in entry}


def _training(run: Run) -> dict[str, Any]:
    """Steps, tokens, operations; of a chain those of all its stages."""
    evidence, train = run.results, run.recipe.train
    if chain := evidence.get("chain"):
        stages = [part for part in chain if part["stage"] != "direct"]
        sizes = [f"{p['student']['blocks']} blocks after {p['steps']} steps" for p in stages]
        seconds = sum(p["train_seconds"] for p in stages)
        return {"steps": sum(p["steps"] for p in stages), "seconds": seconds, "stages": "; ".join(sizes)}
    steps = max((line["step"] for line in run.logs()), default=0)
    found = {
        "steps": steps,
        "rows_per_step": (train.per_device_train_batch_size or 8) * (train.gradient_accumulation_steps or 1),
        "tokens": trained_tokens(run, steps),
        "learning_rate": train.learning_rate,
        "seconds": evidence["models"]["student"].get("train_seconds"),
    }
    try:
        cost = compute(run.recipe, found["tokens"])
    except DistillError:  # of a shape that nobody knows
        return found
    return found | {"flop_student": cost.student, "flop_teacher": cost.teacher}


def _prompt(run: Run) -> str | None:
    """A line of a sample's prompt, cut at the end of a word; None where there is none in plain words."""
    file = run.folder / "samples.json"
    samples = read_json(file).get("samples", [])
    with damage_reported(file):
        lines = [line.strip() for s in samples for line in s["prompt"].splitlines() if "<|" not in line]
    plain = next((line for line in lines if len(line) >= _PLAIN and line[0].isalpha()), None)
    if plain is None or len(plain) <= _PROMPT:
        return plain
    return plain[:_PROMPT].rpartition(" ")[0] or plain[:_PROMPT]
