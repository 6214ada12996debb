"""Exports non-frozen teachers (peer, EMA, MTP heads) and their metrics."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from ..core.held_out_metrics import HELD_OUT_METRICS
from ..core.processes import run_on_main
from ..recipe.schema import Recipe
from ..teachers import EMATeacher, MTPTeacher, PeerTeacher
from ..teachers.group import TeacherGroup
from ..trainer.trainer import DistillTrainer


def export_teachers(trainer: DistillTrainer, export: str, folder: Path) -> None:
    """Write a peer to RUN/peer; with export "ema" the average to RUN/ema; with "mtp" the heads to RUN/student."""
    trained = trainer.teacher
    for teacher in trained.teachers.values() if isinstance(trained, TeacherGroup) else [trained]:
        if isinstance(teacher, PeerTeacher):
            teacher.processing_class = trainer.processing_class
            teacher.save_pretrained(folder / "peer", trainer.args.should_save)
        if isinstance(teacher, EMATeacher) and export == "ema":
            with teacher.swapped_weights():
                trainer.save_model(str(folder / "ema"))
        if isinstance(teacher, MTPTeacher) and export == "mtp":
            run_on_main(partial(teacher.save_pretrained, folder / "student"))


def teacher_metrics(recipe: Recipe, student: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return the held-out metrics of the first teacher as "peer" or "ema", taken from those of the student."""
    kind = recipe.all_teachers[0].kind
    if kind not in ("online", "mutual", "ema"):
        return {}
    peer_metrics = {key.removeprefix("peer_"): value for key, value in student.items() if key.startswith("peer_")}
    measured = {
        metric.key: student[name] for metric in HELD_OUT_METRICS if (name := f"teacher_{metric.key}") in student
    }
    return {"ema" if kind == "ema" else "peer": {**measured, **peer_metrics}}
