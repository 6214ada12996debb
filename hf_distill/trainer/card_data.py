"""What a trainer knows of its distillation, as the facts of a card."""

import re
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn

from ..core.io import environment, held_out_metrics
from ..core.references import public_name
from ..errors import DistillError
from ..hub.licenses import License, LicenseDecision, decide_license, get_license
from ..model_card import CardData, unmeasured
from ..models.model_types import model_type_of, unwrap_model, unwrap_parallel
from ..teachers import CachedTeacher, MultiTeacher, Teacher
from .config import distill_arguments

_OBJECTIVE = ("temperature", "alpha", "divergence", "losses")
_DEFAULTS = {"temperature": 2.0, "alpha": 0.5, "divergence": "forward_kl", "losses": None}


def trainer_card_data(
    trainer: Any, repo: str, teachers: dict[str, dict[str, Any]], judged: LicenseDecision
) -> CardData:
    """What is known by now.

    Args:
        trainer: that distils.
        repo: org/name of the student.
        teachers: see `taught_by`.
        judged: see `judged_by`.
    """
    args, state, model = trainer.args, trainer.state, unwrap_model(trainer.model)
    name: Any = model.name_or_path
    evaluated = next((log for log in reversed(state.log_history) if "eval_loss" in log), None)
    held_out = {"student": held_out_metrics(evaluated)} if evaluated else {}
    rows = {"train": trainer.train_dataset, "eval": trainer.eval_dataset}
    chat = getattr(trainer.processing_class, "chat_template", None)
    adapters = hasattr(unwrap_parallel(trainer.model), "peft_config")
    return CardData(
        repo=repo,
        task=model_type_of(trainer.model).pipeline,
        student={"model": public_name(name), "parameters": _count(model), "adapters": adapters},
        teachers=teachers,
        objective={k: v for k, v in distill_arguments(args).items() if k in _OBJECTIVE} or dict(_DEFAULTS),
        data={"sources": _sources(rows)} | {f"{part}_rows": _length(data) for part, data in rows.items()},
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
        licence=judged,
        not_measured=unmeasured(held_out, (), None),
        prompt=[{"role": "user", "content": "Hello! What can you do?"}] if chat else None,
    )


def teacher_info(teacher: Teacher) -> dict[str, dict[str, Any]]:
    """What is known of each teacher, with its licence."""
    several = teacher.teachers if isinstance(teacher, MultiTeacher) else {"teacher": teacher}
    found = {}
    for name, one in several.items():
        known: dict[str, Any] = {"kind": one.kind}
        if isinstance(one, CachedTeacher):
            known |= {
                "model": public_name(one.manifest.teacher["model"]),
                "revision": one.manifest.teacher.get("revision"),
            }
        elif one.model is not None:
            held: Any = unwrap_model(one.model)
            known |= {"model": public_name(held.name_or_path), "parameters": _count(held)}
        licence = _known_licence(known.get("model"))
        found[name] = known | {"licence": licence.id, "forbids": licence.forbids}
    return found


def license_decision(teachers: dict[str, dict[str, Any]], student: str, repo: str) -> LicenseDecision:
    """The student's licence, as far as the Hub tells."""
    licences = {name: License(t["licence"], forbids=t["forbids"]) for name, t in teachers.items() if t.get("model")}
    base = _known_licence(public_name(student)) if student else None
    return decide_license(licences, base, repo)


def _known_licence(name: str | None) -> License:
    """The licence of a model where it can be told; a push is not stopped by a Hub that does not answer."""
    try:
        return get_license(name) if name and not name.endswith("(a local folder)") else License(None)
    except DistillError:
        return License(None)


# Where `datasets` keeps a data set of the Hub: org___name/configuration/version/commit/file.
_CACHED = re.compile(r"/([^/]+)___([^/]+)/[^/]+/[^/]+/([0-9a-f]{40})/[^/]+$")


def _sources(given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Data sets of the Hub, by where their files are kept."""
    found = {}
    for name, rows in given.items():
        files = [file["filename"] for file in getattr(rows, "cache_files", None) or ()]
        if files and (kept := _CACHED.search(Path(files[0]).as_posix())):
            found[name] = {"dataset": f"{kept[1]}/{kept[2]}", "revision": kept[3]}
    return found


_EXCLUDED_PREFIXES = (
    *("output", "hub", "push", "logging", "log_", "report", "run_name", "save", "eval", "do_", "project", "trackio"),
    *("disable_tqdm", "dataloader", "use_cpu", "local_rank", "resume", "deepspeed", "fsdp", *_OBJECTIVE),
)


def _arguments(args: Any) -> dict[str, Any]:
    """Numbers, words and switches that are not as by default, places and accounts aside."""
    changed = {f.name: getattr(args, f.name) for f in fields(args) if getattr(args, f.name) != f.default}
    return {
        name: value.value if isinstance(value, Enum) else value
        for name, value in changed.items()
        if not name.startswith(_EXCLUDED_PREFIXES) and isinstance(value, int | float | str | Enum)
    }


def _count(model: nn.Module) -> int:
    """Parameters, of a model that is sharded all of them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def _length(rows: Any) -> int | None:
    return len(rows) if hasattr(rows, "__len__") and not isinstance(rows, dict) else None
