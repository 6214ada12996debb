"""What a run leaves of a teacher that moved, beside the student."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..core.processes import run_on_main
from ..core.signals import FeatureKey, Signals
from ..core.targets import Targets
from ..recipe.schema import Recipe
from ..teachers import EMATeacher, MTPTeacher, MultiTeacher, PeerTeacher, Teacher
from ..trainer.trainer import DistillTrainer


class NullTeacher(Teacher):
    """Says nothing: a student is measured by the labels alone."""

    provides_soft_labels = False

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, Targets]) -> Signals:
        """Nothing."""
        return Signals(None)


def export_teachers(trainer: DistillTrainer, export: str, folder: Path) -> None:
    """Write RUN/peer of a peer, RUN/ema of an average that is to be exported, the heads into RUN/student."""
    given: Any = trainer.teacher
    for teacher in given if isinstance(given, MultiTeacher) else [given]:
        if isinstance(teacher, PeerTeacher):
            teacher.processing_class = trainer.processing_class
            teacher.save_pretrained(folder / "peer", trainer.args.should_save)
        if isinstance(teacher, EMATeacher) and export == "ema":
            with teacher.swapped_weights():
                trainer.save_model(str(folder / "ema"))
        if isinstance(teacher, MTPTeacher) and export == "mtp":
            run_on_main(partial(teacher.save_pretrained, folder / "student"))


def teacher_metrics(recipe: Recipe, student: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Held-out metrics of the model that taught, from those of the student: "peer" or "ema"; the first of several."""
    kind = recipe.all_teachers[0].kind
    if kind not in ("online", "mutual", "ema"):
        return {}
    own = {k.removeprefix("peer_"): v for k, v in student.items() if k.startswith("peer_")}
    return {"ema" if kind == "ema" else "peer": {"perplexity": student["teacher_perplexity"], **own}}
