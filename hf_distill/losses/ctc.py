"""The CTC loss and the metrics of models that predict a distribution over tokens and a blank for each frame of a sound.

A target is a frame. The labels are those of a row, its transcript.
"""

import sys

import torch
from torch import Tensor
from transformers.loss.loss_ctc import ForCTCLoss

from ..core.loss_kinds import FRAMES
from ..core.signals import Signals
from ..core.targets import IGNORE_INDEX, Targets
from ..core.transcripts import MEAN
from .alignment import dense_logits
from .analytic_gradients import BlockLogits
from .registry import loss
from .token_metrics import PAIR_METRICS, STUDENT_METRICS, token_metrics

_OF_LABELS = ("student_ce", "teacher_ce", "accuracy")  # frames have no label
FRAME_STUDENT_METRICS = tuple(name for name in STUDENT_METRICS if name not in _OF_LABELS)
FRAME_PAIR_METRICS = tuple(name for name in PAIR_METRICS if name not in _OF_LABELS)
_WHOLE_BATCH = sys.maxsize


@loss("ctc", compares=(), outputs=FRAMES, rows_together=_WHOLE_BATCH)
def ctc(student: Signals, teacher: Signals | None, targets: Targets) -> Tensor:
    """CTC loss of the transcript of a row, -log p(transcript | frames), that of transformers.

    With the reduction "sum" each frame has an equal share of the loss of its row, so that the mean over frames is the
    sum over the rows / the number of frames. With "mean" each frame has the loss of its row / the number of its tokens,
    so that the mean over frames is the mean over rows, each weighted by its number of frames.

    Args:
        student: signals with the student logits [T, V].
        teacher: not used.
        targets: all T frames of a batch, with `transcripts`.

    Returns:
        [T] in nats.
    """
    logits, transcripts = dense_logits(student), targets.transcripts
    assert transcripts is not None, "the targets of a CTC loss have transcripts"
    labels, (num_rows, num_frames) = transcripts.labels, targets.shape
    padded = logits.new_zeros(num_rows * num_frames, logits.shape[1]).index_copy(0, targets.positions, logits)
    counts = torch.zeros(num_rows, dtype=torch.long, device=logits.device)
    counts.index_add_(0, targets.batch_rows, torch.ones_like(targets.batch_rows))
    losses = ForCTCLoss(
        logits=padded.unflatten(0, (num_rows, num_frames)),
        labels=labels,
        logit_lengths=counts,
        blank_token_id=transcripts.blank,
        reduction="none",
        zero_infinity=transcripts.zero_infinity,
    )
    if transcripts.reduction == MEAN:
        counts = ((labels != IGNORE_INDEX) & (labels != transcripts.blank)).sum(-1)
    return (losses / counts.clamp(min=1))[targets.batch_rows].to(logits)


def frame_metrics(student: BlockLogits, block: BlockLogits | None) -> dict[str, Tensor]:
    """Return the statistics of each frame of a block: those of `token_metrics` that read no label, name -> [r].

    Args:
        student: the student logits.
        block: student and teacher logits; None returns `FRAME_STUDENT_METRICS` alone.
    """
    return {name: values for name, values in token_metrics(student, block).items() if name not in _OF_LABELS}
