"""Data collators of classifiers and of speech recognition, as the example scripts of transformers have them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from ..core.targets import IGNORE_INDEX
from ..errors import DistillError

Row = Mapping[str, Any]


def _with_source(batch: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Add `source` [B], the index of the source of each row, if the rows have one."""
    return batch | ({"source": torch.tensor([row["source"] for row in rows])} if "source" in rows[0] else {})


class TextCollator:
    """Pads rows of a tokenizer, with `labels` [B]; see `DataCollatorWithPadding`.

    Args:
        tokenizer: the tokenizer of the rows.
        sources: names of the sources, in the order of their indices.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str] = ()):
        self.sources, self._pad = tuple(sources), DataCollatorWithPadding(tokenizer)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the inputs of the tokenizer [B, S], and `labels` and `source` [B]."""
        batch = self._pad([{name: value for name, value in row.items() if name != "source"} for row in rows])
        return _with_source(dict(batch), rows)


class ImageCollator:
    """Makes `pixel_values` of the images of a batch, with `labels` [B].

    Args:
        processor: the image processor.
        sources: names of the sources, in the order of their indices.
    """

    def __init__(self, processor: BaseImageProcessor, sources: Sequence[str] = ()):
        self.sources, self._processor = tuple(sources), processor

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the outputs of the processor, and `labels` and `source` [B]."""
        batch = dict(self._processor([row["image"].convert("RGB") for row in rows], return_tensors="pt"))
        return _with_source(batch | {"labels": torch.tensor([row["labels"] for row in rows])}, rows)


class SpeechCollator:
    """Makes `input_features` of the audio of a batch, and `labels` [B, S], padded with -100.

    The model prepends the token that starts its decoder, so it is removed where the tokenizer prepends it too.

    Args:
        processor: the processor, which has a feature extractor and a tokenizer.
        start_token_id: id of the token that starts the decoder.
        sources: names of the sources, in the order of their indices.
    """

    def __init__(self, processor: ProcessorMixin, start_token_id: int, sources: Sequence[str] = ()):
        self.sources, self._start_token_id = tuple(sources), start_token_id
        self._extract: Any = getattr(processor, "feature_extractor", None)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the outputs of the feature extractor, `labels` [B, S] and `source` [B]."""
        rate = self._extract.sampling_rate
        waves = [waveform(row["audio"], rate) for row in rows]
        batch = dict(self._extract(waves, sampling_rate=rate, return_tensors="pt"))
        return _with_source(batch | {"labels": self._labels([row["labels"] for row in rows])}, rows)

    def _labels(self, labels: Sequence[Sequence[int]]) -> Tensor:
        padded = pad_sequence([torch.tensor(ids) for ids in labels], batch_first=True, padding_value=IGNORE_INDEX)
        return padded[:, 1:] if bool((padded[:, 0] == self._start_token_id).all()) else padded


def waveform(audio: Any, sampling_rate: int) -> Any:
    """Return the samples of one channel of a recording, as an array [samples].

    Args:
        audio: a mapping with `array` and `sampling_rate`, or a decoder of `datasets.Audio`.
        sampling_rate: samples a second that the model reads.

    Raises:
        DistillError: the recording has another sampling rate.
    """
    if audio["sampling_rate"] != sampling_rate:
        raise DistillError(
            f"A recording has {audio['sampling_rate']} samples a second, and the model reads {sampling_rate}: resample "
            "the column of the data, or store it as audio files, which are resampled when they are read."
        )
    samples = torch.as_tensor(audio["array"], dtype=torch.float32)
    return (samples.mean(0) if samples.dim() == 2 else samples).numpy()
