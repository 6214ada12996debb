"""Rows with images in on-policy distillation: their messages, and what the models read of TRL's batches."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from trl.data_utils import prepare_multimodal_messages

IMAGE_COLUMNS = ("images", "image")
# Inputs of the models in a batch of TRL: those of the tokens, [B, S], and those of images, patches or tiles.
TOKEN_FIELDS = ("token_type_ids", "mm_token_type_ids")
IMAGE_FIELDS = (
    *("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes"),
    "image_position_ids",
)
_COUNTS, _COUNTS_OF_ROWS = "num_images", "num_images_of_rows"


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """Return the images of a row, in the columns that TRL reads: `images`, or `image`."""
    if row.get("images") is not None:
        return list(row["images"])
    return [] if row.get("image") is None else [row["image"]]


def messages_of(row: Mapping[str, Any], completion: bool = False) -> list[dict]:
    """Return the messages of a row's prompt with its images, as TRL passes them to a processor.

    Args:
        row: has `prompt`, and the column `completion` if it is returned too.
        completion: whether the messages of the completion follow.
    """
    messages = prepare_multimodal_messages(row["prompt"], images=images_of(row))
    return messages + prepare_multimodal_messages(row["completion"]) if completion else messages


@contextmanager
def padding_on_the_left(tokenizer: Any) -> Iterator[None]:
    """Let a tokenizer pad on the left, as TRL pads prompts; token types of a processor would be misaligned else."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def keep_padded_images(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch of TRL whose images are padded to one row of images for each row of the batch, if they are.

    TRL takes the first dimension for that of images if it happens to be as long, and would give the images to other
    rows of the batch. Without `num_images` it takes it for that of rows.
    """
    pixels = batch.get("pixel_values")
    if not isinstance(pixels, Tensor) or _COUNTS not in batch or pixels.dim() < 5 or "image_sizes" in batch:
        return batch
    if len(pixels) != len(batch["prompt_ids"]):
        return batch
    counts = batch[_COUNTS]
    return {name: value for name, value in batch.items() if name != _COUNTS} | {_COUNTS_OF_ROWS: counts}


def fields_of_images(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the inputs of a micro-batch that hold images; empty if none of its rows has an image."""
    counts = batch.get(_COUNTS, batch.get(_COUNTS_OF_ROWS))
    if counts is not None and not sum(counts):
        return {}
    return {name: batch[name] for name in IMAGE_FIELDS if name in batch}
