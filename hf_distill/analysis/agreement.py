"""Where two models agree over held-out tokens and where they do not, in one forward of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..losses.objective import Term, objective
from ..models.model_types import model_type_of
from .model_pair import ModelPair
from .token_measures import OFFSETS, Chunk, measured

_CHUNK = 16 * 2**20  # bytes of logits of one model at a time; about a dozen such tensors live at once
_BUCKETS = 4


@dataclass(frozen=True)
class Part:
    """A part of the tokens: of some positions of their rows, or of a source.

    kl:          KL(teacher || student) at T = 1, nats/token
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
    """A student and a teacher over held-out tokens; in nats/token, at T = 1 where nothing else is said.

    tokens, vocab_size:  how many; the ids that both have
    kl:                  KL(teacher || student)
    kl_at:               the same with the teacher's distribution of the token before (-1) and after (1), where labels
                         are those of the next token and two that stand side by side are asked
    agreement:           share of tokens where both have the same likeliest id
    pearson, spearman:   mean correlation of log-probabilities on the union of both models' likeliest 20 ids
    teacher_entropy, student_entropy: of both
    teacher_nll, student_nll: of the labels
    counts_nll:          of the labels, by one that knows how often each occurs here and nothing more (Miller-Madow)
    label_at:            the teacher's nll of the label before (-1) and after (1), at the same token; as `kl_at`
    teacher_worse:       share of tokens to whose label the teacher gives less than the student
    below_counts:        share of tokens to whose label the teacher gives less than the share it has of all labels
    teacher_accuracy, student_accuracy: share of tokens whose likeliest id is the label
    confident_teacher_errors: share of tokens where the teacher gives an id other than the label more than a half
    excess_errors: of all tokens, how many more of these there are than the teacher's own probabilities admit
    copied_errors:              of the mistakes, where the student's likeliest id is the teacher's
    teacher_tail, student_tail: mass outside the teacher's likeliest 100 ids (or a quarter of all)
    soft_entropy:        the teacher's, at the objective's T; 0 to log(vocab_size)
    soft_tail:           share of the soft gradient's squared norm outside the teacher's likeliest ids; 0: no soft term
    gradient:            share of each term of the objective in the summed norms of gradients by the student's logits
    asked, padding, special: share of all tokens, padding aside, that is asked; of the asked that is padding, special
    positions, sources:  the tokens in parts
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
    asked: float
    padding: float
    special: float
    positions: list[Part]
    sources: list[Part]


def agreement_of(pair: ModelPair, tokens: int | None = 4096) -> Agreement:
    """Compare two models over held-out tokens, in one forward of each.

    Args:
        pair: both models, and the objective whose gradients are told apart.
        tokens: until so many were asked; None: all.

    Raises:
        DistillError: the slice is empty, a model's logits are NaN, or a label is none of the ids.
    """
    assert pair.student is not None
    terms = objective(pair.alpha, pair.temperature, pair.divergence)
    shift, vocab, there = model_type_of(pair.student).shifts_labels, 0, 0
    found: dict[str, list[Tensor]] = {}
    for seen in pair.batches(tokens):
        assert seen.student is not None
        mask = seen.inputs.get("attention_mask")
        aligned = mask is not None and mask.shape == seen.targets.shape
        there += int(mask.sum()) if aligned and mask is not None else seen.targets.shape.numel()
        size = max(1, _CHUNK // (4 * seen.student.vocab_size))
        for start in range(0, len(seen.targets), size):
            rows = slice(start, min(start + size, len(seen.targets)))
            chunk = Chunk.of(seen, rows, terms, pair.temperature)
            vocab = chunk.student.shape[1]
            for name, value in measured(chunk, pair.tokenizer, shift).items():
                found.setdefault(name, []).append(value.double().cpu())
    return _agreement(pair, vocab, there, terms, {name: torch.cat(values) for name, values in found.items()})


def _agreement(pair: ModelPair, vocab: int, there: int, terms: Sequence[Term], found: dict[str, Tensor]) -> Agreement:
    mean = {name: values.nanmean().item() for name, values in found.items()}
    total = {name: values.nansum().item() for name, values in found.items()}
    sums = {term.name: total[f"gradient@{term.name}"] for term in terms if term.weight}
    column = found["column"].long()
    edges = torch.linspace(0, int(column.max()) + 1, _BUCKETS + 1).long().tolist()
    parts = [
        _part(f"{low} to {high - 1}", found, (column >= low) & (column < high))
        for low, high in pairwise(edges)
        if low < high
    ]
    sources = [_part(name, found, found["source"] == i) for i, name in enumerate(pair.sources) if "source" in found]
    values: dict[str, Any] = {name: mean[name] for name in Agreement.__dataclass_fields__ if name in mean}
    return Agreement(
        **values
        | _by_counts(found["labels"], found["teacher_nll"])
        | {
            "tokens": len(column),
            "vocab_size": vocab,
            "kl_at": _at("kl", found),
            "label_at": _at("label", found),
            "copied_errors": total["copied_errors"] / max(total["confident_teacher_errors"], 1.0),
            "gradient": {name: value / max(sum(sums.values()), 1e-12) for name, value in sums.items()},
            "soft_tail": total.get("tail_energy", 0.0) / max(total.get("energy", 0.0), 1e-30),
            "asked": len(column) / there,
            "positions": [part for part in parts if part.tokens],
            "sources": [part for part in sources if part.tokens],
        }
    )


def _at(name: str, found: dict[str, Tensor]) -> dict[int, float]:
    """Means with a neighbour in a token's place; nothing where no token has one on that side."""
    values = {offset: found[f"{name}@{offset}"] for offset in OFFSETS if f"{name}@{offset}" in found}
    return {offset: value.nanmean().item() for offset, value in values.items() if not value.isnan().all()}


def _by_counts(labels: Tensor, teacher_nll: Tensor) -> dict[str, float]:
    """What counting the labels tells of them, corrected for having counted the same ones."""
    _, of, counts = labels.unique(return_inverse=True, return_counts=True)
    nll = -(counts[of] / len(labels)).log()
    bias = (len(counts) - 1) / (2 * len(labels))
    return {"counts_nll": nll.mean().item() + bias, "below_counts": (teacher_nll > nll + bias).double().mean().item()}


def _part(name: str, found: dict[str, Tensor], mine: Tensor) -> Part:
    names = ("kl", "agreement", "student_nll", "teacher_nll")
    return Part(name, int(mine.sum()), *(found[key][mine].mean().item() for key in names))
