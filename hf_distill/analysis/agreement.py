"""Where two models agree over held-out tokens and where they do not, in one forward of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..objective import Term, objective
from ..signals import Signals
from ..sources import Logits
from .pair import Pair, Seen

OFFSETS = (-1, 0, 1)
TOP = 20  # ids of each model, on whose union the two are correlated
TAIL = 100  # ids after which a distribution's tail begins; at most a quarter of the vocabulary
_CHUNK = 64 * 2**20  # bytes of logits of one model at a time
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
    kl_at:               the same with the teacher's distribution of the token before (-1) and after (1)
    agreement:           share of tokens where both have the same likeliest id
    pearson, spearman:   mean correlation of log-probabilities on the union of both models' likeliest 20 ids
    teacher_entropy, student_entropy: of both
    teacher_nll, student_nll: of the labels
    label_at:            the teacher's nll of the label before (-1) and after (1), at the same token
    teacher_worse:       share of tokens to whose label the teacher gives less than the student
    teacher_accuracy, student_accuracy: share of tokens whose likeliest id is the label
    mistakes:            share of tokens where the teacher gives another id than the label more than a half
    excess_mistakes:     of all tokens, how many more of these there are than the teacher's own probabilities admit
    copied:              of the mistakes, where the student's likeliest id is the teacher's
    teacher_tail, student_tail: mass outside the teacher's likeliest 100 ids (or a quarter of all)
    soft_entropy:        the teacher's, at the objective's T; 0 to log(vocab_size)
    gradient:            share of each term of the objective in the summed norms of gradients by the student's logits
    padding:             share of asked tokens whose label is the padding token behind another one
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
    label_at: dict[int, float]
    teacher_worse: float
    teacher_accuracy: float
    student_accuracy: float
    mistakes: float
    excess_mistakes: float
    copied: float
    teacher_tail: float
    student_tail: float
    soft_entropy: float
    gradient: dict[str, float]
    padding: float
    positions: list[Part]
    sources: list[Part]


def agreement_of(pair: Pair, tokens: int | None = 4096) -> Agreement:
    """Compare two models over held-out tokens, in one forward of each.

    Args:
        pair: both models, and the objective whose gradients are told apart.
        tokens: until so many were asked; None: all.

    Raises:
        DistillError: the slice is empty.
    """
    terms = objective(pair.alpha, pair.temperature, pair.divergence)
    found: dict[str, list[Tensor]] = {}
    vocab = 0
    for seen in pair.seen(tokens):
        for rows, near in _chunks(seen):
            values, vocab = _measured(seen, rows, near, terms, pair)
            for name, value in values.items():
                found.setdefault(name, []).append(value.double().cpu())
    return _agreement(pair, vocab, terms, {name: torch.cat(values) for name, values in found.items()})


def _chunks(seen: Seen) -> Iterator[tuple[slice, slice]]:
    """Slices of the asked tokens, each with one that has a neighbour more on both sides."""
    assert seen.student is not None
    size = max(1, _CHUNK // (4 * seen.student.vocab_size))
    for start in range(0, len(seen.targets), size):
        end = min(start + size, len(seen.targets))
        yield slice(start, end), slice(max(start - 1, 0), min(end + 1, len(seen.targets)))


def _measured(seen: Seen, rows: slice, near: slice, terms: Sequence[Term], pair: Pair) -> tuple[dict[str, Tensor], int]:
    """Of each token of a chunk, name -> [r], NaN where there is nothing; and the ids that both models have."""
    assert seen.student is not None
    assert seen.teacher is not None
    targets = seen.targets.block(rows)
    around = seen.teacher.project(near)
    student = seen.student.project(rows)
    vocab = min(student.shape[1], around.shape[1])
    student, around = student[:, :vocab].to(around.device), around[:, :vocab]
    first = rows.start - near.start
    teacher = around[first : first + len(student)]
    log_p, log_near = student.log_softmax(-1), around.log_softmax(-1)
    log_q = log_near[first : first + len(student)]
    p, q = log_p.exp(), log_q.exp()
    found = _of_labels(log_p, log_q, q, targets.labels)
    found |= {"kl": _dot(q, log_q - log_p), "student_entropy": -_dot(p, log_p), "teacher_entropy": -_dot(q, log_q)}
    best = teacher.topk(min(TAIL, max(vocab // 4, 1)), -1).indices
    found |= {"teacher_tail": 1 - q.gather(1, best).sum(-1), "student_tail": 1 - p.gather(1, best).sum(-1)}
    soft = (teacher / pair.temperature).log_softmax(-1)
    found["soft_entropy"] = -_dot(soft.exp(), soft)
    found |= _correlations(log_p, log_q)
    told = Signals(Logits(teacher))
    for term in terms:
        if term.weight:
            _, gradient, factor = term.with_gradient(Signals(Logits(student)), told, targets, None)
            found[f"gradient@{term.name}"] = abs(factor) * gradient.norm(dim=-1)
    found |= _beside(seen, rows, near, log_p, log_near, -_dot(log_near.exp(), log_near))
    column = seen.targets.positions[rows] % seen.targets.shape[-1]
    found |= {"column": column, "padding": _padding(seen, rows, column, pair.tokenizer)}
    if seen.source is not None:
        found["source"] = seen.source[rows]
    return found, vocab


def _of_labels(log_p: Tensor, log_q: Tensor, q: Tensor, labels: Tensor) -> dict[str, Tensor]:
    known = labels < log_p.shape[1]
    at = (labels * known)[:, None]
    p_nll = torch.where(known, -log_p.gather(1, at)[:, 0], torch.inf)
    q_nll = torch.where(known, -log_q.gather(1, at)[:, 0], torch.inf)
    own, said = log_p.argmax(-1), log_q.argmax(-1)
    most = q.amax(-1)
    mistaken = (said != labels) & (most > 0.5)
    return {
        "student_nll": p_nll,
        "teacher_nll": q_nll,
        "agreement": own == said,
        "teacher_worse": q_nll > p_nll,
        "teacher_accuracy": said == labels,
        "student_accuracy": own == labels,
        "mistakes": mistaken,
        "excess_mistakes": mistaken.to(most.dtype) - (1 - most) * (most > 0.5),
        "copied": mistaken & (own == said),
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
    return _dot(x, y) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp(min=1e-12)


def _beside(
    seen: Seen, rows: slice, near: slice, log_p: Tensor, log_near: Tensor, entropy: Tensor
) -> dict[str, Tensor]:
    """KL and the label's nll with the neighbours' in the place of a token's own; NaN where there is no neighbour."""
    positions, labels = seen.targets.positions, seen.targets.labels
    at = torch.arange(rows.start, rows.start + len(log_p), device=positions.device)
    found, own = {}, log_near[at - near.start]
    for offset in OFFSETS:
        other = (at + offset).clamp(0, len(positions) - 1)
        there = (positions[other] - positions[at] == offset) & (seen.targets.rows[other] == seen.targets.rows[at])
        kl = -entropy[other - near.start] - _dot(log_near[other - near.start].exp(), log_p)
        label = labels[other].clamp(max=log_near.shape[1] - 1)
        found[f"kl@{offset}"] = torch.where(there, kl, torch.nan)
        found[f"label@{offset}"] = torch.where(there, -own.gather(1, label[:, None])[:, 0], torch.nan)
    return found


