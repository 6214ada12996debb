"""What two models say of each of a chunk's tokens, as numbers of a token; see `agreement` for what they mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.logits import DenseLogits
from ..core.signals import Signals
from ..errors import DistillError
from ..losses.objective import Term
from .model_pair import PairBatch

OFFSETS = (-1, 0, 1)
TOP = 20  # ids of each model, on whose union the two are correlated
TAIL = 100  # ids after which a distribution's tail begins; at most a quarter of the vocabulary


@dataclass(frozen=True)
class Chunk:
    """r asked tokens of a batch.

    rows:        which
    near:        the same with one more on both sides, where there is one
    student:     [r, V] logits, on the V ids that both have
    around:      [n, V] the teacher's, of `near`
    terms:       of the objective
    temperature: of its soft term
    """

    seen: PairBatch
    rows: slice
    near: slice
    student: Tensor
    around: Tensor
    terms: Sequence[Term]
    temperature: float

    @classmethod
    def of(cls, seen: PairBatch, rows: slice, terms: Sequence[Term], temperature: float) -> "Chunk":
        """Make the logits of some of a batch's tokens.

        Raises:
            DistillError: they are no numbers, or a label is none of the ids.
        """
        assert seen.student is not None
        assert seen.teacher is not None
        near = slice(max(rows.start - 1, 0), min(rows.stop + 1, len(seen.targets)))
        student, around = seen.student.project(rows).float(), seen.teacher.project(near).float()
        for name, logits in (("student", student), ("teacher", around)):
            if logits.isnan().any():
                raise DistillError(
                    f"The {name}'s logits are NaN, so there is nothing to compare: its weights are broken. If it was "
                    "trained in this run, the training diverged: lower train.learning_rate, or train in bf16."
                )
        vocab = min(student.shape[1], around.shape[1])
        seen.targets.check_ids(vocab)
        return cls(seen, rows, near, student[:, :vocab].to(around.device), around[:, :vocab], terms, temperature)


def measured(chunk: Chunk, tokenizer: Any, shift: bool) -> dict[str, Tensor]:
    """Name -> [r].

    Args:
        chunk: the tokens.
        tokenizer: None: nothing is known of special tokens.
        shift: whether labels are those of the next token; only then are there neighbours, NaN at the ends of rows.
    """
    targets = chunk.seen.targets.slice(chunk.rows)
    log_p, log_near = chunk.student.log_softmax(-1), chunk.around.log_softmax(-1)
    first, count = chunk.rows.start - chunk.near.start, len(targets)
    teacher, log_q = chunk.around[first : first + count], log_near[first : first + count]
    p, q = log_p.exp(), log_q.exp()
    best = teacher.topk(min(TAIL, max(teacher.shape[1] // 4, 1)), -1).indices
    found = _of_labels(log_p, log_q, targets.labels) | _correlations(log_p, log_q)
    found |= {"kl": dot(q, log_q - log_p), "student_entropy": -dot(p, log_p), "teacher_entropy": -dot(q, log_q)}
    found |= {"teacher_tail": 1 - q.gather(1, best).sum(-1), "student_tail": 1 - p.gather(1, best).sum(-1)}
    soft = (teacher / chunk.temperature).log_softmax(-1)
    found["soft_entropy"] = -dot(soft.exp(), soft)
    told = Signals(DenseLogits(teacher))
    for term in chunk.terms:
        if term.weight:
            _, gradient, factor = term.loss_and_grad(Signals(DenseLogits(chunk.student)), told, targets, None)
            found[f"gradient@{term.name}"] = abs(factor) * gradient.norm(dim=-1)
            if term.name == "soft":
                energy = gradient.square().sum(-1)
                found |= {"energy": energy, "tail_energy": energy - gradient.gather(1, best).square().sum(-1)}
    if shift:
        found |= _beside(chunk, log_p, log_near)
    return found | _asked(chunk, tokenizer, shift)


def _of_labels(log_p: Tensor, log_q: Tensor, labels: Tensor) -> dict[str, Tensor]:
    p_nll, q_nll = (-log.gather(1, labels[:, None])[:, 0] for log in (log_p, log_q))
    own, said = log_p.argmax(-1), log_q.argmax(-1)
    most = log_q.amax(-1).exp()
    mistaken = (said != labels) & (most > 0.5)
    return {
        "labels": labels,
        "student_nll": p_nll,
        "teacher_nll": q_nll,
        "agreement": own == said,
        "teacher_worse": q_nll > p_nll,
        "teacher_accuracy": said == labels,
        "student_accuracy": own == labels,
        "confident_teacher_errors": mistaken,
        "excess_errors": mistaken.to(most.dtype) - (1 - most) * (most > 0.5),
        "copied_errors": mistaken & (own == said),
    }


def _correlations(log_p: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    """Pearson's and Spearman's correlation on the union of both models' likeliest ids, each token by itself."""
    k = min(TOP, log_p.shape[1])
    ids = torch.cat([log_p.topk(k).indices, log_q.topk(k).indices], 1).sort(-1).values
    twice = torch.zeros_like(ids, dtype=torch.bool)
    twice[:, 1:] = ids[:, 1:] == ids[:, :-1]
    x, y, own = log_p.gather(1, ids), log_q.gather(1, ids), (~twice).to(log_p.dtype)
    return {"pearson": _pearson(x, y, own), "spearman": _pearson(_ranks(x, twice), _ranks(y, twice), own)}


