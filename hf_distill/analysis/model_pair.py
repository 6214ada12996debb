"""A teacher and a student with held-out rows: the input of every analysis that compares distributions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ..core.defaults import ALPHA, DIVERGENCE, HELD_OUT_TOKENS, TEMPERATURE
from ..core.logits import DenseLogits, LazyLogits
from ..core.targets import Targets
from ..core.teacher_inputs import teacher_batch, teacher_target_numbers, without_teacher_inputs
from ..errors import DistillError
from ..models.forward import extract_signals
from ..models.model_types import model_type_of
from ..models.module_state import eval_mode
from ..recipe.downloads import smoke_run
from ..recipe.schema import Recipe
from ..runner.model_loading import load_pretrained
from ..runner.run_results import Run
from ..runner.teacher_only import load_teacher_and_data
from ..teachers import CrossTokenizerTeacher, TrimmedVocabularyTeacher

_ONE_TOKENIZER = (
    "The teacher of the recipe has another tokenizer than the student (distill.cross_tokenizer), and this analysis "
    "compares distributions over the ids of one tokenizer. Compare the models by the held-out metrics of the run: "
    "bits_per_byte, teacher_bits_per_byte, chunk_kl and chunk_agreement."
)


@dataclass(frozen=True)
class PairBatch:
    """A batch with both models' logits of its T target tokens.

    inputs:  the collator's batch
    targets: the target tokens
    teacher: teacher logits; `.project(rows)` returns those of some tokens, [t, V]; None without a teacher
    student: student logits, in the same form; None without a student
    source:  [T] index of each token's source in a mixture; else None
    """

    inputs: dict[str, Tensor]
    targets: Targets
    teacher: LazyLogits | DenseLogits | None
    student: LazyLogits | DenseLogits | None
    source: Tensor | None


@dataclass(frozen=True)
class ModelPair:
    """Two models and the held-out rows to compare them on; made by `ModelPair.of_run` or `ModelPair.of_recipe`.

    teacher:     a model; None without a teacher
    student:     a model; None without a student
    rows:        with `input_ids` and `labels`
    collator:    makes a batch of rows
    tokenizer:   of both models, or of the student if there is a `cross_tokenizer_teacher`
    device:      to which batches are moved
    batch_size:  rows of a batch
    sources:     names of a mixture's sources
    temperature, alpha, divergence: of the objective
    smoke:       for a smoke run, a sentence that states it; else None
    cross_tokenizer_teacher: a teacher with another tokenizer, which has it, and its model is `teacher`; else None
    full_vocabulary_teacher: the teacher of a student with a trimmed vocabulary, whose model is `teacher`; else None
    """

    teacher: nn.Module | None
    student: nn.Module | None
    rows: Dataset
    collator: Callable[[list[dict]], dict[str, Tensor]]
    tokenizer: PreTrainedTokenizerBase | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 2
    sources: tuple[str, ...] = ()
    temperature: float = TEMPERATURE
    alpha: float = ALPHA
    divergence: str | dict[str, object] = DIVERGENCE
    smoke: str | None = None
    cross_tokenizer_teacher: CrossTokenizerTeacher | None = None
    full_vocabulary_teacher: TrimmedVocabularyTeacher | None = None

    @classmethod
    def of_recipe(
        cls, recipe: Recipe, on_stage: Callable[[str], None] = lambda text: None, one_tokenizer: bool = True
    ) -> "ModelPair":
        """Load the teacher of a recipe with its held-out rows, without a student.

        Args:
            recipe: see `load_recipe`.
            on_stage: called with a short description of each stage as it begins.
            one_tokenizer: whether teacher and student must have one tokenizer, as `batches` needs it.

        Raises:
            DistillError: the recipe's teacher is the student itself, or is trained together with it; or it has another
                tokenizer.
        """
        if recipe.is_cross_tokenizer and one_tokenizer:
            raise DistillError(_ONE_TOKENIZER)
        spec = recipe.primary_teacher.source_teacher
        if spec.kind != "frozen":
            raise DistillError(
                f"The recipe's teacher is of kind {spec.kind}, so it has no model before the run: use a recipe with a "
                "frozen teacher, or with a cached teacher that has a source."
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
            recipe.distill.temperature,
            recipe.distill.alpha,
            recipe.distill.divergence,
            smoke_run(recipe),
            teacher if isinstance(teacher, CrossTokenizerTeacher) else None,
            teacher if isinstance(teacher, TrimmedVocabularyTeacher) else None,
        )

    @classmethod
    def of_run(
        cls,
        run: Run,
        name: str | None = "student",
        on_stage: Callable[[str], None] = lambda text: None,
        one_tokenizer: bool = True,
    ) -> "ModelPair":
        """Load the teacher of a run and one of the models that the run saved, with the held-out rows.

        Args:
            run: see `open_run`.
            name: "student", "control" or the folder of a model; None loads the teacher only.
            on_stage: called with a short description of each stage as it begins.
            one_tokenizer: see `of_recipe`.

        Raises:
            DistillError: the model is missing, the run saved no model of its teacher, or see `of_recipe`.
        """
        folder = None if name is None else run.path(name)
        pair = cls.of_recipe(_recipe_with_saved_teacher(run), on_stage, one_tokenizer)
        if folder is None:
            return pair
        on_stage(f"Loading {folder}")
        return pair.with_student(load_model(folder, pair.device))

    def with_student(self, student: nn.Module | None) -> "ModelPair":
        """Return a copy with another student."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return ModelPair(**values | {"student": student})

    def batches(self, tokens: int | None = HELD_OUT_TOKENS) -> Iterator[PairBatch]:
        """Yield batches with one forward pass of both models each, until there were `tokens` target tokens.

        Args:
            tokens: number of target tokens after which no further batch is read; None reads all rows.

        Raises:
            DistillError: the held-out rows have no target token, or the models have different tokenizers.
        """
        if self.cross_tokenizer_teacher is not None:
            raise DistillError(_ONE_TOKENIZER)
        num_targets, rows = 0, iter(self.rows)
        model = self.teacher if self.student is None else self.student
        assert model is not None
        shift = model_type_of(model).shifts_labels
        while (tokens is None or num_targets < tokens) and (batch := [*islice(rows, self.batch_size)]):
            inputs = dict(send_to_device(self.collator(batch), self.device))
            source = inputs.pop("source", None)
            targets = Targets.from_batch(inputs, shift, teacher_target_numbers(inputs, shift))
            of_teacher = teacher_batch(inputs, targets, shift)
            inputs = without_teacher_inputs(inputs)
            if len(targets):
                num_targets += len(targets)
                token_source = source.flatten()[targets.positions] if self.sources and source is not None else None
                full = self.full_vocabulary_teacher
                teacher = _logits(self.teacher, *of_teacher) if full is None else full.logits(*of_teacher)
                student = _logits(self.student, inputs, targets)
                yield PairBatch(inputs, targets, teacher, student, token_source)
        if not num_targets:
            raise DistillError(
                "The held-out rows are empty: they have no target token. Set data.eval.holdout or data.eval.path in "
                "the recipe, and raise data.eval.max_rows."
            )


