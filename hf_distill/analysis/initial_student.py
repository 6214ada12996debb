"""The student as it was before its run."""

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

from ..errors import DistillError
from ..models.pruning import cut_student
from ..runner.model_loading import load_pretrained
from ..runner.run_results import Run


def student_before(run: Run, teacher: nn.Module | None) -> nn.Module:
    """The student that a run began with: the blocks of its teacher that it kept, or a model as published.

    Args:
        run: see `open_run`.
        teacher: from which the student was cut; not needed where it was a model of its own.

    Raises:
        DistillError: the run's evidence does not say which blocks were kept.
    """
    spec, donor = run.recipe.student, teacher
    if spec.from_teacher is None or donor is None:
        donor = load_pretrained(AutoModelForCausalLM, str(spec.model), revision=spec.revision, dtype=spec.dtype)
    if spec.from_teacher is None:
        return donor.requires_grad_(False).eval()
    layers = run.results.get("student", {}).get("layers_kept")
    if layers is None:
        raise DistillError(
            f"{run.folder / 'results.json'} does not say which blocks the student kept: `hf-distill run RECIPE "
            "--resume` ends the run, and writes it."
        )
    whole: Any = donor
    student = cut_student(whole, layers).to(next(whole.parameters()).dtype)
    return student.requires_grad_(False).eval()
