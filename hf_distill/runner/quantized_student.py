"""The quantized student of a recipe: where its weights are saved, and its export as a torchao checkpoint."""

import shutil
from pathlib import Path

from torch import nn
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from ..core.files import atomic_path
from ..core.quantization_scheme import QuantizationScheme
from ..errors import collect_errors, require_package
from ..models.quantized_training import check_machine, convert_quantized_student, prepare_quantized_student
from ..recipe.schema import Recipe
from ..teachers.loading import zero3_init_context
from .model_loading import load_pretrained

FULL_PRECISION = "full_precision"  # name of the control that is trained without quantization


def scheme_of(recipe: Recipe) -> QuantizationScheme | None:
    """Return the quantization of a recipe's student; None if it has none."""
    return recipe.student.quantize.resolved if recipe.student.quantize else None


def weights_folder(folder: Path, name: str, scheme: QuantizationScheme | None) -> Path:
    """Return the folder of the weights that were trained: RUN/NAME, or RUN/NAME-unquantized of a quantized student.

    Args:
        folder: The run folder.
        name: Name of the training.
        scheme: Its quantization.
    """
    return folder / (name if scheme is None or name == FULL_PRECISION else f"{name}-unquantized")


def load_fake_quantized(
    auto_class: type[_BaseAutoModelClass], folder: Path, scheme: QuantizationScheme | None
) -> nn.Module:
    """Load trained weights as a model that computes with the quantized ones, and can be evaluated by a trainer.

    Args:
        auto_class: Auto class of the model.
        folder: Folder of the weights; see `weights_folder`.
        scheme: The quantization; None: the model is not quantized.
    """
    with zero3_init_context(None):
        model = load_pretrained(auto_class, str(folder), dtype="auto")
    return model if scheme is None else prepare_quantized_student(model, scheme)


def export_quantized(
    auto_class: type[_BaseAutoModelClass], source: Path, target: Path, scheme: QuantizationScheme
) -> None:
    """Write a torchao checkpoint of trained weights, with their tokenizer, which `from_pretrained` loads.

    Args:
        auto_class: Auto class of the model.
        source: Folder of the weights in full precision; it is kept.
        target: Folder of the checkpoint, which replaces one that an interrupted run left.
        scheme: The quantization.
    """
    model = convert_quantized_student(load_fake_quantized(auto_class, source, scheme), scheme)
    with atomic_path(target) as temporary:
        for folder in (temporary, target):
            shutil.rmtree(folder, ignore_errors=True)
        ignored = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", "config.json")
        shutil.copytree(source, temporary, ignore=ignored)
        model.save_pretrained(temporary)  # type: ignore[operator]  # a transformers model


def launch_problems(recipe: Recipe) -> list[str]:
    """List why the quantized student of a recipe cannot be trained on this machine or in this launch."""
    scheme = scheme_of(recipe)
    if scheme is None:
        return []
    problems = list[str]()
    with collect_errors(problems):
        require_package("torchao", "torchao", "student.quantize")
        check_machine(scheme)
    return problems
