"""Collect the data of a model card from the folder of a run."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

from ..analysis.curve import compute, rows_per_step, trained_tokens
from ..core import run_files
from ..core.io import damage_reported, read_json
from ..core.json_types import JSONObject
from ..core.references import public_name
from ..core.results import Metrics, Provenance, Results
from ..core.server_urls import without_servers
from ..errors import DistillError
from ..generation.evaluation import GENERATED, KEPT
from ..hub.licenses import License, LicenseDecision, decide_license, get_license
from ..model_card import CardData, DatasetFacts, SourceFacts, StudentFacts, TeacherFacts, TrainingFacts, unmeasured
from ..model_card.data import GenerationFacts, is_server_name
from ..recipe.data import Eval, Source
from ..recipe.downloads import random_models
from ..recipe.models import Student, TeacherSpec
from ..recipe.schema import Recipe
from ..recipe.tasks import TEXT_GENERATION, target_noun
from ..runner.run_results import Run

MIN_PROMPT_CHARACTERS, MAX_PROMPT_CHARACTERS = 20, 120  # of the line of a sample's prompt that a card shows

Lookup: TypeAlias = Callable[[str, str | None], License | None]


def run_card_data(
    run: Run, repo: str, license: str | None = None, base_model: str | None = None, lookup: Lookup = get_license
) -> CardData:
    """Collect the card data of a finished run.

    Args:
        run: see `open_run`.
        repo: id of the student's repository, org/name.
        license: id of the license that the author chooses; None: inherited from teacher and base model.
        base_model: id of the model that the student was initialized from, where the recipe names a file or a package.
        lookup: returns the license of a model at a revision, or None where it is not looked up.

    Raises:
        DistillError: the run is not finished; the license of a model cannot be looked up.
    """
    results = run.results
    if results.get("status") != "done":
        raise DistillError(
            f"The run in {run.folder} is not finished. Finish it with "
            f"`hf-distill run {run.folder / run_files.RECIPE} --resume`."
        )
    provenance = results.get("provenance", {})
    held_out = {name: _metrics(metrics) for name, metrics in results["models"].items()}
    retention = read_json(run.folder / run_files.RETENTION).get("tasks", [])
    diagnosis = _diagnosis(run)
    teachers = teacher_cards(run.recipe, results, lookup)
    student = _student(run, provenance)
    if base_model:
        student["base_model"] = base_model
    objective = run.recipe.distill
    return CardData(
        repo=repo,
        task=run.recipe.task,
        target=target_noun(run.recipe),
        student=student,
        teachers=teachers,
        objective={
            "temperature": objective.soft_temperature or objective.temperature,
            "alpha": objective.alpha,
            "divergence": objective.soft_loss,
            "losses": [loss.model_dump() for loss in run.recipe.losses],
            "by_origin": objective.model_dump(exclude_none=True).get("by_origin"),
        },
        data=cast(DatasetFacts, {**results.get("data", {}), "sources": _sources(run, provenance)}),
        training=_training(run),
        held_out=held_out,
        environment=results.get("environment", {}),
        license=decide_student_license(run.recipe, teachers, repo, license, base_model, lookup),
        not_measured=[*_smoke_note(run.recipe), *unmeasured(held_out, retention, diagnosis, "quantization" in student)],
        retention=retention,
        diagnosis=diagnosis,
        recipe=_recipe(run),
        origin=run.recipe.origin,
        prompt=_prompt(run),
    )


def _smoke_note(recipe: Recipe) -> list[str]:
    if not random_models(recipe):
        return []
    return ["Anything: this is a smoke run of tiny models with random initial weights, so no number is meaningful."]


def _recipe(run: Run) -> JSONObject:
    """Return the recipe as it ran, without defaults, with a relative output folder and without URLs of servers."""
    values = run.recipe.model_dump(exclude_none=True, exclude_defaults=True)
    values["distill"] = run.recipe.distill.model_dump()
    values["train"] = {**values["train"], "output_dir": f"runs/{run.folder.resolve().name}"}
    if "generate" in values:
        values["generate"] = {key: value for key, value in values["generate"].items() if key != "output_dir"}
    return without_servers(values)


def _metrics(metrics: Metrics) -> Metrics:
    return {name: value for name, value in metrics.items() if name != "train_seconds"}


def _diagnosis(run: Run) -> dict[str, str] | None:
    file = run.folder / run_files.DIAGNOSIS
    diagnosis = read_json(file)
    with damage_reported(file):
        if not diagnosis or diagnosis.get("smoke"):  # numbers of a smoke run mean nothing
            return None
        return {verdict["name"]: verdict["text"] for verdict in diagnosis["verdicts"]}


def _student(run: Run, provenance: Mapping[str, Provenance]) -> StudentFacts:
    """Return the student's sizes and the model from which its weights were taken."""
    spec = run.recipe.student
    origin: Student | TeacherSpec = (
        run.recipe.primary_teacher if spec.from_teacher and run.recipe.primary_teacher.loaded_model else spec
    )
    role = "teacher" if origin is not spec else "student"
    return {
        "model": public_name(origin.model),
        "revision": provenance.get(role, {}).get("revision"),
        "adapters": spec.lora is not None and run.recipe.export == "adapter",
        **run.results.get("student", {}),
    }


