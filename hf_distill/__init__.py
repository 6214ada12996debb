"""Knowledge distillation with the Hugging Face Trainer.

Public names are imported when they are first used, so `import hf_distill` does not import torch. Type checkers read the
imports under `TYPE_CHECKING`.
"""

from typing import TYPE_CHECKING

from .lazy_imports import import_on_first_use
from .version import __version__

_HOME = {
    # trainers
    "DistillConfig": ".trainer",
    "DistillTrainer": ".trainer",
    "DistillSeq2SeqConfig": ".trainer",
    "DistillSeq2SeqTrainer": ".trainer",
    # errors
    "DistillError": ".errors",
    "RunError": ".errors",
    "RunInterrupted": ".errors",
    # teachers
    "Teacher": ".teachers",
    "FrozenTeacher": ".teachers",
    # losses
    "LOSSES": ".losses",
    "loss": ".losses",
    "fused_distillation_loss": ".head",
    # types of models
    "OutputType": ".losses",
    "RowOutputs": ".losses",
    "register_model_type": ".model_types",
    # data
    "DualProcessorCollator": ".data",
    # students that are made from their teacher
    "block_influence": ".student",
    "cut_student": ".student",
    "measure_importance": ".student",
    "prune_student": ".student",
    "PrunedShape": ".student",
    "trim_vocabulary": ".student",
    # students for serving
    "QuantizationScheme": ".student",
    "prepare_quantized_student": ".student",
    "convert_quantized_student": ".student",
    # recipes
    "load_recipe": ".recipe",
    "run_recipe": ".recipe",
    "generate_data": ".recipe",
    "resolve_model": ".recipe",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from .data import DualProcessorCollator as DualProcessorCollator
    from .errors import DistillError as DistillError
    from .errors import RunError as RunError
    from .errors import RunInterrupted as RunInterrupted
    from .head import fused_distillation_loss as fused_distillation_loss
    from .losses import LOSSES as LOSSES
    from .losses import OutputType as OutputType
    from .losses import RowOutputs as RowOutputs
    from .losses import loss as loss
    from .model_types import register_model_type as register_model_type
    from .recipe import generate_data as generate_data
    from .recipe import load_recipe as load_recipe
    from .recipe import resolve_model as resolve_model
    from .recipe import run_recipe as run_recipe
    from .student import PrunedShape as PrunedShape
    from .student import QuantizationScheme as QuantizationScheme
    from .student import block_influence as block_influence
    from .student import convert_quantized_student as convert_quantized_student
    from .student import cut_student as cut_student
    from .student import measure_importance as measure_importance
    from .student import prepare_quantized_student as prepare_quantized_student
    from .student import prune_student as prune_student
    from .student import trim_vocabulary as trim_vocabulary
    from .teachers import FrozenTeacher as FrozenTeacher
    from .teachers import Teacher as Teacher
    from .trainer import DistillConfig as DistillConfig
    from .trainer import DistillSeq2SeqConfig as DistillSeq2SeqConfig
    from .trainer import DistillSeq2SeqTrainer as DistillSeq2SeqTrainer
    from .trainer import DistillTrainer as DistillTrainer
else:
    __getattr__ = import_on_first_use(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)
