"""The config of a student that is pruned from its teacher, from the teacher's config alone."""

from transformers import PretrainedConfig

from ..errors import DistillError
from ..models.pruned_shape import PrunedShape
from ..models.pruning import prune_config
from ..models.width_pruning import pruned_config
from ..recipe.from_teacher import FromTeacher
from .model_stats import ModelStats, meta_model


def student_config(cut: FromTeacher, teacher: PretrainedConfig) -> PretrainedConfig:
    """Return the config of a pruned student; for a plan it does not matter which units it keeps.

    Args:
        cut: the sizes of the student.
        teacher: the config of the teacher.

    Raises:
        DistillError: a size is not possible, or the sizes are still to be searched.
    """
    if cut.target_parameters is not None:
        raise DistillError(
            f"student.from_teacher.target_parameters is {cut.target_parameters}, so the sizes of the student are not "
            "known: `hf-distill prune` searches them; set the sizes that it prints."
        )
    depth = teacher.get_text_config().num_hidden_layers
    layers = tuple(cut.layers if cut.layers else range(cut.keep_layers or depth))
    if max(layers) >= depth:
        raise DistillError(
            f"student.from_teacher keeps block {max(layers)}, but the teacher has {depth} blocks, numbered from 0."
        )
    if not cut.prunes_width:
        return prune_config(teacher, layers, depth)
    return pruned_config(meta_model(teacher), PrunedShape(layers=layers, **cut.widths()))


def parameters_of(cut: FromTeacher, teacher: PretrainedConfig) -> int:
    """Count the parameters of a pruned student; see `student_config`."""
    return ModelStats.of(student_config(cut, teacher)).parameters
