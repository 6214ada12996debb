"""Two models over held-out rows, one forward of each: what every analysis of distributions looks at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..core.logits import DenseLogits, LazyLogits
from ..core.targets import Targets
from ..errors import DistillError
from ..models.forward import extract_signals
from ..models.model_types import model_type_of
from ..models.module_state import eval_mode
from ..recipe.downloads import smoke_run
from ..recipe.schema import Recipe
from ..runner.run_results import Run
from ..runner.teacher_only import load_teacher_and_data


@dataclass(frozen=True)
class PairBatch:
    """A batch and what the models say of its T asked tokens.

    inputs:  the collator's batch
    targets: the asked tokens
    teacher: `.project(rows)` makes logits [t, V] of some of them; None: there is no such model
    student: the same of the student
    source:  [T] of a mixture: the index of each token's source; else None
    """

    inputs: dict[str, Tensor]
    targets: Targets
    teacher: LazyLogits | DenseLogits | None
    student: LazyLogits | DenseLogits | None
    source: Tensor | None


@dataclass(frozen=True)
class ModelPair:
    """Two models and held-out rows to compare them on, made by `ModelPair.of_run` or `ModelPair.of_recipe`.

    teacher:     a model; None: there is none
    student:     a model; None: there is none
    rows:        with `input_ids` and `labels`
    collator:    rows to a batch
    tokenizer:   of both
    device:      where the rows go
    batch_size:  rows of a batch
    sources:     names of a mixture's sources
    temperature: of the objective, and its alpha and divergence
    smoke:       of a smoke run, a sentence that says so; None: it is none, or a script's
    """

    teacher: nn.Module | None
    student: nn.Module | None
    rows: Any
    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    tokenizer: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 2
    sources: tuple[str, ...] = ()
    temperature: float = 2.0
    alpha: float = 0.5
    divergence: Any = "forward_kl"
    smoke: str | None = None

    @classmethod
    def of_recipe(cls, recipe: Recipe, on_stage: Callable[[str], None] = lambda text: None) -> "ModelPair":
        """The teacher of a recipe over its held-out rows, without a student.

        Raises:
            DistillError: the recipe's teacher is the student itself, or is trained beside it.
        """
        spec = recipe.primary_teacher.source_teacher
        if spec.kind != "frozen":
            raise DistillError(
                f"The recipe's teacher is of kind {spec.kind}, and has no model before the run: this needs a frozen "
                "teacher, or a cached one with its source."
            )
        teacher, data, tokenizer, args = load_teacher_and_data(recipe, spec, on_stage)
        return cls(
            teacher.model,
            None,
            data.held_out,
            data.collator,
            tokenizer,
            args.device,
            args.per_device_eval_batch_size if recipe.train.per_device_eval_batch_size else args.train_batch_size,
            data.collator.sources if len(data.collator.sources) > 1 else (),
            **recipe.distill.model_dump(),
            smoke=smoke_run(recipe),
        )

    @classmethod
    def of_run(
        cls, run: Run, name: str | None = "student", on_stage: Callable[[str], None] = lambda text: None
    ) -> "ModelPair":
        """The teacher of a run, and a model that the run left, over its held-out rows.

        Args:
            run: see `open_run`.
            name: "student" or "control"; None: the teacher alone.
            on_stage: told in a few words what begins.

        Raises:
            DistillError: that model is missing, or the run's teacher left no model.
        """
        folder = None if name is None else run.path(name)
        pair = cls.of_recipe(_with_teacher(run), on_stage)
        if folder is None:
            return pair
        on_stage(f"Loading {folder}")
        return pair.with_student(load_model(folder, pair.device))

    def with_student(self, student: nn.Module | None) -> "ModelPair":
        """The same with another student."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return ModelPair(**values | {"student": student})

    def batches(self, tokens: int | None = 4096) -> Iterator[PairBatch]:
        """One forward of both models, batch by batch, until so many tokens were asked (None: of all rows).

        Raises:
            DistillError: no token is asked: the slice is empty.
        """
        found, rows = 0, iter(self.rows)
        model: Any = self.teacher if self.student is None else self.student
        shift = model_type_of(model).shifts_labels
        while (tokens is None or found < tokens) and (batch := [*islice(rows, self.batch_size)]):
            inputs = {name: value.to(self.device) for name, value in self.collator(batch).items()}
            source = inputs.pop("source", None)
            targets = Targets.from_batch(inputs, shift)
            if len(targets):
                found += len(targets)
                of_tokens = source.flatten()[targets.positions] if self.sources and source is not None else None
                teacher, student = _said(self.teacher, inputs, targets), _said(self.student, inputs, targets)
                yield PairBatch(inputs, targets, teacher, student, of_tokens)
        if not found:
            raise DistillError(
                "The held-out slice is empty: no token of it is asked. Set data.eval.holdout or data.eval.path in the "
                "recipe, and raise data.eval.max_rows."
            )


def load_model(folder: str | Path, device: torch.device) -> nn.Module:
    """A model that a run left, adapters on their base included, in eval mode."""
    return AutoModelForCausalLM.from_pretrained(str(folder)).to(device).requires_grad_(False).eval()


def _said(model: nn.Module | None, inputs: dict, targets: Targets) -> LazyLogits | DenseLogits | None:
    if model is None:
        return None
    with eval_mode(model):
        source: Any = extract_signals(model, inputs, targets, {}).logits
    return source


def _with_teacher(run: Run) -> Recipe:
    """The run's recipe with the teacher as the run left it, where it moved."""
    kept = {"online": "peer", "mutual": "peer", "ema": "ema"}
    kind = run.recipe.primary_teacher.source_teacher.kind
    if kind == "frozen":
        return run.recipe
    if kind not in kept:
        raise DistillError(f"The teacher of {run.folder} is of kind {kind}, which leaves no model to compare with.")
    if kind == "ema" and not run.has("ema"):
        raise DistillError(f"{run.folder / 'ema'} is missing: a run with export=ema writes it.")
    from ..recipe.load import validate

    teacher = {"kind": "frozen", "model": str(run.path(kept[kind]))}
    values = run.recipe.model_dump(exclude_none=True)
    student = {"model": str(run.path("student"))}
    return validate(
        values | {"student": student, "teachers": [], "losses": [], "teacher": teacher, "export": "adapter"}
    )
