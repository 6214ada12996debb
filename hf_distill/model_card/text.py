"""The sentences of a card."""

from collections.abc import Mapping

from ..core.escape import code_span, markdown
from ..core.held_out_metrics import CONTROL_TITLES, target_words
from ..core.pruned_sizes import shape_text
from ..core.references import is_id
from ..losses import LOSSES
from .data import (
    CardData,
    DatasetFacts,
    ObjectiveFacts,
    SourceFacts,
    StudentFacts,
    TeacherFacts,
    TrainingFacts,
    is_server_name,
)

_DISTILLATION_PAPER = "1503.02531"
_TEACHERS_WITHOUT_A_MODEL = {
    "adapter_base": "its base model, without the adapters",
    "ema": "an exponential moving average of its weights",
    "snapshot": "an earlier snapshot of itself",
    "multi_view": "itself, on another view of the batch",
    "mtp": "its output head, some tokens ahead",
}
_ROW_COUNTS = {
    "train_rows": "training rows",
    "eval_rows": "held-out rows",
    "tokens_per_row": "tokens per row on average",
}
_TRAINING = {
    "steps": "{:,} steps",
    "stages": "in stages, where the student of each stage is the teacher of the next: {}",
    "rows_per_step": "{:,} rows per step",
    "tokens": "{:,} tokens",
    "learning_rate": "learning rate {:g}",
    "epochs": "{:.3g} epochs",
    "flop_student": "{:.3g} FLOP for the student",
    "flop_teacher": "{:.3g} FLOP for the teacher",
    "seconds": "{:,.1f} s",
}
_VERSIONS = ("hf_distill", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "python")


def summary_of(facts: CardData) -> str:
    """Return one sentence on what the model is, and one on its held-out perplexity."""
    teachers = " and ".join(_teacher_link(teacher) for teacher in facts.teachers.values())
    text = f"{_student(facts)}, distilled from {teachers} with hf-distill."
    models = facts.held_out
    after, control = models.get("student", {}), models.get("control", {})
    if "perplexity" in after:
        text += f" Its held-out perplexity is {after['perplexity']:.2f}"
        compared = []
        if "perplexity" in models.get("before", {}):
            compared.append(f"before training: {models['before']['perplexity']:.2f}")
        if "teacher_perplexity" in after:
            compared.append(f"teacher: {after['teacher_perplexity']:.2f}")
        if "perplexity" in control:
            compared.append(f"{CONTROL_TITLES[facts.control]}: {control['perplexity']:.2f}")
        if "full_precision" in models:
            compared.append(f"same student in full precision: {models['full_precision']['perplexity']:.2f}")
            compared.append(f"and quantized after training: {models['quantized_after']['perplexity']:.2f}")
        text += f" ({'; '.join(compared)})." if compared else "."
    return text


def training_lines(facts: CardData) -> list[str]:
    """Return lines on how the model was trained: teachers, student, objective, data, training, machine."""
    lines = [f"{markdown(name.capitalize())}: {_teacher(entry)}." for name, entry in facts.teachers.items()]
    lines.append(f"Student: {_origin(facts.student)}.")
    if quantization := facts.student.get("quantization"):
        lines.append(
            f"Quantization: {markdown(quantization)}, of the nn.Linear modules in the transformer layers. The "
            "student was trained with it (quantization-aware distillation) and is saved in it; loading it needs "
            "torchao."
        )
    return [
        *lines,
        *_objective_lines(facts.objective, facts.target),
        *_data_lines(facts.data),
        *_argument_lines(facts.training),
        *_machine_lines(facts.environment),
    ]


def license_lines(facts: CardData) -> list[str]:
    """Return the license, the requirements of the teachers' licenses, and the conflicts that the author accepted."""
    decision = facts.license
    first = f"License: {decision.id}." if decision.id else "License: not specified."
    teachers = "; ".join(f"{name}: {entry.get('license') or 'unknown'}" for name, entry in facts.teachers.items())
    accepted = (f"Accepted by the author: {line}." for line in decision.conflicts)
    lines = (first, f"Licenses of the teachers: {teachers}.", *decision.notes, *accepted)
    return [markdown(line) for line in lines]


