"""The data of a model card that a trainer knows: models, objective, training arguments, metrics, licenses."""

import re
from collections.abc import Mapping, Sized
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..core.io import environment, held_out_metrics
from ..core.json_types import JSON
from ..core.references import is_published_path, public_name
from ..errors import DistillError
from ..hub.licenses import License, LicenseDecision, decide_license, get_license
from ..model_card import CardData, SourceFacts, StudentFacts, TeacherFacts, unmeasured
from ..model_card.data import is_server_name
from ..models.model_types import model_type_of, unwrap_model, unwrap_parallel
from ..teachers import CachedTeacher, RemoteTeacher, Teacher
from ..teachers.group import teachers_by_name
from .config import DistillArguments


def trainer_card_data(
    trainer: Trainer, student: nn.Module, repo: str, teachers: dict[str, TeacherFacts], decision: LicenseDecision
) -> CardData:
    """Collect the data of a model card from a trainer.

    Args:
        trainer: a trainer with a teacher.
        student: its model.
        repo: org/name of the student's repository.
        teachers: the result of `teacher_info`.
        decision: the result of `license_decision`.
    """
    args, state, model = trainer.args, trainer.state, unwrap_model(student)
    evaluated = next((log for log in reversed(state.log_history) if "eval_loss" in log), None)
    held_out = {"student": held_out_metrics(evaluated)} if evaluated else {}
    datasets = {"train": trainer.train_dataset, "eval": trainer.eval_dataset}
    chat_template = getattr(trainer.processing_class, "chat_template", None)
    adapters = hasattr(unwrap_parallel(student), "peft_config")
    objective_args = args if isinstance(args, DistillArguments) else DistillArguments()
    model_type = model_type_of(student)
    output_type, is_module = model_type.output_type, not isinstance(model, PreTrainedModel)
    student_facts: StudentFacts = {
        "model": public_name(name_of(model)), "parameters": _num_parameters(model), "adapters": adapters
    }  # fmt: skip
    if is_module and not adapters:
        student_facts["class_name"] = type(model).__name__
    soft_term = objective_args.terms(output_type=output_type)[0]
    return CardData(
        repo=repo,
        # Which inputs a module reads is not known; a registered type tells its pipeline.
        task=None if is_module and model_type.auto_class is not None else model_type.pipeline,
        student=student_facts,
        teachers=teachers,
        objective={
            "temperature": soft_term.options.get("temperature", objective_args.loss_temperature),
            "alpha": soft_term.weight,
            "divergence": cast("str | dict[str, object]", objective_args.soft_loss or output_type.soft_loss),
            "hard_loss": output_type.hard_loss,
            "losses": cast(Any, objective_args.losses),
            "by_origin": cast(Any, objective_args.by_origin),
        },
        data={
            "sources": _sources(datasets),
            "train_rows": _length(trainer.train_dataset),
            "eval_rows": _length(trainer.eval_dataset),
        },
        training={
            "steps": state.global_step,
            "rows_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "tokens": int(state.num_input_tokens_seen) or None,
            "epochs": state.epoch,
            "learning_rate": args.learning_rate,
            "arguments": _arguments(args),
        },
        held_out=held_out,
        environment=environment(str(args.device)) | {"processes": args.world_size},
        license=decision,
        not_measured=unmeasured(held_out, (), None),
        target=output_type.target,
        prompt=[{"role": "user", "content": "Hello! What can you do?"}] if chat_template else None,
    )


def teacher_info(teacher: Teacher) -> dict[str, TeacherFacts]:
    """Return for each teacher, by name, its kind, model, revision or number of parameters, and license."""
    infos: dict[str, TeacherFacts] = {}
    for key, one in teachers_by_name(teacher).items():
        name = "teacher" if key is None else key
        info: TeacherFacts = {"kind": one.kind}
        if isinstance(one, CachedTeacher):
            info |= {
                "model": public_name(one.manifest.teacher["model"]),
                "revision": one.manifest.teacher.get("revision"),
            }
            if "served" in one.manifest.teacher:
                info["served"] = True
        elif isinstance(one, RemoteTeacher):
            summary = one.summary()
            info |= cast(TeacherFacts, summary | {"model": public_name(summary["model"])})
        elif one.model is not None:
            model = unwrap_model(one.model)
            info |= {"model": public_name(name_of(model)), "parameters": _num_parameters(model)}
        license_ = License(None) if is_server_name(info) else _known_license(info.get("model"))
        infos[name] = info | {"license": license_.id, "forbids": license_.forbids}
    return infos


def license_decision(teachers: dict[str, TeacherFacts], student: str, repo: str) -> LicenseDecision:
    """Return the license of the student, from the licenses of the models on the Hub.

    Args:
        teachers: the result of `teacher_info`.
        student: id or path of the model that the student was initialized from; may be empty.
        repo: org/name of the student's repository.
    """
    licenses = {
        name: License(info["license"], forbids=info["forbids"]) for name, info in teachers.items() if info.get("model")
    }
    base = _known_license(public_name(student)) if student else None
    return decide_license(licenses, base, repo)


def _known_license(name: str | None) -> License:
    """Return the license of a model, or an unknown one: a push does not fail if the Hub does not answer."""
    try:
        return get_license(name, retries=False) if name and not is_published_path(name) else License(None)
    except DistillError:
        return License(None)


# Path of a dataset of the Hub in the cache of `datasets`: org___name/configuration/version/commit/file.
_CACHED_DATASET = re.compile(r"/([^/]+)___([^/]+)/[^/]+/[^/]+/([0-9a-f]{40})/[^/]+$")


def _sources(datasets: Mapping[str, object]) -> dict[str, SourceFacts]:
    """Return id and commit of the datasets that are from the Hub, read from the paths of their files."""
    sources: dict[str, SourceFacts] = {}
    for name, rows in datasets.items():
        files = [file["filename"] for file in getattr(rows, "cache_files", None) or ()]
        if files and (match := _CACHED_DATASET.search(Path(files[0]).as_posix())):
            sources[name] = {"dataset": f"{match[1]}/{match[2]}", "revision": match[3]}
    return sources


# Arguments that a card leaves out: paths, accounts, logging, and values that the card shows elsewhere.
_EXCLUDED_PREFIXES = (
    *("output", "hub", "push", "logging", "log_", "report", "run_name", "save", "eval", "do_", "project", "trackio"),
    *("disable_tqdm", "dataloader", "use_cpu", "local_rank", "resume", "deepspeed", "fsdp"),
    *("temperature", "alpha", "divergence", "cross_tokenizer", "by_origin", "losses"),
)


def _arguments(args: TrainingArguments) -> dict[str, JSON]:
    """Return the training arguments that differ from their defaults, without the excluded ones."""
    changed = {f.name: getattr(args, f.name) for f in fields(args) if getattr(args, f.name) != f.default}
    return {
        name: value.value if isinstance(value, Enum) else value
        for name, value in changed.items()
        if not name.startswith(_EXCLUDED_PREFIXES) and isinstance(value, int | float | str | Enum)
    }


def name_of(model: nn.Module) -> str:
    """Return the id or path that a model was loaded from; empty if it was made from a config."""
    return str(getattr(model, "name_or_path", ""))


def _num_parameters(model: nn.Module) -> int:
    """Return the number of parameters; for a model that ZeRO-3 shards, that of the full model."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def _length(rows: object) -> int | None:
    """Return the number of rows; None for a stream, and for several datasets by name."""
    return len(rows) if isinstance(rows, Sized) and not isinstance(rows, dict) else None
