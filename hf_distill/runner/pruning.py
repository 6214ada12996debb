"""Prunes the student of a recipe from its teacher, and keeps what was chosen for a resumed run."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from ..core import run_files
from ..core.io import damage_reported, read_json, write_json
from ..core.results import ModelFacts
from ..data import Examples
from ..models.blocks import find_blocks
from ..models.importance import Importance, measure_importance
from ..models.model_types import unwrap_model
from ..models.pruned_shape import KeptUnits, PrunedShape
from ..models.pruning import block_influence, cut_student, top_layers
from ..models.vocabulary import trim_model
from ..models.width_pruning import keep_units, pruned_config, select_units
from ..recipe.from_teacher import FromTeacher
from .model_loading import model_without_weights


class Pruner:
    """Prunes students from one teacher. All students after the first consist of the same units.

    Args:
        cut: The sizes of the student.
        kept_ids: For each token of the student, its id in the teacher's vocabulary; None: the student has all tokens.

    Attributes:
        kept: The units of the teacher that a student consists of; None until the first student is pruned.
        block_influence: Of the teacher's layers; None if it was not measured.
    """

    def __init__(self, cut: FromTeacher, kept_ids: Sequence[int] | None = None):
        self.cut, self.kept_ids = cut, kept_ids
        self.kept: KeptUnits | None = None
        self.block_influence: list[float] | None = None
        self._importance: Importance | None = None

    def change_sizes(self, cut: FromTeacher) -> None:
        """Prune the next student to other sizes; what was measured of the teacher is used again."""
        self.cut, self.kept = cut, None

    def student(self, teacher: nn.Module, rows: Examples) -> PreTrainedModel:
        """Prune a student.

        Args:
            teacher: The teacher.
            rows: Training rows of the student, which measure what the teacher needs least.

        Raises:
            DistillError: A size is not possible for this teacher.
        """
        if self.kept is None:
            self.kept = self._select(teacher, rows)
        return prune_to(teacher, self.kept, self.kept_ids)

    def kept_layers(self, teacher: nn.Module, rows: Examples) -> list[int] | None:
        """Return the indices of the layers that a student keeps; None: all."""
        cut = self.cut
        if self.kept is not None:
            return self.kept.layers
        if cut.layers is None and cut.keep_layers is not None:
            if self.block_influence is None:
                self.block_influence = block_influence(teacher, self._batches(rows))
            return top_layers(self.block_influence, cut.keep_layers)
        return None if cut.layers is None else sorted(cut.layers)

    def facts(self) -> ModelFacts:
        """Return the facts of the student for results.json."""
        facts: ModelFacts = {}
        if self.kept is not None and self.kept.layers is not None:
            facts["layers_kept"] = self.kept.layers
        tokens = {} if self.kept_ids is None else {"vocab_size": len(self.kept_ids)}
        if widths := self.cut.widths() | tokens:
            facts["widths"] = widths
        if self.block_influence is not None:
            facts["block_influence"] = self.block_influence
        return facts

    def save(self, folder: Path) -> None:
        """Write the units that were kept into a run folder, so that a resumed run prunes the same student."""
        if self.kept is not None:
            values = {"kept": self.kept.to_json(), "block_influence": self.block_influence}
            write_json(folder / run_files.PRUNING, values)

    def load(self, folder: Path) -> None:
        """Read the units that an interrupted run kept, if it has written them.

        Raises:
            DistillError: The file is damaged.
        """
        file = folder / run_files.PRUNING
        if values := read_json(file):
            with damage_reported(file):
                self.kept, self.block_influence = KeptUnits.from_json(values["kept"]), values["block_influence"]

    def _select(self, teacher: nn.Module, rows: Examples) -> KeptUnits:
        cut = self.cut
        if not cut.prunes_width:
            return KeptUnits(layers=self.kept_layers(teacher, rows))
        if self._importance is None:
            self._importance = measure_importance(
                teacher, self._batches(rows), by=cut.by, with_block_influence=cut.layers is None
            )
            self.block_influence = self._importance.block_influence
        layers = self.kept_layers(teacher, rows)
        shape = PrunedShape(layers=None if layers is None else tuple(layers), **cut.widths())
        return select_units(unwrap_model(teacher), shape, self._importance)

    def _batches(self, rows: Examples) -> Iterator[dict]:
        """Yield the first rows as batches of one row [1, S], in the teacher's ids."""
        for row in islice(rows, self.cut.calibration_rows):
            ids = torch.tensor([row["input_ids"]])
            yield {"input_ids": ids if self.kept_ids is None else torch.tensor(self.kept_ids)[ids]}


def check_widths(cut: FromTeacher, auto_class: type[_BaseAutoModelClass], config: PretrainedConfig) -> None:
    """Check the widths of a pruned student with the config of its teacher, before any weights are loaded.

    Args:
        cut: The sizes of the student.
        auto_class: The auto class that loads the teacher.
        config: The config of the teacher.

    Raises:
        DistillError: A width is not possible for this teacher.
    """
    teacher = model_without_weights(auto_class, config)
    pruned_config(teacher, PrunedShape(layers=tuple(sorted(cut.layers)) if cut.layers else None, **cut.widths()))


def prune_to(teacher: nn.Module, kept: KeptUnits, kept_ids: Sequence[int] | None = None) -> PreTrainedModel:
    """Prune a student to units that were chosen earlier.

    Args:
        teacher: The teacher.
        kept: The units of the student.
        kept_ids: For each token of the student, its id in the teacher's vocabulary; None: all tokens.
    """
    if any((kept.channels, kept.neurons, kept.heads, kept.experts)):
        student = keep_units(teacher, kept)
    else:
        student = cut_student(teacher, range(len(find_blocks(teacher)[1])) if kept.layers is None else kept.layers)
    if kept_ids is not None:
        trim_model(student, kept_ids)
    return student
