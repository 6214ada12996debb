"""What a teacher's soft labels hold, over held-out rows: how much there is beside the label, and where."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

import torch
from torch import Tensor

from ..cache.sampling import blocks_of
from ..core.logits import LazyLogits
from ..errors import DistillError
from .advice import advice_of
from .model_pair import ModelPair, PairBatch
from .soft_labels import AtTemperature, CacheKind, SoftLabels

TEMPERATURES = (0.5, 1.0, 2.0, 5.0, 10.0)
POSITIONS = (8, 64, 128)
_EDGES = (0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0)  # nats
_CONTEXT = 16  # tokens before a position


@dataclass(frozen=True)
class Candidate:
    """One of the likeliest ids of a position: its text, its probability at T = 1, whether it is the label."""

    text: str
    probability: float
    is_target: bool


@dataclass(frozen=True)
class Position:
    """A token to look at: the text before it, the label, and what the teacher expects.

    index: among the asked tokens, from 0
    rank:  of the label among all ids, from 1
    """

    index: int
    context: str
    target: str
    target_probability: float
    rank: int
    entropy: float
    candidates: list[Candidate]


@dataclass(frozen=True)
class Inspection:
    """A teacher over held-out rows, at T = 1 where nothing else is said.

    tokens:         that were measured: those asked of whole batches
    vocab_size:     V
    temperature:    of the recipe
    entropy:        nats/token; `entropy_bits`: the same in bits
    histogram:      [lower edge in nats, tokens], ...; the last reaches to log V
    mass:           of the k likeliest ids, k -> mean share
    ids_for_99:     "mean", "median", "p90" over the tokens: how many ids hold 99 % of the mass
    accuracy:       share of tokens for which no id is likelier than the label
    cross_entropy:  of the labels, nats/token; `perplexity`: its exp
    by_temperature: what T does
    positions:      tokens that were asked for
    caches:         kinds of caches, at T = 1 and the recipe's
    advice:         what this means for the recipe
    """

    tokens: int
    vocab_size: int
    temperature: float
    entropy: float
    entropy_bits: float
    histogram: list[tuple[float, int]]
    mass: dict[int, float]
    ids_for_99: dict[str, float]
    accuracy: float
    cross_entropy: float
    perplexity: float
    by_temperature: list[AtTemperature]
    positions: list[Position]
    caches: list[CacheKind]
    advice: list[str]


def inspect_teacher(
    pair: ModelPair,
    tokens: int | None = 4096,
    positions: Sequence[int] | None = None,
    k: int = 10,
    temperatures: Sequence[float] = TEMPERATURES,
) -> Inspection:
    """Look at what a teacher says of held-out tokens, in one forward of it.

    Args:
        pair: its teacher is looked at; a student is not run.
        tokens: until so many were asked; None: all.
        positions: which of the asked tokens to show, counted from 0; None: those of POSITIONS that are there.
        k: ids of each.
        temperatures: for `by_temperature`, in which 1 and the pair's own are added.

    Raises:
        DistillError: the slice is empty, there is no teacher, or an argument makes no sense.
    """
    wanted = {*(POSITIONS if positions is None else positions)}
    if k < 1 or any(t <= 0 for t in temperatures) or any(i < 0 for i in wanted):
        raise DistillError(
            f"k is {k}, temperatures are {[*temperatures]}, positions are {sorted(wanted)}: k is at least 1, "
            "temperatures are above 0, positions are counted from 0."
        )
    if pair.teacher is None:
        raise DistillError("There is no teacher to inspect: give the pair one.")
    measures = SoftLabels(sorted({*temperatures, 1.0, pair.temperature}), sorted({1.0, pair.temperature}))
    shown: list[Position] = []
    vocab = done = rows = 0
    hidden: int | None = None
    for seen in pair.with_student(None).batches(tokens):
        source: Any = seen.teacher
        vocab, hidden = source.vocab_size, source.hidden.shape[1] if isinstance(source, LazyLogits) else None
        for block, logits in blocks_of(source):
            for at in range(block.start, block.stop):
                if done + at in wanted:
                    shown.append(_position(pair, seen, done + at, at, logits[at - block.start], k))
            measures.add(logits, seen.targets.labels[block])
        done, rows = done + len(seen.targets), rows + len(seen.targets.rows.unique())
    if positions is not None and max(wanted, default=0) >= done:
        raise DistillError(
            f"Position {max(wanted)} was asked for, and {done:,} tokens were measured, counted from 0: raise tokens, "
            "or data.eval.max_rows in the recipe."
        )
    return _inspection(pair, measures, shown, vocab, measures.caches(vocab, hidden, done / rows))


def _inspection(
    pair: ModelPair, measures: SoftLabels, shown: list[Position], vocab: int, caches: list[CacheKind]
) -> Inspection:
    entropy, ids, at = measures["entropy@1.0"], measures["ids"], measures.at(vocab)
    edges = [edge for edge in _EDGES if edge < log(vocab)]
    bins = zip(edges, [*edges[1:], float("inf")], strict=True)
    accuracy, cross_entropy = measures["hit"].mean().item(), measures["cross_entropy"].mean().item()
    here = next(found for found in at if found.temperature == 1)
    return Inspection(
        tokens=len(entropy),
        vocab_size=vocab,
        temperature=pair.temperature,
        entropy=here.entropy,
        entropy_bits=here.entropy / log(2),
        histogram=[(low, int(((entropy >= low) & (entropy < high)).sum())) for low, high in bins],
        mass=here.mass,
        ids_for_99={
            "mean": ids.mean().item(),
            "median": ids.quantile(0.5).item(),
            "p90": ids.quantile(0.9).item(),
        },
        accuracy=accuracy,
        cross_entropy=cross_entropy,
        perplexity=exp(min(cross_entropy, 700)),
        by_temperature=at,
        positions=shown,
        caches=caches,
        advice=advice_of(at, pair.temperature, vocab, accuracy, cross_entropy, caches, pair.divergence),
    )


def _position(pair: ModelPair, seen: PairBatch, index: int, at: int, logits: Tensor, k: int) -> Position:
    """What the teacher expects at one asked token: the `at`-th of the batch, the `index`-th of all."""
    targets = seen.targets
    row, label = int(targets.rows[at]), int(targets.labels[at])
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    best = log_p.topk(min(k, len(log_p)))
    column = int(targets.positions[at]) % targets.shape[-1]
    before, mask = seen.inputs["input_ids"][row, : column + 1], seen.inputs.get("attention_mask")
    if mask is not None and mask.shape == seen.inputs["input_ids"].shape:
        before = before[mask[row, : column + 1] != 0]

    def text(ids: list[int]) -> str:
        return " ".join(map(str, ids)) if pair.tokenizer is None else pair.tokenizer.decode(ids)

    return Position(
        index=index,
        context=text(before[-_CONTEXT:].tolist()),
        target=text([label]),
        target_probability=p[label].item(),
        rank=int((log_p > log_p[label]).sum()) + 1,
        entropy=torch.special.entr(p).sum().item(),
        candidates=[
            Candidate(text([int(i)]), value.exp().item(), int(i) == label)
            for i, value in zip(best.indices, best.values, strict=True)
        ],
    )