def _padding(seen: Seen, rows: slice, column: Tensor, tokenizer: Any) -> Tensor:
    """Whether a label is the padding token, and the token that it follows is too."""
    labels, ids = seen.targets.labels[rows], seen.inputs.get("input_ids")
    pad = None if tokenizer is None else tokenizer.pad_token_id
    if pad is None or ids is None or ids.shape != seen.targets.shape:
        return torch.zeros_like(labels, dtype=torch.bool)
    return (labels == pad) & (ids[seen.targets.rows[rows], column] == pad)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of products over the ids; a product with 0 is 0, whatever the other factor."""
    return (x * y.masked_fill(x == 0, 0)).sum(-1)


def _agreement(pair: Pair, vocab: int, terms: Sequence[Term], found: dict[str, Tensor]) -> Agreement:
    mean = {name: values.nanmean().item() for name, values in found.items()}
    sums = {term.name: found[f"gradient@{term.name}"].sum().item() for term in terms if term.weight}
    column = found["column"]
    edges = torch.linspace(0, float(column.max()) + 1, _BUCKETS + 1).tolist()
    parts = [
        _part(f"{low:.0f} to {high - 1:.0f}", found, (column >= low) & (column < high)) for low, high in pairwise(edges)
    ]
    sources = [_part(name, found, found["source"] == i) for i, name in enumerate(pair.sources) if "source" in found]
    plain = {name: mean[name] for name in Agreement.__dataclass_fields__ if name in mean}
    mistakes = found["mistakes"].sum().item()
    return Agreement(
        **plain
        | {
            "tokens": len(column),
            "vocab_size": vocab,
            "kl_at": {offset: mean[f"kl@{offset}"] for offset in OFFSETS},
            "label_at": {offset: mean[f"label@{offset}"] for offset in OFFSETS},
            "copied": found["copied"].sum().item() / max(mistakes, 1.0),
            "gradient": {name: value / max(sum(sums.values()), 1e-12) for name, value in sums.items()},
            "positions": [part for part in parts if part.tokens],
            "sources": [part for part in sources if part.tokens],
        }
    )


def _part(name: str, found: dict[str, Tensor], mine: Tensor) -> Part:
    names = ("kl", "agreement", "student_nll", "teacher_nll")
    return Part(name, int(mine.sum()), *(found[key][mine].mean().item() for key in names))