def teacher_cards(
    recipe: Recipe, results: Results | None = None, lookup: Lookup = get_license
) -> dict[str, TeacherFacts]:
    """Return name -> what a card says of the teacher, its license included.

    Args:
        recipe: the recipe of the run.
        results: results.json of the run; None before the run.
        lookup: see `run_card_data`.

    Raises:
        DistillError: see `get_license`.
    """
    cards = {}
    results = results or {}
    for spec in recipe.all_teachers:
        name, source = getattr(spec, "name", "teacher"), spec.source_teacher
        provenance = results.get("provenance", {}).get(name, {})
        card = cast(TeacherFacts, {**provenance, "kind": spec.kind, "model": source.model})
        card |= cast(TeacherFacts, results.get("servers", {}).get(name, {}))
        card["model"] = public_name(card["model"])
        if source.quantization:
            card["quantization"] = source.quantization
        if source is recipe.primary_teacher:
            sizes = {key: size for key, size in results.get("teacher", {}).items() if key != "block_influence"}
            card |= cast(TeacherFacts, sizes)
        if spec.kind == "cached" and source.kind == "remote":
            card["served"] = True
        model = card["model"] if source.kind == "remote" else source.model
        if model and not is_server_name(card) and (license := lookup(model, source.revision)):
            card |= {"license": license.id, "link": license.link, "forbids": license.forbids}
        cards[name] = card
    return cards


def decide_student_license(
    recipe: Recipe,
    teachers: Mapping[str, TeacherFacts],
    repo: str,
    license: str | None,
    base_model: str | None,
    lookup: Lookup = get_license,
) -> LicenseDecision:
    """Decide the license of a recipe's student; the base model of a pruned student is its teacher.

    Args:
        recipe: the recipe of the run.
        teachers: see `teacher_cards`.
        repo: id of the student's repository, org/name.
        license: id of the license that the author chooses; None: inherited.
        base_model: see `run_card_data`.
        lookup: see `run_card_data`.
    """
    teacher_licenses = {
        name: License(t["license"], t["link"], t["forbids"]) for name, t in teachers.items() if "license" in t
    }
    spec, base_license = recipe.student, None
    if base_model:
        base_license = lookup(base_model, None)
    elif not spec.from_teacher or not recipe.primary_teacher.loaded_model:
        base_license = lookup(str(spec.model), spec.revision)
    return decide_license(teacher_licenses, base_license, repo, license)


def _sources(run: Run, provenance: Mapping[str, Provenance]) -> dict[str, SourceFacts]:
    sources: dict[str, Source | Eval] = dict(run.recipe.data.sources)
    if run.recipe.data.eval.path:
        sources["eval"] = run.recipe.data.eval
    facts: dict[str, SourceFacts] = {}
    file = run.folder / run_files.GENERATED_DATA
    evaluations = read_json(file)
    for name, source in sources.items():
        entry = provenance.get(f"data {name}", {})
        facts[name] = {"dataset": public_name(source.path)}
        if "revision" in entry:
            facts[name]["revision"] = entry["revision"]
        if "version" in entry:
            facts[name]["version"] = entry["version"]
        if evaluation := evaluations.get(name):
            with damage_reported(file):
                facts[name]["generated"] = _generation(evaluation)
    return facts


def _generation(evaluation: Mapping[str, Any]) -> GenerationFacts:
    kept = evaluation["measures"][KEPT]["rows"]
    completions = evaluation["measures"].get(GENERATED, {}).get("rows", kept)
    return {"model": evaluation["model"], "completions": completions, "kept": kept}


def _training(run: Run) -> TrainingFacts:
    """Return steps, tokens, seconds and FLOP; for a progressive run the sums over its stages."""
    results, train = run.results, run.recipe.train
    if chain := results.get("chain"):
        stages = [part for part in chain if part["stage"] != "direct"]
        sizes = [f"{p['student']['layers']} layers after {p['steps']} steps" for p in stages]
        seconds = sum(p["train_seconds"] for p in stages)
        return {"steps": sum(p["steps"] for p in stages), "seconds": seconds, "stages": "; ".join(sizes)}
    steps = max((int(line["step"]) for line in run.logs()), default=0)
    training: TrainingFacts = {
        "steps": steps,
        "rows_per_step": rows_per_step(run),
        "learning_rate": train.learning_rate,
        "seconds": results["models"]["student"].get("train_seconds"),
    }
    if run.recipe.task != TEXT_GENERATION:
        return training
    training["tokens"] = tokens = trained_tokens(run, steps)
    try:
        cost = compute(run.recipe, tokens)
    except DistillError:  # the config of a model is not found
        return training
    return training | {"flop_student": cost.student, "flop_teacher": cost.teacher}


def _prompt(run: Run) -> str | None:
    """Return a line of a sample's prompt, cut at the end of a word; None where no line is plain text."""
    file = run.folder / run_files.SAMPLES
    samples = read_json(file).get("samples", [])
    with damage_reported(file):
        lines = [line.strip() for s in samples for line in s["prompt"].splitlines() if "<|" not in line]
    plain = next((line for line in lines if len(line) >= MIN_PROMPT_CHARACTERS and line[0].isalpha()), None)
    if plain is None or len(plain) <= MAX_PROMPT_CHARACTERS:
        return plain
    return plain[:MAX_PROMPT_CHARACTERS].rpartition(" ")[0] or plain[:MAX_PROMPT_CHARACTERS]
