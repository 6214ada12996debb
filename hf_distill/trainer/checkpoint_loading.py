"""`WeightsMixin`: a Trainer that loads the weights of its checkpoints completely, or raises an error."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer
from transformers.utils import is_sagemaker_mp_enabled, logging

from ..models.checkpoint_weights import load_weights
from ..models.model_types import unwrap_parallel

logger = logging.get_logger(__name__)
_Base: Any = Trainer if TYPE_CHECKING else object


class WeightsMixin(_Base):
    """Loads checkpoints with the key conversion of `from_pretrained`; FSDP and DeepSpeed load theirs themselves."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a checkpoint; the Trainer would load them with `strict=False`, without key conversion.

        Raises:
            DistillError: the weights do not match the model; see `load_weights`.
        """
        if self._uses_trainer_loading():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        logger.info(f"Loading model from {resume_from_checkpoint}.")
        load_weights(unwrap_parallel(self.model if model is None else model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint.

        Raises:
            DistillError: the weights do not match the model; see `load_weights`.
        """
        if self._uses_trainer_loading():
            super()._load_best_model()
            return
        best = str(self.state.best_model_checkpoint)
        logger.info(f"Loading best model from {best} (score: {self.state.best_metric}).")
        load_weights(unwrap_parallel(self.model), Path(best))

    def _uses_trainer_loading(self) -> bool:
        """Return whether the Trainer loads this model itself: it is sharded, or its base weights are quantized."""
        quantized = getattr(unwrap_parallel(self.model), "hf_quantizer", None) is not None
        adapters = hasattr(unwrap_parallel(self.model), "peft_config")
        return (
            self.is_fsdp_enabled
            or self.is_deepspeed_enabled
            or is_sagemaker_mp_enabled()
            or (quantized and not adapters)
        )
