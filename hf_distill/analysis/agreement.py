"""Agreement of a student with its teacher over held-out tokens, with one forward pass of each model."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..core.defaults import HELD_OUT_TOKENS
from ..losses.objective import Term, objective
from ..models.model_types import model_type_of
from .model_pair import ModelPair
from .token_measures import OFFSETS, Chunk, measure_tokens

_CHUNK_BYTES = 16 * 2**20  # logits of one model at a time; about a dozen tensors of this size exist at once
_POSITION_BUCKETS = 4


@dataclass(frozen=True)
class Part:
    """Measurements of a subset of the tokens: a range of positions, or one source of a mixture.

    kl:          KL(teacher || student) at T = 1, nats/token
    agreement:   top-1 agreement, in [0, 1]
    student_nll, teacher_nll: of the labels, nats/token
    """

    name: str
    tokens: int
    kl: float
    agreement: float
    student_nll: float
    teacher_nll: float


@dataclass(frozen=True)
class Agreement:
    """Measurements of a student and a teacher over held-out target tokens; in nats/token, at T = 1 unless stated.

    tokens, vocab_size:  number of target tokens; number of ids that both models have
    kl:                  KL(teacher || student)
    kl_at:               offset -> KL with the teacher shifted by -1, 0, +1 position; only for models that predict the
                         next token, and only over tokens whose neighbor is a target token too
    agreement:           top-1 agreement: share of tokens where both models have the same likeliest id
    pearson, spearman:   mean correlation of log-probabilities on the union of both models' likeliest 20 ids
    teacher_entropy, student_entropy: entropies of both models
    teacher_nll, student_nll: NLL of the labels
    counts_nll:          NLL of the labels under the unigram baseline, with the Miller-Madow correction
    label_at:            offset -> the teacher's NLL of the label at that offset; as `kl_at`
    teacher_worse:       share of tokens whose label has a lower probability under the teacher than under the student
    below_counts:        share of tokens whose label has a lower probability under the teacher than under the unigram
                         baseline
    teacher_accuracy, student_accuracy: share of tokens whose likeliest id is the label
    confident_teacher_errors: share of tokens where the teacher gives an id other than the label more than 1/2
    excess_errors:       share of tokens by which these exceed what the teacher's own probabilities predict
    copied_errors:       share of these where the student has the teacher's likeliest id
    teacher_tail, student_tail: mass outside the teacher's likeliest 100 ids (or a quarter of all ids)
    soft_entropy:        the teacher's entropy at the objective's T; 0 to log(vocab_size)
    soft_tail:           share of the soft gradient's squared norm outside the teacher's likeliest ids; 0 without a
                         soft term
    gradient:            term -> share of the summed norms of the gradients with respect to the student's logits
    target_share:        share of all tokens (without padding) that are target tokens
    padding, special:    share of the target tokens that are padding, or special tokens
    positions, sources:  the same tokens in parts
    """

    tokens: int
    vocab_size: int
    kl: float
    kl_at: dict[int, float]
    agreement: float
    pearson: float
    spearman: float
    teacher_entropy: float
    student_entropy: float
    teacher_nll: float
    student_nll: float
    counts_nll: float
    label_at: dict[int, float]
    teacher_worse: float
    below_counts: float
    teacher_accuracy: float
    student_accuracy: float
    confident_teacher_errors: float
    excess_errors: float
    copied_errors: float
    teacher_tail: float
    student_tail: float
    soft_entropy: float
    soft_tail: float
    gradient: dict[str, float]
    target_share: float
    padding: float
    special: float
    positions: list[Part]
    sources: list[Part]


def agreement_of(pair: ModelPair, tokens: int | None = HELD_OUT_TOKENS) -> Agreement:
    """Compare two models over held-out tokens, with one forward pass of each.

    Args:
        pair: both models, and the objective whose gradients are compared.
        tokens: number of target tokens after which no further batch is read; None reads all rows.

    Raises:
        DistillError: the held-out rows have no target token, a model's logits are NaN, or a label is not a valid id.
    """
    assert pair.student is not None
    terms = objective(pair.alpha, pair.temperature, pair.divergence)
    shift, vocab, num_tokens = model_type_of(pair.student).shifts_labels, 0, 0
    measures: dict[str, list[Tensor]] = {}
    for batch in pair.batches(tokens):
        assert batch.student is not None
        mask = batch.inputs.get("attention_mask")
        has_token_mask = mask is not None and mask.shape == batch.targets.shape
        num_tokens += int(mask.sum()) if has_token_mask and mask is not None else batch.targets.shape.numel()
        size = max(1, _CHUNK_BYTES // (4 * batch.student.vocab_size))
        for start in range(0, len(batch.targets), size):
            rows = slice(start, min(start + size, len(batch.targets)))
            chunk = Chunk.of(batch, rows, terms, pair.temperature)
            vocab = chunk.student_values.shape[1]
            for name, value in measure_tokens(chunk, pair.tokenizer, shift).items():
                measures.setdefault(name, []).append(value.double().cpu())
    by_token = {name: torch.cat(values) for name, values in measures.items()}
    return _aggregate(pair, vocab, num_tokens, terms, by_token)


def _aggregate(
    pair: ModelPair, vocab: int, num_tokens: int, terms: Sequence[Term], measures: dict[str, Tensor]
) -> Agreement:
    """Reduce measures of each token, name -> [T], to means and shares."""
    mean = {name: values.nanmean().item() for name, values in measures.items()}
    total = {name: values.nansum().item() for name, values in measures.items()}
    gradient_sums = {term.name: total[f"gradient@{term.name}"] for term in terms if term.weight}
    column = measures["column"].long()
    edges = torch.linspace(0, int(column.max()) + 1, _POSITION_BUCKETS + 1).long().tolist()
    parts = [
        _part(f"{low} to {high - 1}", measures, (column >= low) & (column < high))
        for low, high in pairwise(edges)
        if low < high
    ]
    sources = [
        _part(name, measures, measures["source"] == i) for i, name in enumerate(pair.sources) if "source" in measures
    ]
    values = {name: mean[name] for name in Agreement.__dataclass_fields__ if name in mean}
    values |= _unigram_baseline(measures["labels"], measures["teacher_nll"])
    values |= {
        "copied_errors": total["copied_errors"] / max(total["confident_teacher_errors"], 1.0),
        "soft_tail": total.get("tail_energy", 0.0) / max(total.get("energy", 0.0), 1e-30),
        "target_share": len(column) / num_tokens,
    }
    return Agreement(
        **values,
        tokens=len(column),
        vocab_size=vocab,
        kl_at=_means_by_offset("kl", measures),
        label_at=_means_by_offset("label", measures),
        gradient={name: value / max(sum(gradient_sums.values()), 1e-12) for name, value in gradient_sums.items()},
        positions=[part for part in parts if part.tokens],
        sources=[part for part in sources if part.tokens],
    )


def _means_by_offset(name: str, measures: dict[str, Tensor]) -> dict[int, float]:
    """Means at each offset; an offset at which no token has a neighbor is left out."""
    values = {offset: measures[f"{name}@{offset}"] for offset in OFFSETS if f"{name}@{offset}" in measures}
    return {offset: value.nanmean().item() for offset, value in values.items() if not value.isnan().all()}


def _unigram_baseline(labels: Tensor, teacher_nll: Tensor) -> dict[str, float]:
    """NLL of a baseline that predicts each label with its frequency, corrected because the same labels were counted."""
    _, index, counts = labels.unique(return_inverse=True, return_counts=True)
    nll = -(counts[index] / len(labels)).log()
    bias = (len(counts) - 1) / (2 * len(labels))
    return {"counts_nll": nll.mean().item() + bias, "below_counts": (teacher_nll > nll + bias).double().mean().item()}


def _part(name: str, measures: dict[str, Tensor], mask: Tensor) -> Part:
    """Means over the tokens of a mask, [T] bool."""
    names = ("kl", "agreement", "student_nll", "teacher_nll")
    return Part(name, int(mask.sum()), *(measures[key][mask].mean().item() for key in names))
