"""Measures of each target token of a chunk under teacher and student; `agreement` defines and aggregates them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.logits import DenseLogits
from ..core.signals import Signals
from ..errors import DistillError
from ..losses.objective import Term
from .model_pair import PairBatch

OFFSETS = (-1, 0, 1)  # positions by which the teacher is shifted
TOP_IDS = 20  # likeliest ids of each model, on whose union the log-probabilities are correlated
TAIL_START_IDS = 100  # likeliest ids that are not in a distribution's tail; at most a quarter of the vocabulary


@dataclass(frozen=True)
class Chunk:
    """r target tokens of a batch.

    batch:               the batch
    rows:                indices of the tokens among the batch's target tokens
    near_rows:           `rows` and one more token on both sides, where there is one
    student_values:      [r, V], on the V ids that both models have
    near_teacher_values: [n, V], of `near_rows`
    terms:               of the objective
    temperature:         of the soft term
    """

    batch: PairBatch
    rows: slice
    near_rows: slice
    student_values: Tensor
    near_teacher_values: Tensor
    terms: Sequence[Term]
    temperature: float

    @classmethod
    def of(cls, batch: PairBatch, rows: slice, terms: Sequence[Term], temperature: float) -> "Chunk":
        """Compute the logits of some of a batch's target tokens.

        Raises:
            DistillError: the logits are NaN, or a label is not a valid id.
        """
        assert batch.student is not None
        assert batch.teacher is not None
        near_rows = slice(max(rows.start - 1, 0), min(rows.stop + 1, len(batch.targets)))
        student, teacher = batch.student.project(rows).float(), batch.teacher.project(near_rows).float()
        for name, logits in (("student", student), ("teacher", teacher)):
            if logits.isnan().any():
                raise DistillError(
                    f"The {name}'s logits are NaN, so the models cannot be compared: its weights are broken. If it was "
                    "trained in this run, the training diverged: lower train.learning_rate, or train in bf16."
                )
        vocab = min(student.shape[1], teacher.shape[1])
        batch.targets.check_ids(vocab)
        student = student[:, :vocab].to(teacher.device)
        return cls(batch, rows, near_rows, student, teacher[:, :vocab], terms, temperature)


def measure_tokens(chunk: Chunk, tokenizer: PreTrainedTokenizerBase | None, shift: bool) -> dict[str, Tensor]:
    """Return the measures of each token, name -> [r].

    Args:
        chunk: the tokens.
        tokenizer: of both models; None: special tokens are not recognized.
        shift: whether labels are those of the next token; only then are there measures at offsets, NaN at row ends.
    """
    targets = chunk.batch.targets.slice(chunk.rows)
    log_p, near_log_q = chunk.student_values.log_softmax(-1), chunk.near_teacher_values.log_softmax(-1)
    first, count = chunk.rows.start - chunk.near_rows.start, len(targets)
    teacher_values, log_q = chunk.near_teacher_values[first : first + count], near_log_q[first : first + count]
    p, q = log_p.exp(), log_q.exp()
    likeliest = teacher_values.topk(min(TAIL_START_IDS, max(teacher_values.shape[1] // 4, 1)), -1).indices
    measures = _label_measures(log_p, log_q, targets.labels) | _correlations(log_p, log_q)
    measures |= {"kl": dot(q, log_q - log_p), "student_entropy": -dot(p, log_p), "teacher_entropy": -dot(q, log_q)}
    measures |= {"teacher_tail": 1 - q.gather(1, likeliest).sum(-1), "student_tail": 1 - p.gather(1, likeliest).sum(-1)}
    soft_log_q = (teacher_values / chunk.temperature).log_softmax(-1)
    measures["soft_entropy"] = -dot(soft_log_q.exp(), soft_log_q)
    student_signals, teacher_signals = Signals(DenseLogits(chunk.student_values)), Signals(DenseLogits(teacher_values))
    for term in chunk.terms:
        if term.weight:
            _, gradient, factor = term.loss_and_grad(student_signals, teacher_signals, targets, None)
            measures[f"gradient@{term.name}"] = abs(factor) * gradient.norm(dim=-1)
            if term.name == "soft":
                energy = gradient.square().sum(-1)
                measures |= {"energy": energy, "tail_energy": energy - gradient.gather(1, likeliest).square().sum(-1)}
    if shift:
        measures |= _offset_measures(chunk, log_p, near_log_q)
    return measures | _target_measures(chunk, tokenizer, shift)


def _label_measures(log_p: Tensor, log_q: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Measures that compare both models with the labels, [r] each."""
    p_nll, q_nll = (-log.gather(1, labels[:, None])[:, 0] for log in (log_p, log_q))
    student_top, teacher_top = log_p.argmax(-1), log_q.argmax(-1)
    teacher_confidence = log_q.amax(-1).exp()
    is_confident = teacher_confidence > 0.5
    is_error = (teacher_top != labels) & is_confident
    return {
        "labels": labels,
        "student_nll": p_nll,
        "teacher_nll": q_nll,
        "agreement": student_top == teacher_top,
        "teacher_worse": q_nll > p_nll,
        "teacher_accuracy": teacher_top == labels,
        "student_accuracy": student_top == labels,
        "confident_teacher_errors": is_error,
        "excess_errors": is_error.to(teacher_confidence.dtype) - (1 - teacher_confidence) * is_confident,
        "copied_errors": is_error & (student_top == teacher_top),
    }


