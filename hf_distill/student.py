"""Students that are made from their teacher: layer pruning (`block_influence`, `cut_student`) and width pruning
(`measure_importance`, `prune_student`).
"""

from .models.importance import Importance, measure_importance
from .models.pruned_shape import KeptUnits, PrunedShape
from .models.pruning import block_influence, cut_student
from .models.width_pruning import PrunedStudent, keep_units, prune_student, pruned_config, select_units

__all__ = [
    "Importance",
    "KeptUnits",
    "PrunedShape",
    "PrunedStudent",
    "block_influence",
    "cut_student",
    "keep_units",
    "measure_importance",
    "prune_student",
    "pruned_config",
    "select_units",
]
