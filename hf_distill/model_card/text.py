"""The sentences of a card."""

from collections.abc import Mapping
from typing import Any

from ..core.escape import code_span, markdown
from ..core.references import is_id
from ..losses import LOSSES
from .data import CardData


def summary_of(facts: CardData) -> str:
    """One sentence of what it is, one of what that brought."""
    teachers = " and ".join(_named(entry) for entry in facts.teachers.values())
    text = f"{_student(facts)}, distilled from {teachers} with hf-distill."
    models = facts.held_out
    after, control = models.get("student", {}), models.get("control", {})
    if "perplexity" in after:
        text += f" Held-out perplexity {after['perplexity']:.2f}"
        told = [f"{models['before']['perplexity']:.2f} before"] if "perplexity" in models.get("before", {}) else []
        told += [f"the teacher's {after['teacher_perplexity']:.2f}"] if "teacher_perplexity" in after else []
        if "perplexity" in control:
            told.append(f"{control['perplexity']:.2f} for the same student trained on hard labels alone")
        text += f" ({', '.join(told)})." if told else "."
    return text


def _student(facts: CardData) -> str:
    student = facts.student
    size = f" of {_count(student['parameters'])} parameters" if student.get("parameters") else ""
    if student.get("layers_kept"):
        taught = any(t.get("model") == student.get("model") for t in facts.teachers.values())
        whose = "its teacher's blocks" if taught else f"the blocks of {_named(student)}"
        return f"A model{size}, cut to {len(student['layers_kept'])} of {whose}"
    what = "Adapters on" if student.get("adapters") else f"A model{size} that began as"
    return f"{what} {_named(student)}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f}M" if parameters >= 1e6 else f"{parameters:,}"


def _named(entry: Mapping[str, Any]) -> str:
    known = entry.get("model") or _NAMELESS.get(entry.get("kind", ""), "a model without a name")
    if is_id(known):
        return f"[{markdown(known)}](https://huggingface.co/{known})"
    return code_span(known) if ":" in known else markdown(known)


def training_lines(facts: CardData) -> list[str]:
    """How it was made: teachers, student, objective, data, training, machine."""
    lines = [f"{markdown(name.capitalize())}: {_described(entry)}." for name, entry in facts.teachers.items()]
    objective, training = facts.objective, facts.training
    lines.append(f"Student: {_origin(facts.student)}.")
    if objective:
        soft_term = markdown(_divergence(objective["divergence"]))
        terms = "".join(
            f" + {loss.get('weight', 1)} · {markdown(loss['name'])}" for loss in objective.get("losses") or ()
        )
        soft, hard = objective["alpha"], 1 - objective["alpha"]
        lines.append(
            f"Objective: {soft:g} · T² · {soft_term} + {hard:g} · cross entropy{terms}, at "
            f"T = {objective['temperature']:g}, over the asked tokens of the global batch."
        )
        papers = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in _papers(objective))
        lines += [f"Papers: {papers}."] if papers else []
    lines += [f"Data, {markdown(name)}: {_source(entry)}." for name, entry in facts.data.get("sources", {}).items()]
    counts = [f"{facts.data[key]:,} {text}" for key, text in _COUNTS.items() if facts.data.get(key)]
    prints = [f"{part} rows {code_span(facts.data[f'{part}_fingerprint'][:16])}" for part in ("train", "eval")
              if facts.data.get(f"{part}_fingerprint")]  # fmt: skip
    if counts:
        lines.append(f"Rows: {', '.join(counts)}" + (f"; SHA-256 of {', '.join(prints)}." if prints else "."))
    told = [markdown(text.format(training[key])) for key, text in _TRAINING.items() if training.get(key) is not None]
    lines += [f"Training: {', '.join(told)}."] if told else []
    arguments = ", ".join(code_span(f"{name}={value}") for name, value in (training.get("arguments") or {}).items())
    lines += [f"Arguments that are not the Trainer's defaults: {arguments}."] if arguments else []
    made = facts.environment
    count = made.get("processes", 1)
    device = markdown(made.get("device_name") or made.get("device"))
    where = f"{count} process{'es' if count > 1 else ''} on {device}"
    versions = ", ".join(f"{name} {markdown(made[name])}" for name in _VERSIONS if made.get(name))
    return [
        *lines,
        f"Machine: {where}, {made.get('cpu_count')} CPU cores, {markdown(made.get('platform'))}.",
        f"With {versions}.",
    ]


