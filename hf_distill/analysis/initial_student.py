"""The student of a run as it was before training."""

from torch import nn
from transformers import AutoModelForCausalLM

from ..core import run_files
from ..errors import DistillError
from ..models.pruning import cut_student
from ..runner.model_loading import load_pretrained
from ..runner.run_results import Run


def student_before(run: Run, teacher: nn.Module | None) -> nn.Module:
    """Return the student before training: the blocks that were kept of its teacher, or a published model.

    Args:
        run: see `open_run`.
        teacher: the model that the student was cut from; not needed if the student began as a published model.

    Raises:
        DistillError: results.json does not contain which blocks were kept.
    """
    spec, donor = run.recipe.student, teacher
    if spec.from_teacher is None or donor is None:
        donor = load_pretrained(AutoModelForCausalLM, str(spec.model), revision=spec.revision, dtype=spec.dtype)
    if spec.from_teacher is None:
        return donor.requires_grad_(False).eval()
    layers = run.results.get("student", {}).get("layers_kept")
    if layers is None:
        raise DistillError(
            f"{run.folder / run_files.RESULTS} does not contain which blocks the student kept (student.layers_kept): "
            "`hf-distill run RECIPE --resume` completes the run and writes it."
        )
    student: nn.Module = cut_student(donor, layers)
    return student.to(next(donor.parameters()).dtype).requires_grad_(False).eval()
