"""Generates the card of a distilled model: metadata for the Hub, and text, tables and figures from the template."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..core.escape import code_block, code_span, markdown, yaml_text
from ..core.extras import install_command
from ..core.held_out_metrics import shown_metrics
from ..core.references import is_id
from .data import CardData, StudentFacts, is_server_name
from .snippet import snippet_of
from .tables import held_out_table, retention_table
from .text import license_lines, summary_of, training_lines

TAGS = ("distillation", "hf-distill")


@dataclass(frozen=True)
class Figure:
    """A plot of the report: its path in the repository, and a caption."""

    path: str
    caption: str


def build_card(facts: CardData, figures: Sequence[Figure] = ()) -> ModelCard:
    """Return the card of a distilled model.

    Args:
        facts: data of its distillation.
        figures: plots in the same repository.
    """
    return ModelCard.from_template(
        _metadata(facts),
        template_str=files("hf_distill.model_cards").joinpath("template.md").read_text(),
        title=markdown(facts.repo.rpartition("/")[2]),
        summary=summary_of(facts),
        snippet=code_block(snippet, "python") if (snippet := snippet_of(facts)) else None,
        held_out=held_out_table(facts.held_out, facts.target, "quantization" in facts.student, facts.control),
        retention=retention_table(facts.retention),
        figures=[Figure(quote(figure.path), markdown(figure.caption)) for figure in figures],
        diagnosis={code_span(name): markdown(text) for name, text in (facts.diagnosis or {}).items()},
        not_measured=facts.not_measured,
        training=training_lines(facts),
        recipe=code_block(yaml_text(facts.recipe), "yaml") if facts.recipe else None,
        origin=code_span(facts.origin) if facts.origin else None,
        install=code_span(install_command(facts.recipe)) if facts.recipe else None,
        license_lines=license_lines(facts),
    )


def _metadata(facts: CardData) -> ModelCardData:
    base_models = [base] if (base := _hub_id(facts.student)) else []
    names = [name for entry in facts.data.get("sources", {}).values() if (name := entry.get("dataset")) and is_id(name)]
    results = _results(facts)
    return ModelCardData(
        model_name=facts.repo.rpartition("/")[2] if results else None,
        eval_results=results or None,
        metrics=[m.hub_name for m in shown_metrics([facts.held_out.get("student", {})]) if m.hub_name] or None,
        library_name=_library(facts.student),
        pipeline_tag=facts.task,
        license=facts.license.id,
        base_model=base_models or None,
        base_model_relation=("adapter" if facts.student.get("adapters") else "finetune") if base_models else None,
        teacher_model=_teacher_models(facts) or None,
        datasets=list(dict.fromkeys(names)) or None,
        tags=[*TAGS],
        widget=[{"messages" if not isinstance(facts.prompt, str) else "text": facts.prompt}] if facts.prompt else None,
    )


def _teacher_models(facts: CardData) -> list[str]:
    """Return the ids of the teachers that are on the Hub."""
    teachers = [teacher for teacher in facts.teachers.values() if not is_server_name(teacher)]
    return [model for teacher in teachers if (model := teacher.get("model")) and is_id(model)]


def _library(student: StudentFacts) -> str:
    if student.get("adapters"):
        return "peft"
    return "pytorch" if student.get("class_name") else "transformers"


def _hub_id(student: StudentFacts) -> str | None:
    name = student.get("base_model") or student.get("model")
    return name if name and is_id(name) else None


def _results(facts: CardData) -> list[EvalResult]:
    """The metrics of the student for the model index; the card shows the teacher's as well."""
    source = next((entry["dataset"] for entry in facts.data.get("sources", {}).values()), None)
    title = f"held-out rows of {source}" if source else "held-out rows"
    student = facts.held_out.get("student", {})
    held_out = (source or "held-out", title)
    values = [
        (*held_out, metric.hub_name or metric.key, metric.title, student[metric.key])
        for metric in shown_metrics([student], facts.target)
    ]
    for task in facts.retention:
        if score := task["scores"].get("student"):
            values.append((task["task"], task["task"], task["metric"], task["metric"], score["value"]))
    return [
        EvalResult(
            task_type=facts.task or "other",
            dataset_type=dataset,
            dataset_name=dataset_title,
            metric_type=metric,
            metric_name=metric_title,
            metric_value=round(value, 6),
        )
        for dataset, dataset_title, metric, metric_title, value in values
    ]