def _objective_lines(objective: ObjectiveFacts, target: str) -> list[str]:
    """The loss as a formula, and its papers."""
    if not objective:
        return []
    soft_term = markdown(_divergence(objective["divergence"]))
    terms = "".join(f" + {loss.get('weight', 1)} · {markdown(loss['name'])}" for loss in objective.get("losses") or ())
    soft, hard = objective["alpha"], 1 - objective["alpha"]
    loss = LOSSES.get(_name(objective["divergence"]))
    is_of_chunks = loss is not None and loss.compares_chunks
    has_temperature = loss is None or "temperature" in loss.options
    hard_loss = objective.get("hard_loss", "cross_entropy")
    hard_term = "" if hard_loss is None else f" + {hard:g} · {hard_loss.replace('_', ' ')}"
    scale, temperature = (" · T²", f", with T = {objective['temperature']:g}") if has_temperature else ("", "")
    lines = [
        f"Objective: {soft:g}{scale} · {soft_term}{hard_term}{terms}{temperature}, averaged over the "
        f"{target_words(target)} of the global batch."
    ]
    if is_of_chunks:
        lines.append(
            "The teacher has another tokenizer: the soft loss compares spans of text that both tokenizers delimit."
        )
    for origin, values in (objective.get("by_origin") or {}).items():
        settings = [f"divergence {markdown(_divergence(values['divergence']))}"] if "divergence" in values else []
        settings += [f"alpha {values['alpha']:g}"] if "alpha" in values else []
        lines.append(f"For target tokens that the {markdown(origin)} wrote: {', '.join(settings)}.")
    papers = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in _papers(objective))
    return [*lines, f"Papers: {papers}."] if papers else lines


def _data_lines(data: DatasetFacts) -> list[str]:
    """The sources, the numbers of rows and their fingerprints."""
    lines = [f"Data, {markdown(name)}: {_source(entry)}." for name, entry in data.get("sources", {}).items()]
    values: Mapping[str, object] = data
    counts = [f"{values[key]:,} {text}" for key, text in _ROW_COUNTS.items() if values.get(key)]
    digests_by_title = {"training rows": data.get("train_fingerprint"), "held-out rows": data.get("eval_fingerprint")}
    fingerprints = [f"{title} {code_span(digest[:16])}" for title, digest in digests_by_title.items() if digest]
    if counts:
        digests = f"; SHA-256 of the {', '.join(fingerprints)}." if fingerprints else "."
        lines.append(f"Rows: {', '.join(counts)}{digests}")
    return lines


def _argument_lines(training: TrainingFacts) -> list[str]:
    """Steps, tokens and compute, and the arguments of the Trainer."""
    values: Mapping[str, object] = training
    settings = [markdown(text.format(values[key])) for key, text in _TRAINING.items() if values.get(key) is not None]
    lines = [f"Training: {', '.join(settings)}."] if settings else []
    arguments = ", ".join(code_span(f"{name}={value}") for name, value in (training.get("arguments") or {}).items())
    return [*lines, f"Arguments that differ from the Trainer's defaults: {arguments}."] if arguments else lines


def _machine_lines(environment: Mapping[str, str | int | None]) -> list[str]:
    count = environment.get("processes", 1)
    device = markdown(environment.get("device_name") or environment.get("device"))
    machine = f"{count} process{'' if count == 1 else 'es'} on {device}"
    versions = ", ".join(f"{name} {markdown(environment[name])}" for name in _VERSIONS if environment.get(name))
    return [
        f"Machine: {machine}, {environment.get('cpu_count')} CPU cores, {markdown(environment.get('platform'))}.",
        f"Versions: {versions}.",
    ]


def _student(facts: CardData) -> str:
    student = facts.student
    size = f" with {_count(student['parameters'])} parameters" if student.get("parameters") else ""
    if student.get("layers_kept") or student.get("widths"):
        is_cut_from_teacher = any(t.get("model") == student.get("model") for t in facts.teachers.values())
        widths = f"pruned to {shape_text(student['widths'])}" if student.get("widths") else ""
        origin = "its teacher" if is_cut_from_teacher else _model_link(student.get("model"))
        if not student.get("layers_kept"):
            return f"A model{size}, {origin} {widths}"
        layers = "its teacher's layers" if is_cut_from_teacher else f"the layers of {origin}"
        return f"A model{size}, made of {len(student['layers_kept'])} of {layers}{widths and f', {widths}'}"
    kind = "Adapters on" if student.get("adapters") else f"A model{size}, initialized from"
    return f"{kind} {_model_link(student.get('model'))}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f}M" if parameters >= 1e6 else f"{parameters:,}"