def _ranks(values: Tensor, out: Tensor) -> Tensor:
    """The rank of each of a row's values, those left out aside."""
    return values.masked_fill(out, torch.inf).argsort(-1).argsort(-1).to(values.dtype)


def _pearson(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    count = weight.sum(-1, keepdim=True)
    x = (x - (x * weight).sum(-1, keepdim=True) / count) * weight
    y = (y - (y * weight).sum(-1, keepdim=True) / count) * weight
    return dot(x, y) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp(min=1e-12)


def _beside(chunk: Chunk, log_p: Tensor, log_near: Tensor) -> dict[str, Tensor]:
    """KL and the label's nll with the neighbours' in the place of a token's own; NaN where there is no neighbour."""
    positions, rows = chunk.seen.targets.positions, chunk.seen.targets.rows
    at = torch.arange(chunk.rows.start, chunk.rows.stop, device=positions.device)
    entropy = -dot(log_near.exp(), log_near)
    found, own = {}, log_near[at - chunk.near.start]
    for offset in OFFSETS:
        other = (at + offset).clamp(0, len(positions) - 1)
        there = (positions[other] - positions[at] == offset) & (rows[other] == rows[at])
        kl = -entropy[other - chunk.near.start] - dot(log_near[other - chunk.near.start].exp(), log_p)
        label = chunk.seen.targets.labels[other][:, None]
        found[f"kl@{offset}"] = torch.where(there, kl, torch.nan)
        found[f"label@{offset}"] = torch.where(there, -own.gather(1, label)[:, 0], torch.nan)
    return found


def _asked(chunk: Chunk, tokenizer: Any, shift: bool) -> dict[str, Tensor]:
    """Where the tokens stand, and whether they should be asked: padding is told by its mask, or follows padding."""
    targets, inputs = chunk.seen.targets, chunk.seen.inputs
    labels, rows = targets.labels[chunk.rows], targets.rows[chunk.rows]
    column = targets.positions[chunk.rows] % targets.shape[-1]
    padding = torch.zeros_like(labels, dtype=torch.bool)
    special = padding
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is not None and ids.shape == targets.shape:
        if mask is not None and mask.shape == ids.shape:
            padding = mask[rows, (column + shift).clamp(max=ids.shape[1] - 1)] == 0
        if tokenizer is not None and tokenizer.pad_token_id is not None and shift:
            pad = tokenizer.pad_token_id
            padding = padding | ((labels == pad) & (ids[rows, column] == pad))
    if tokenizer is not None and len(targets.shape) > 1:
        special = torch.isin(labels, torch.tensor(tokenizer.all_special_ids, device=labels.device, dtype=labels.dtype))
    found = {"column": column, "padding": padding, "special": special}
    if chunk.seen.source is not None:
        found["source"] = chunk.seen.source[chunk.rows]
    return found


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of products over the ids; a product with 0 is 0, whatever the other factor."""
    return (x * y.masked_fill(x == 0, 0)).sum(-1)
