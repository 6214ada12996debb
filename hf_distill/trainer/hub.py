"""A Trainer's pushes to the Hub: each carries a card with what is known by then, and the same facts as JSON."""

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
    """For any Trainer that distils; without a teacher everything is the Trainer's."""

    teacher: Any
    is_distilling: bool
    _known: Any = None  # teachers and licence: they do not change, and the Hub is asked for them

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the Trainer's; what goes up carries a card, which is not written while an earlier push reads it."""
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        pushes = self.args.hub_strategy != HubStrategy.END and (self.args.hub_always_push or not busy)
        if self.is_distilling and pushes:
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
        if not self.is_distilling:
            super().create_model_card(**{name: value for name, value in given.items() if value is not None})
            return
        if others:
            raise TypeError(f"A distilled model's card takes no {', '.join(sorted(others))}.")
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        repo = self.hub_model_id or self.args.hub_model_id or folder.absolute().name
        if self._known is None:
            teachers, model = teacher_info(self.teacher), unwrap_model(self.model)
            self._known = teachers, license_decision(teachers, str(model.name_or_path), repo)
            for line in self._known[1].conflicts if self.args.push_to_hub else ():
                logger.warning(f"Licence of {repo}: {line}. Read it before others use it.")
        teachers, judged = self._known
        judged = judged if license is None else replace(judged, id=license)
        titled = repo if model_name in (None, repo.rpartition("/")[2]) else str(model_name)
        facts = trainer_card_data(self, titled, teachers, judged)
        card = build_card(facts)
        metadata = {"language": language, "base_model": finetuned_from, "pipeline_tag": tasks}
        metadata["datasets"] = _listed(dataset) or _listed(dataset_name) or None
        for name, value in metadata.items():
            if value is not None:
                card.data[name] = value
        card.data["tags"] = [*dict.fromkeys([*(card.data.get("tags") or []), *_listed(tags)])]
        folder.mkdir(parents=True, exist_ok=True)
        card.save(folder / "README.md")
        write_json(folder / FILE, facts.as_json())


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