def load_model(folder: str | Path, device: torch.device) -> nn.Module:
    """Load a model that a run saved, adapters with their base model, in eval mode."""
    model: nn.Module = load_pretrained(AutoModelForCausalLM, str(folder))
    return model.to(device).requires_grad_(False).eval()


def _logits(model: nn.Module | None, inputs: dict, targets: Targets) -> LazyLogits | DenseLogits | None:
    """Run a model in eval mode and return its logits of the target tokens; None without a model."""
    if model is None:
        return None
    with eval_mode(model):
        return cast(LazyLogits | DenseLogits, extract_signals(model, inputs, targets, {}).logits)


def _recipe_with_saved_teacher(run: Run) -> Recipe:
    """Return the run's recipe; a teacher that changed during training is replaced by the model that the run saved."""
    folders = {"online": "peer", "mutual": "peer", "ema": "ema"}
    kind = run.recipe.primary_teacher.source_teacher.kind
    if kind == "frozen":
        return run.recipe
    if kind not in folders:
        raise DistillError(
            f"The teacher of {run.folder} is of kind {kind}, which saves no model, so the student cannot be compared "
            f"with it. Runs with a frozen teacher, or one of kind {', '.join(folders)}, can be compared."
        )
    if kind == "ema" and not run.has("ema"):
        raise DistillError(f"{run.folder / 'ema'} is missing: a run with export=ema writes it.")
    from ..recipe.load import validate

    teacher = {"kind": "frozen", "model": str(run.path(folders[kind]))}
    values = run.recipe.model_dump(exclude_none=True)
    student = {"model": str(run.path("student"))}
    return validate(
        values | {"student": student, "teachers": [], "losses": [], "teacher": teacher, "export": "adapter"}
    )
