"""Knowledge distillation with the Hugging Face Trainer.

Public names are imported when they are first used, so `import hf_distill` does not import torch.
"""

from importlib import import_module

from .version import __version__

_HOME = {
    "DistillConfig": "trainer",
    "DistillTrainer": "trainer",
    "DistillSeq2SeqConfig": "trainer",
    "DistillSeq2SeqTrainer": "trainer",
    "DistillError": "errors",
    "Teacher": "teachers",
    "FrozenTeacher": "teachers",
    "OutputType": "losses",
    "RowOutputs": "losses",
    "register_model_type": "model_types",
    "DualProcessorCollator": "data",
    "LOSSES": "losses",
    "loss": "losses",
    "block_influence": "student",
    "cut_student": "student",
    "QuantizationScheme": "student",
    "prepare_quantized_student": "student",
    "convert_quantized_student": "student",
    "trim_vocabulary": "student",
    "load_recipe": "recipe",
    "run_recipe": "recipe",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'hf_distill' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
