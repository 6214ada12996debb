"""Images, videos and sound in the batches of models that read them at placeholder tokens among their text.

The first dimension of their tensors counts images, patches or tiles, and not the rows of the batch, so no part of a
batch can be taken by rows. The labels of placeholder tokens are no target tokens: no model predicts an image.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from ..core.targets import IGNORE_INDEX

IMAGE_INPUTS = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_patches")
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id")
_LABELS = ("labels", "shift_labels", "teacher_labels", "view_labels")
_KINDS_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")  # tell tokens of images from those of text
_OF_TOKENS = ("input_ids", "attention_mask", "has_labels", *_KINDS_OF_TOKENS, *_LABELS)


def placeholder_ids(config: PretrainedConfig | None) -> frozenset[int]:
    """Return the ids of the tokens at which a model reads images, videos or sound; empty if there are none."""
    values = (getattr(config, name, None) for name in _PLACEHOLDERS)
    return frozenset(value for value in values if isinstance(value, int) and value >= 0)


def image_inputs(inputs: Mapping[str, Any]) -> list[str]:
    """Return the names of the images and videos of a batch."""
    return [name for name in IMAGE_INPUTS if inputs.get(name) is not None]


def without_placeholder_labels(inputs: dict[str, Any], placeholders: frozenset[int]) -> dict[str, Any]:
    """Return a batch in whose labels placeholder tokens are -100.

    Args:
        inputs: the collator's batch.
        placeholders: ids of the placeholder tokens; without any, the batch is returned unchanged.
    """
    if not placeholders:
        return inputs
    masked = {}
    for name in _LABELS:
        labels = inputs.get(name)
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            for placeholder in placeholders:
                labels = labels.masked_fill(labels == placeholder, IGNORE_INDEX)
            masked[name] = labels
    return inputs | masked


def without_images(inputs: dict[str, Any], placeholders: frozenset[int]) -> dict[str, Any]:
    """Return the text of a batch with images, for short forwards of a few rows.

    Placeholder tokens become text tokens, and tensors that do not hold one entry for each row are left out. A batch
    without images, or of a model without placeholder tokens, is returned unchanged.

    Args:
        inputs: the collator's batch, or keyword arguments of a model's forward.
        placeholders: ids of the placeholder tokens of the model.
    """
    if not placeholders or not image_inputs(inputs) or not isinstance(inputs.get("input_ids"), Tensor):
        return inputs
    text_id = next(number for number in range(len(placeholders) + 1) if number not in placeholders)
    text = {name: value for name, value in inputs.items() if not isinstance(value, Tensor) or name in _OF_TOKENS}
    for placeholder in placeholders:
        text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == placeholder, text_id)
    return text | {name: text[name].new_zeros(text[name].shape) for name in _KINDS_OF_TOKENS if name in text}


__all__ = ["IMAGE_INPUTS", "image_inputs", "placeholder_ids", "without_images", "without_placeholder_labels"]