def _correlations(log_p: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    """Pearson's and Spearman's correlation of each token on the union of both models' likeliest ids, [r] each."""
    k = min(TOP_IDS, log_p.shape[1])
    ids = torch.cat([log_p.topk(k).indices, log_q.topk(k).indices], 1).sort(-1).values
    is_repeated = torch.zeros_like(ids, dtype=torch.bool)
    is_repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
    x, y, weight = log_p.gather(1, ids), log_q.gather(1, ids), (~is_repeated).to(log_p.dtype)
    return {
        "pearson": _pearson(x, y, weight),
        "spearman": _pearson(_ranks(x, is_repeated), _ranks(y, is_repeated), weight),
    }


def _ranks(values: Tensor, is_excluded: Tensor) -> Tensor:
    """Rank of each value within its row, among the values that are not excluded."""
    return values.masked_fill(is_excluded, torch.inf).argsort(-1).argsort(-1).to(values.dtype)


def _pearson(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    count = weight.sum(-1, keepdim=True)
    x = (x - (x * weight).sum(-1, keepdim=True) / count) * weight
    y = (y - (y * weight).sum(-1, keepdim=True) / count) * weight
    return dot(x, y) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp(min=1e-12)


def _offset_measures(chunk: Chunk, log_p: Tensor, near_log_q: Tensor) -> dict[str, Tensor]:
    """KL with the teacher shifted by each offset, and the teacher's NLL of the label at each offset, [r] each.

    NaN where the neighbor is not a target token of the same row.
    """
    targets = chunk.batch.targets
    positions, rows = targets.positions, targets.batch_rows
    index = torch.arange(chunk.rows.start, chunk.rows.stop, device=positions.device)
    entropy = -dot(near_log_q.exp(), near_log_q)
    measures, log_q = {}, near_log_q[index - chunk.near_rows.start]
    for offset in OFFSETS:
        neighbor = (index + offset).clamp(0, len(positions) - 1)
        has_neighbor = (positions[neighbor] - positions[index] == offset) & (rows[neighbor] == rows[index])
        near = neighbor - chunk.near_rows.start
        kl = -entropy[near] - dot(near_log_q[near].exp(), log_p)
        label = targets.labels[neighbor][:, None]
        measures[f"kl@{offset}"] = torch.where(has_neighbor, kl, torch.nan)
        measures[f"label@{offset}"] = torch.where(has_neighbor, -log_q.gather(1, label)[:, 0], torch.nan)
    return measures


def _target_measures(chunk: Chunk, tokenizer: PreTrainedTokenizerBase | None, shift: bool) -> dict[str, Tensor]:
    """Column of each token, and whether it is padding or a special token.

    A token is padding if its attention mask is 0, or if it is the padding token after another padding token.
    """
    targets, inputs = chunk.batch.targets, chunk.batch.inputs
    labels, rows = targets.labels[chunk.rows], targets.batch_rows[chunk.rows]
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
    measures = {"column": column, "padding": padding, "special": special}
    if chunk.batch.source is not None:
        measures["source"] = chunk.batch.source[chunk.rows]
    return measures


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of products over the ids; a product with x = 0 is 0, even if y is infinite."""
    return (x * y.masked_fill(x == 0, 0)).sum(-1)