def _model_link(name: str | None) -> str:
    """The name of a model, as a link if it is on the Hub."""
    name = name or "a model without a name"
    if is_id(name):
        return f"[{markdown(name)}](https://huggingface.co/{name})"
    return code_span(name) if ":" in name else markdown(name)


def _teacher_link(teacher: TeacherFacts) -> str:
    if (name := teacher.get("model")) and is_server_name(teacher):
        return code_span(name)
    return _model_link(teacher.get("model") or _TEACHERS_WITHOUT_A_MODEL.get(teacher.get("kind", "")))


def _name(divergence: str | Mapping[str, object]) -> str:
    return str(divergence["name"]) if isinstance(divergence, Mapping) else divergence


def _papers(objective: ObjectiveFacts) -> list[str]:
    """The papers of knowledge distillation and of the losses."""
    divergence, losses = objective["divergence"], objective.get("losses") or ()
    of_origins = [
        values["divergence"] for values in (objective.get("by_origin") or {}).values() if "divergence" in values
    ]
    names = [*map(_name, (divergence, *of_origins)), *(loss["name"] for loss in losses)]
    papers = [_DISTILLATION_PAPER, *(LOSSES[name].paper for name in names if name in LOSSES)]
    return [*dict.fromkeys(paper for paper in papers if paper)]


def _teacher(entry: TeacherFacts) -> str:
    parts = [_teacher_link(entry)]
    parts += [f"commit {code_span(revision[:12])}"] if (revision := entry.get("revision")) else []
    parts += [f"version {markdown(entry['version'])}"] if entry.get("version") else []
    parts += [f"kind {markdown(entry['kind'])}"] if entry.get("kind") not in (None, "frozen") else []
    if entry.get("hosts"):
        server = "`hf-distill serve`" if entry["api"] == "hidden" else markdown(entry["api"])
        parts.append(f"served by {server} on {', '.join(map(markdown, entry['hosts']))}")
        parts += [f"the {entry['top_k']} most probable ids of each token"] if entry.get("top_k") else []
    parts += [f"{_count(entry['parameters'])} parameters"] if entry.get("parameters") else []
    parts += [f"{entry['layers']} layers"] if entry.get("layers") else []
    parts += [f"quantized as {markdown(entry['quantization'])}"] if entry.get("quantization") else []
    parts += [f"license {markdown(entry['license'])}"] if entry.get("license") else []
    return ", ".join(parts)


def _origin(student: StudentFacts) -> str:
    text = _model_link(student.get("model"))
    widths = f", pruned to {shape_text(student['widths'])}" if student.get("widths") else ""
    if layers := student.get("layers_kept"):
        return f"layers {', '.join(map(str, layers))} of {text}{widths}"
    text += f", commit {code_span(revision[:12])}" if (revision := student.get("revision")) else ""
    return text + widths + (", with adapters" if student.get("adapters") else "")


def _divergence(name: str | Mapping[str, object]) -> str:
    if isinstance(name, Mapping):
        options = ", ".join(f"{key}={value}" for key, value in name.items() if key != "name")
        return f"{name['name']}({options})"
    return str(name)


def _source(entry: SourceFacts) -> str:
    name = str(entry["dataset"])
    text = f"[{markdown(name)}](https://huggingface.co/datasets/{name})" if is_id(name) else code_span(name)
    text += f", commit {code_span(entry['revision'][:12])}" if entry.get("revision") else ""
    if generated := entry.get("generated"):
        text += f", with {generated['kept']:,} completions by {code_span(generated['model'])}"
        filtered = generated["kept"] < generated["completions"]
        text += f" ({generated['completions']:,} before filters)" if filtered else ""
    return text
