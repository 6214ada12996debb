"""Outputs that are a distribution for each frame of a sound: CTC."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...core.loss_kinds import DISTRIBUTION, FRAMES
from ...core.targets import IGNORE_INDEX, Targets, target_labels
from ...core.transcripts import MEAN, SUM, TranscriptLabels
from ...errors import DistillError
from ..analytic_gradients import BlockLogits
from ..ctc import FRAME_PAIR_METRICS, FRAME_STUDENT_METRICS, frame_metrics
from ..registry import Loss
from .base import OutputType


@dataclass(frozen=True)
class Frames(OutputType):
    """A distribution over tokens and a blank for each frame of a sound, trained with a CTC loss on transcripts.

    count_frames:  returns (number of valid frames of each row [B], number of frames of a padded row) of a batch, by the
                   model's own functions; None for a model that is not known yet
    blank:         id of the blank
    reduction:     `ctc_loss_reduction` of the config
    zero_infinity: `ctc_zero_infinity` of the config
    """

    count_frames: Callable[[Mapping[str, Tensor]], tuple[Tensor, int]] | None = None
    blank: int = 0
    reduction: str = SUM
    zero_infinity: bool = False

    outputs, soft_loss, hard_loss = FRAMES, "forward_kl", "ctc"
    student_metrics, pair_metrics = FRAME_STUDENT_METRICS, FRAME_PAIR_METRICS
    predicts_tokens = True
    target = "frame"
    _LABEL_RANGE: ClassVar[str] = "range of the transcripts"

    def __post_init__(self) -> None:
        if self.reduction not in (SUM, MEAN):
            raise DistillError(
                f"ctc_loss_reduction of the config is {self.reduction!r}: set it to {SUM!r} or {MEAN!r}, which weight "
                "the losses of the rows."
            )

    def fits(self, loss: Loss) -> bool:
        """Whether a loss is the CTC loss, or compares distributions, which each frame has."""
        return loss.fits(FRAMES) or (loss.fits(DISTRIBUTION) and "logits" in loss.compares)

    def different_settings(self, teacher: OutputType) -> list[str]:
        """Return an error message if the blank of the teacher is another token."""
        if not isinstance(teacher, Frames) or teacher.blank == self.blank:
            return []
        return [
            f"The blank of the teacher is the token {teacher.blank} and that of the student {self.blank}, so the same "
            "id means different tokens: use two models with the same tokenizer and pad_token_id"
        ]

    def countable_labels(self, inputs: dict, shift: bool) -> Tensor:
        """Return a zero for each valid frame, [B, F]; -100 for padding."""
        assert self.count_frames is not None, "only the type of a model counts frames"
        counts, num_frames = self.count_frames(inputs)
        is_padding = torch.arange(num_frames, device=counts.device) >= counts[:, None]
        return torch.zeros_like(is_padding, dtype=torch.long).masked_fill(is_padding, IGNORE_INDEX)

    def find_targets(self, inputs: dict, shift: bool, numbers: Mapping[str, Tensor]) -> Targets:
        """Return the valid frames of a batch as targets.

        Raises:
            DistillError: the batch has no labels, or labels that are not ids.
        """
        transcripts, frames = target_labels(inputs, shift=False), self.countable_labels(inputs, shift)
        if transcripts.is_floating_point() or transcripts.dim() != 2:
            raise DistillError(
                f"`labels` has dtype {transcripts.dtype} and shape {tuple(transcripts.shape)}, and the labels of a CTC "
                "model are the ids of transcripts [B, U], padded with -100."
            )
        ids = transcripts.masked_fill(transcripts == IGNORE_INDEX, 0)
        label_range = torch.stack(ids.aminmax()) if ids.numel() else ids.new_zeros(2)
        targets = Targets.from_batch({"labels": frames}, False, {**numbers, self._LABEL_RANGE: label_range})
        labels = TranscriptLabels(transcripts, self.blank, self.reduction, self.zero_infinity)
        return replace(targets, transcripts=labels, documents=(frames != IGNORE_INDEX).long())

    def check_labels(self, targets: Targets, num_outputs: int) -> None:
        """Check that the transcripts are ids of the student.

        Raises:
            DistillError: one is negative, or at least V.
        """
        smallest, largest = targets.numbers[self._LABEL_RANGE]
        if smallest < 0 or largest >= num_outputs:
            raise DistillError(
                f"`labels` has the id {smallest if smallest < 0 else largest}, and the student predicts {num_outputs} "
                "tokens: make the labels with the student's tokenizer, and pad them with -100."
            )

    def metrics(self, student: BlockLogits, block: BlockLogits | None, targets: Targets) -> dict[str, Tensor]:
        """Return the statistics of each frame."""
        return frame_metrics(student, block)
