"""Students that are made from their teacher: layer pruning (`block_influence`, `cut_student`), width pruning
(`measure_importance`, `prune_student`) and vocabulary trimming (`trim_vocabulary`). Students for serving:
quantization-aware training (`prepare_quantized_student`).
"""

from .core.quantization_scheme import QuantizationScheme
from .models.importance import Importance, measure_importance
from .models.pruned_shape import KeptUnits, PrunedShape
from .models.pruning import block_influence, cut_student
from .models.quantized_training import convert_quantized_student, prepare_quantized_student
from .models.vocabulary import TrimmedVocabulary, count_ids, frequent_ids, trim_vocabulary
from .models.width_pruning import PrunedStudent, keep_units, prune_student, pruned_config, select_units

__all__ = [
    "Importance",
    "KeptUnits",
    "PrunedShape",
    "PrunedStudent",
    "QuantizationScheme",
    "TrimmedVocabulary",
    "block_influence",
    "convert_quantized_student",
    "count_ids",
    "cut_student",
    "frequent_ids",
    "keep_units",
    "measure_importance",
    "prepare_quantized_student",
    "prune_student",
    "pruned_config",
    "select_units",
    "trim_vocabulary",
]
