"""The weights of a checkpoint are loaded completely, or an error is raised."""

from pathlib import Path

from accelerate import Accelerator
from torch import nn
from transformers.utils import is_sagemaker_mp_enabled, logging

from ..models.checkpoint_weights import load_weights
from ..models.model_types import unwrap_parallel

logger = logging.get_logger(__name__)


def load_checkpoint_weights(model: nn.Module, checkpoint: str, accelerator: Accelerator) -> bool:
    """Load weights with the key conversion of `from_pretrained`; the Trainer has none, and ignores missing keys.

    Args:
        model: the student, with or without wrappers.
        checkpoint: the folder of the checkpoint.
        accelerator: the accelerator of the training.

    Returns:
        False if the Trainer has to load this model: it is sharded, or its base weights are quantized.

    Raises:
        DistillError: the weights do not match the model; see `load_weights`.
    """
    model = unwrap_parallel(model)
    is_quantized = getattr(model, "hf_quantizer", None) is not None and not hasattr(model, "peft_config")
    plugins = (getattr(accelerator.state, name, None) for name in ("fsdp_plugin", "deepspeed_plugin"))
    if is_quantized or any(plugin is not None for plugin in plugins) or is_sagemaker_mp_enabled():
        return False
    logger.info(f"Loading the weights of {checkpoint}.")
    load_weights(model, Path(checkpoint))
    return True
