"""The student of a run as it was before training."""

from collections.abc import Sequence

from torch import nn
from transformers import AutoModelForCausalLM

from ..core import run_files
from ..errors import DistillError
from ..models.pruned_shape import KeptUnits
from ..models.quantized_training import prepare_quantized_student
from ..runner.model_loading import load_pretrained
from ..runner.pruning import Pruner, prune_to
from ..runner.quantized_student import scheme_of
from ..runner.run_results import Run


def student_before(run: Run, teacher: nn.Module | None, kept_ids: Sequence[int] | None = None) -> nn.Module:
    """Return the student before training: what was kept of its teacher, or a published model.

    Args:
        run: see `open_run`.
        teacher: the model that the student was cut from; not needed if the student began as a published model.
        kept_ids: for each token of the student, its id in the teacher's vocabulary; None: it has all tokens.

    Raises:
        DistillError: the run folder does not contain what was kept.
    """
    spec, donor = run.recipe.student, teacher
    if spec.from_teacher is None or donor is None:
        donor = load_pretrained(AutoModelForCausalLM, str(spec.model), revision=spec.revision, dtype=spec.dtype)
    if spec.from_teacher is None:
        return _as_served(donor, run)
    pruner = Pruner(spec.from_teacher, kept_ids if spec.from_teacher.vocab else None)
    pruner.load(run.folder)
    layers = run.results.get("student", {}).get("layers_kept")
    if pruner.kept is None and (layers is None or spec.from_teacher.prunes_width):
        raise DistillError(
            f"{run.folder / run_files.PRUNING} does not exist, so what the student kept of its teacher is not known: "
            "`hf-distill run RECIPE --resume` completes the run and writes it; the stages of a chain have one each."
        )
    student: nn.Module = prune_to(donor, pruner.kept or KeptUnits(layers=layers), pruner.kept_ids)
    return _as_served(student.to(next(donor.parameters()).dtype), run)


def _as_served(student: nn.Module, run: Run) -> nn.Module:
    """Return the student for evaluation, with quantized weights if the run trained it with them."""
    if scheme := scheme_of(run.recipe):
        prepare_quantized_student(student, scheme)
    return student.requires_grad_(False).eval()
