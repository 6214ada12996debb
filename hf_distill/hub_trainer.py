"""A Trainer's pushes to the Hub: each carries a card with what is known by then, and the same facts as JSON."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer
from transformers.training_args import HubStrategy
from transformers.utils import logging

from .card import FILE, Facts, card_of, missing
from .config import fields_of
from .errors import DistillError
from .evidence import environment, measured, write_json
from .hub.licences import Judged, Licence, judge, licence_of
from .names import public
from .tasks import bare, task_of
from .teachers import CachedTeacher, MultiTeacher, Teacher

logger = logging.get_logger(__name__)
_Base: Any = Trainer if TYPE_CHECKING else object


class HubMixin(_Base):
    """For any Trainer that distils; without a teacher everything is the Trainer's."""

    teacher: Any
    distilling: bool
    _judged: Judged | None = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the Trainer's; what goes up carries a card, which is not written while an earlier push reads it."""
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        pushes = self.args.hub_strategy != HubStrategy.END and (self.args.hub_always_push or not busy)
        if self.distilling and pushes:
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | None = None,
        dataset: str | list[str] | None = None,
        dataset_name: str | None = None,
        **others,
    ) -> None:
        """Write README.md and distillation.json into the output folder.

        Args:
            language: of the card's metadata; as the four below it wins over what is known.
            license: of the card's metadata.
            tags: beside our own.
            model_name: the title, by default the repository's.
            finetuned_from: `base_model` of the metadata.
            tasks: `pipeline_tag` of the metadata.
            dataset: ids for the metadata.
            dataset_name: as TRL calls `dataset`.
            others: of the Trainer's own card, where nothing is distilled.
        """
        given = {"language": language, "license": license, "finetuned_from": finetuned_from, "tasks": tasks}
        given |= {"dataset": dataset, "dataset_name": dataset_name, "tags": tags, "model_name": model_name, **others}
        if not self.distilling:
            super().create_model_card(**{name: value for name, value in given.items() if value is not None})
            return
        if others:
            raise TypeError(f"A distilled model's card takes no {', '.join(sorted(others))}.")
        if not self.is_world_process_zero():
            return
        facts = self._facts(model_name, license)
        card = card_of(facts)
        metadata = {"language": language, "base_model": finetuned_from, "pipeline_tag": tasks}
        metadata["datasets"] = _listed(dataset) or _listed(dataset_name) or None
        for name, value in metadata.items():
            if value is not None:
                card.data[name] = value
        card.data["tags"] = [*dict.fromkeys([*(card.data.get("tags") or []), *_listed(tags)])]
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        card.save(folder / "README.md")
        write_json(folder / FILE, facts.as_json())

    def _facts(self, model_name: str | None, license: str | None) -> Facts:
        """What this trainer knows of its distillation by now."""
        repo = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        teachers = _teachers(self.teacher)
        model: Any = bare(self.model)
        adapters = model is not self.model and hasattr(self.model, "peft_config")
        if self._judged is None:
            self._judged = _judge(teachers, model.name_or_path, repo)
        evaluated = next((log for log in reversed(self.state.log_history) if "eval_loss" in log), None)
        held_out = {"student": measured(evaluated)} if evaluated else {}
        seen = self.state.num_input_tokens_seen
        tokenizer: Any = self.processing_class
        chat = getattr(tokenizer, "chat_template", None)
        judged = self._judged if license is None else Judged(license, self._judged.notes, self._judged.conflicts)
        return Facts(
            repo=repo if model_name in (None, repo.rpartition("/")[2]) else str(model_name),
            task=task_of(self.model).pipeline,
            student={"model": public(model.name_or_path), "parameters": _count(model), "adapters": adapters},
            teachers=teachers,
            objective={k: v for k, v in fields_of(self.args).items() if k in _OBJECTIVE} or dict(_DEFAULTS),
            data={"train_rows": _length(self.train_dataset), "eval_rows": _length(self.eval_dataset)},
            training={
                "steps": self.state.global_step,
                "rows_per_step": self.args.train_batch_size
                * self.args.gradient_accumulation_steps
                * self.args.world_size,
                "tokens": int(seen) or None,
                "epochs": self.state.epoch,
                "learning_rate": self.args.learning_rate,
            },
            held_out=held_out,
            environment=environment(str(self.args.device)) | {"processes": self.args.world_size},
            licence=judged,
            not_measured=missing(held_out, (), None),
            prompt=[{"role": "user", "content": "Hello! What can you do?"}] if chat else None,
        )


_OBJECTIVE = ("temperature", "alpha", "divergence", "losses")
_DEFAULTS = {"temperature": 2.0, "alpha": 0.5, "divergence": "forward_kl", "losses": None}


def _teachers(teacher: Teacher) -> dict[str, dict[str, Any]]:
    """What is known of each teacher, with its licence."""
    several = teacher.teachers if isinstance(teacher, MultiTeacher) else {"teacher": teacher}
    found = {}
    for name, one in several.items():
        known: dict[str, Any] = {"kind": one.kind}
        if isinstance(one, CachedTeacher):
            known |= {"model": public(one.manifest.teacher["model"]), "revision": one.manifest.teacher.get("revision")}
        elif one.model is not None:
            held: Any = bare(one.model)
            known |= {"model": public(held.name_or_path), "parameters": _count(held)}
        licence = _known_licence(known.get("model"))
        found[name] = known | {"licence": licence.id, "forbids": licence.forbids}
    return found


def _judge(teachers: dict[str, dict[str, Any]], student: str, repo: str) -> Judged:
    licences = {name: Licence(t["licence"], forbids=t["forbids"]) for name, t in teachers.items() if t.get("model")}
    base = _known_licence(public(student)) if student else None
    judged = judge(licences, base, repo)
    for line in judged.conflicts:
        logger.warning(f"Licence of {repo}: {line}. Read it before you publish.")
    return judged


def _known_licence(name: str | None) -> Licence:
    """The licence of a model where it can be told; a push is not stopped by a Hub that does not answer."""
    try:
        return licence_of(name) if name and not name.endswith("(a local folder)") else Licence(None)
    except DistillError:
        return Licence(None)


def _count(model: nn.Module) -> int:
    """Parameters, of a model that is sharded all of them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def _length(rows: Any) -> int | None:
    return len(rows) if hasattr(rows, "__len__") and not isinstance(rows, dict) else None


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
