"""The frames that a speech model with a CTC head makes of a sound, by the model's own functions."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import DistillError

_LENGTH_FUNCTIONS = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")
_MASKS = ("attention_mask", "padding_mask")


def count_frames(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Return the number of valid frames of each row, and that of a row without padding.

    A row with n samples that are no padding has as many valid frames as the model makes of n samples. They are the
    first ones, as in the model's own loss, because the models of transformers expect padding on the right.

    Args:
        model: a CTC model, without wrappers.
        inputs: the collator's batch.

    Returns:
        ([B], F).

    Raises:
        DistillError: the batch has no sound, or the class has no function for the number of frames.
    """
    name = type(model).__name__
    length = next((getattr(model, each) for each in _LENGTH_FUNCTIONS if hasattr(model, each)), None)
    sound: Any = inputs.get(model.main_input_name)
    if length is None:
        raise DistillError(
            f"{name} has none of the methods {' and '.join(_LENGTH_FUNCTIONS)}, which tell how many frames it makes of "
            "a sound: derive a class that has one."
        )
    if sound is None:
        raise DistillError(f"The batch has no `{model.main_input_name}`, which {name} reads; it has {sorted(inputs)}.")
    samples = torch.full(sound.shape[:1], sound.shape[1], device=sound.device)
    num_frames = int(cast(Tensor, length(torch.tensor([sound.shape[1]]))))
    if (mask := next((inputs[each] for each in _MASKS if inputs.get(each) is not None), None)) is not None:
        samples = mask.flatten(1).long().sum(1)
    return cast(Tensor, length(samples)).long().clamp(0, num_frames), num_frames
