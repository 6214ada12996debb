"""The model card of a distilled model, and its data as JSON, which are pushed to the Hub with the model."""

from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import ModelCard
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import HubStrategy
from transformers.utils import PushInProgress, logging

from ..core.io import write_json
from ..hub.licenses import LicenseDecision
from ..model_card import FILE, TeacherFacts, build_card
from ..models.model_types import unwrap_model
from ..teachers import Teacher
from .card_data import license_decision, name_of, teacher_info, trainer_card_data

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class CardOptions:
    """Arguments of `create_model_card`, in the order of `Trainer.create_model_card`; None keeps what the trainer knows.

    language:       `language` of the metadata
    license:        `license` of the metadata; overrides the one that the licenses of the models give
    tags:           tags in addition to those of this package
    model_name:     the title; by default the name of the repository
    finetuned_from: `base_model` of the metadata; overrides the student's
    tasks:          `pipeline_tag` of the metadata; overrides the one of the model type
    dataset:        `datasets` of the metadata; overrides those of the training data
    dataset_name:   the name that TRL has for `dataset`
    """

    language: str | list[str] | None = None
    license: str | None = None
    tags: str | list[str] | None = None
    model_name: str | None = None
    finetuned_from: str | None = None
    tasks: str | None = None
    dataset: str | list[str] | None = None
    dataset_name: str | None = None

    def update(self, card: ModelCard) -> None:
        """Set the metadata of a card."""
        metadata = {"language": self.language, "base_model": self.finetuned_from, "pipeline_tag": self.tasks}
        metadata["datasets"] = _as_list(self.dataset) or _as_list(self.dataset_name) or None
        for name, value in metadata.items():
            if value is not None:
                card.data[name] = value
        card.data["tags"] = [*dict.fromkeys([*(card.data.get("tags") or []), *_as_list(self.tags)])]


class ModelCardWriter:
    """Writes README.md and distillation.json into the output folder of a trainer with a teacher."""

    def __init__(self) -> None:
        # Kept, because they do not change and need requests to the Hub.
        self._teachers_and_license: tuple[dict[str, TeacherFacts], LicenseDecision] | None = None

    def write(self, trainer: Trainer, student: nn.Module, teacher: Teacher, options: CardOptions) -> None:
        """Write the card; on one process of all."""
        folder, args = Path(str(trainer.args.output_dir)), trainer.args
        repo = str(getattr(trainer, "hub_model_id", None) or args.hub_model_id or folder.absolute().name)
        if self._teachers_and_license is None:
            teachers = teacher_info(teacher)
            decision = license_decision(teachers, name_of(unwrap_model(student)), repo)
            self._teachers_and_license = teachers, decision
            for conflict in decision.conflicts if args.push_to_hub else ():
                logger.warning(f"License of {repo}: {conflict}. Read the licenses before others use the model.")
        teachers, decision = self._teachers_and_license
        decision = decision if options.license is None else replace(decision, id=options.license)
        title = repo if options.model_name in (None, repo.rpartition("/")[2]) else str(options.model_name)
        card_data = trainer_card_data(trainer, student, title, teachers, decision)
        card = build_card(card_data)
        options.update(card)
        folder.mkdir(parents=True, exist_ok=True)
        card.save(folder / "README.md")
        write_json(folder / FILE, card_data.as_json())


def pushes_checkpoint(args: TrainingArguments, push_in_progress: PushInProgress | None) -> bool:
    """Return whether the Trainer pushes this checkpoint; if an earlier push runs, it may leave one out."""
    is_busy = push_in_progress is not None and not push_in_progress.is_done()
    return args.hub_strategy != HubStrategy.END and (args.hub_always_push or not is_busy)


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
