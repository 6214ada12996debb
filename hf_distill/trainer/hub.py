"""`HubMixin`: a Trainer that pushes a model card and its data as JSON with the model."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.training_args import HubStrategy
from transformers.utils import logging

from ..core.io import write_json
from ..model_card import FILE, build_card
from ..models.model_types import unwrap_model
from .card_data import license_decision, teacher_info, trainer_card_data

logger = logging.get_logger(__name__)
_Base: Any = Trainer if TYPE_CHECKING else object


class HubMixin(_Base):
    """Writes the model card of a distilled model; without a teacher the Trainer writes its own card."""

    teacher: Any
    is_distilling: bool
    _teachers_and_license: Any = None  # kept, because they do not change and need requests to the Hub

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Write the card, then push; the card is not written while an earlier push reads it."""
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        will_push = self.args.hub_strategy != HubStrategy.END and (self.args.hub_always_push or not is_busy)
        if self.is_distilling and will_push:
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
            language: `language` of the metadata.
            license: `license` of the metadata; overrides the one that the licenses of the models give.
            tags: tags in addition to those of this package.
            model_name: the title; by default the name of the repository.
            finetuned_from: `base_model` of the metadata; overrides the student's.
            tasks: `pipeline_tag` of the metadata; overrides the one of the model type.
            dataset: `datasets` of the metadata; overrides those of the training data.
            dataset_name: the name that TRL has for `dataset`.
            others: arguments of the Trainer's card, for a trainer without a teacher.

        Raises:
            TypeError: `others` are passed although the trainer has a teacher.
        """
        arguments = {"language": language, "license": license, "finetuned_from": finetuned_from, "tasks": tasks}
        arguments |= {
            "dataset": dataset,
            "dataset_name": dataset_name,
            "tags": tags,
            "model_name": model_name,
            **others,
        }
        if not self.is_distilling:
            super().create_model_card(**{name: value for name, value in arguments.items() if value is not None})
            return
        if others:
            raise TypeError(f"The card of a distilled model has no {', '.join(sorted(others))}. Leave it out.")
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        repo = self.hub_model_id or self.args.hub_model_id or folder.absolute().name
        if self._teachers_and_license is None:
            teachers, model = teacher_info(self.teacher), unwrap_model(self.model)
            decision = license_decision(teachers, str(model.name_or_path), repo)
            self._teachers_and_license = teachers, decision
            for conflict in decision.conflicts if self.args.push_to_hub else ():
                logger.warning(f"License of {repo}: {conflict}. Read the licenses before others use the model.")
        teachers, decision = self._teachers_and_license
        decision = decision if license is None else replace(decision, id=license)
        title = repo if model_name in (None, repo.rpartition("/")[2]) else str(model_name)
        card_data = trainer_card_data(self, title, teachers, decision)
        card = build_card(card_data)
        metadata = {"language": language, "base_model": finetuned_from, "pipeline_tag": tasks}
        metadata["datasets"] = _as_list(dataset) or _as_list(dataset_name) or None
        for name, value in metadata.items():
            if value is not None:
                card.data[name] = value
        card.data["tags"] = [*dict.fromkeys([*(card.data.get("tags") or []), *_as_list(tags)])]
        folder.mkdir(parents=True, exist_ok=True)
        card.save(folder / "README.md")
        write_json(folder / FILE, card_data.as_json())


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
