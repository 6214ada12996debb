"""Statistics of the chunks of a teacher with another tokenizer, that are logged with the losses."""

import math

import numpy as np
import torch
from torch import Tensor

from ..core.aligned_logits import AlignedLogits
from ..core.logits import DenseLogits
from ..core.signals import Signals
from ..core.targets import Targets
from .analytic_gradients import BlockLogits
from .cross_tokenizer import chunk_sums, projected_kl

CHUNK_METRICS = ("measured_chunks", "chunk_kl", "chunk_agreement")
CHUNK_TOTALS = ("chunk_bytes", "student_chunk_nats", "teacher_chunk_nats")


def chunk_metrics(block: BlockLogits, every: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the statistics of every n-th chunk of a block at T = 1.

    Args:
        block: student logits of the block, and the chunks of the first teacher.
        every: n.

    Returns:
        (indices of the first tokens of these chunks [c], name -> [c]). `chunk_kl` is `projected_kl` in nats, and
        `chunk_agreement` is 1 where the most probable class of ids is the same for both models.
    """
    aligned: AlignedLogits = block.aligned_teacher
    chunks = slice(0, len(aligned), every)
    first_tokens, classes = aligned.first_tokens[chunks], aligned.token_classes
    assert isinstance(aligned.first_logits, DenseLogits)  # those of a block are materialized
    student, teacher = DenseLogits(block.student[first_tokens]), DenseLogits(aligned.first_logits.values[chunks])
    count = len(first_tokens)
    index = torch.arange(count, device=first_tokens.device)
    each = AlignedLogits(teacher, None, index, index, classes, np.arange(count))
    top_ids = student.values.argmax(1), teacher.values.argmax(1)
    agrees = classes.student[top_ids[0]] == classes.teacher[top_ids[1]]
    targets = Targets(index, index, index, index.shape)
    return first_tokens, {
        "measured_chunks": torch.ones_like(student.values[:, 0]),
        "chunk_kl": projected_kl(Signals(student), Signals(each), targets),
        "chunk_agreement": agrees.to(student.values.dtype),
    }


def chunk_totals(aligned: AlignedLogits, student_ce: Tensor) -> dict[str, Tensor]:
    """Return what bits per byte are computed from, at the first token of each chunk: name -> [T].

    `chunk_bytes` are the bytes of the text of chunks, and `student_chunk_nats` and `teacher_chunk_nats` are minus its
    log-probability. All are 0 for a chunk whose probability the teacher does not know.

    Args:
        aligned: chunks of T target tokens.
        student_ce: [T] cross entropy of the student with each label.
    """
    assert aligned.log_probs is not None
    assert aligned.chunk_bytes is not None
    is_known = ~aligned.log_probs.isnan()
    values = (aligned.chunk_bytes.to(student_ce), chunk_sums(student_ce, aligned), -aligned.log_probs.to(student_ce))
    totals = {}
    for name, of_chunks in zip(CHUNK_TOTALS, values, strict=True):
        at_tokens = student_ce.new_zeros(len(student_ce))
        totals[name] = at_tokens.index_copy(0, aligned.first_tokens, of_chunks.where(is_known, 0))
    return totals


def average_chunk_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Return `chunk_kl`, `chunk_agreement`, and bits per byte of both models over the text of the chunks.

    Args:
        sums: sums of `chunk_metrics` and `chunk_totals` over target tokens; empty without such a teacher.
    """
    means = {}
    if count := sums.get("measured_chunks"):
        means = {name: sums[name] / count for name in ("chunk_kl", "chunk_agreement")}
    if num_bytes := sums.get("chunk_bytes"):
        means["bits_per_byte"] = sums["student_chunk_nats"] / num_bytes / math.log(2)
        means["teacher_bits_per_byte"] = sums["teacher_chunk_nats"] / num_bytes / math.log(2)
    return means