_SOFT_LABELS = "1503.02531"
_NAMELESS = {
    "adapter_base": "its own base, without its adapters",
    "ema": "the average of its own past",
    "snapshot": "itself, some steps before",
    "multi_view": "itself, on another view of the batch",
    "mtp": "its own head, some tokens ahead",
}
_COUNTS = {"train_rows": "to train on", "eval_rows": "held out", "tokens_per_row": "tokens a row"}
_TRAINING = {
    "steps": "{:,} steps",
    "stages": "in stages, each student the next one's teacher: {}",
    "rows_per_step": "{:,} rows a step",
    "tokens": "{:,} tokens",
    "learning_rate": "learning rate {:g}",
    "epochs": "{:.3g} epochs",
    "flop_student": "{:.3g} FLOP of the student",
    "flop_teacher": "{:.3g} of the teacher",
    "seconds": "{:,.1f} s",
}
_VERSIONS = ("hf_distill", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "python")


def _papers(objective: Mapping[str, Any]) -> list[str]:
    """Of knowledge distillation, and of the losses that were used."""
    divergence, losses = objective["divergence"], objective.get("losses") or ()
    names = [divergence["name"] if isinstance(divergence, Mapping) else divergence, *(loss["name"] for loss in losses)]
    known = [_SOFT_LABELS, *(LOSSES[name].paper for name in names if name in LOSSES)]
    return [*dict.fromkeys(paper for paper in known if paper)]


def _described(entry: Mapping[str, Any]) -> str:
    parts = [_named(entry)]
    parts += [f"commit {code_span(entry['revision'][:12])}"] if entry.get("revision") else []
    parts += [f"version {markdown(entry['version'])}"] if entry.get("version") else []
    parts += [f"kind {markdown(entry['kind'])}"] if entry.get("kind") not in (None, "frozen") else []
    parts += [f"{_count(entry['parameters'])} parameters"] if entry.get("parameters") else []
    parts += [f"{entry['blocks']} blocks"] if entry.get("blocks") else []
    parts += [f"held in {markdown(entry['quantization'])}"] if entry.get("quantization") else []
    parts += [f"licence {markdown(entry['licence'])}"] if entry.get("licence") else []
    return ", ".join(parts)


def _origin(student: Mapping[str, Any]) -> str:
    if layers := student.get("layers_kept"):
        return f"blocks {', '.join(map(str, layers))} of {_named(student)}"
    text = _named(student)
    text += f", commit {code_span(student['revision'][:12])}" if student.get("revision") else ""
    return text + (", with adapters" if student.get("adapters") else "")


def _divergence(name: Any) -> str:
    if isinstance(name, Mapping):
        options = ", ".join(f"{key}={value}" for key, value in name.items() if key != "name")
        return f"{name['name']}({options})"
    return str(name)


def _source(entry: Mapping[str, Any]) -> str:
    name = entry["dataset"]
    text = f"[{markdown(name)}](https://huggingface.co/datasets/{name})" if is_id(name) else code_span(name)
    return text + (f", commit {code_span(entry['revision'][:12])}" if entry.get("revision") else "")


def licence_lines(facts: CardData) -> list[str]:
    """The licence, what the teachers' ask for, and what was accepted against them."""
    judged = facts.licence
    first = f"{judged.id}, " if judged.id else "Not said; "
    inherited = ", ".join(f"{name}: {entry.get('licence') or 'unknown'}" for name, entry in facts.teachers.items())
    accepted = (f"Accepted by the author: {line}." for line in judged.conflicts)
    return [markdown(line) for line in (f"{first}with {inherited}.", *judged.notes, *accepted)]
