"""Inspection of a teacher's soft labels over held-out rows: entropy, mass, accuracy, likeliest tokens, caches."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

import torch
from torch import Tensor

from ..cache.sampling import blocks_of
from ..core.defaults import HELD_OUT_TOKENS, NUM_CANDIDATE_IDS
from ..core.logits import LazyLogits
from ..errors import DistillError
from .advice import advice_of
from .model_pair import ModelPair, PairBatch
from .soft_labels import AtTemperature, CacheKind, SoftLabels

TEMPERATURES = (0.5, 1.0, 2.0, 5.0, 10.0)
POSITIONS = (8, 64, 128)
_HISTOGRAM_EDGES_NATS = (0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0)
_CONTEXT_TOKENS = 16  # shown before a position


@dataclass(frozen=True)
class Candidate:
    """One of the likeliest ids at a position: its text, its probability at T = 1, whether it is the label."""

    text: str
    probability: float
    is_target: bool


@dataclass(frozen=True)
class Position:
    """A target token with the text before it, the label, and the teacher's likeliest ids.

    index: among the target tokens, from 0
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
    """Measurements of a teacher's soft labels over held-out rows, at T = 1 unless stated.

    tokens:         number of target tokens that were measured
    vocab_size:     V
    temperature:    of the recipe
    entropy:        nats/token; `entropy_bits`: the same in bits
    histogram:      [lower edge in nats, tokens], ...; the last bin extends to log V
    mass:           k -> mean share of the k likeliest ids
    ids_for_99:     "mean", "median", "p90" over the tokens of the number of ids that have 99 % of the mass
    accuracy:       share of tokens for which no id is likelier than the label
    cross_entropy:  of the labels, nats/token; `perplexity`: its exponential
    by_temperature: effect of T
    positions:      the requested tokens
    caches:         kinds of caches, at T = 1 and the recipe's T
    advice:         for the recipe
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
    tokens: int | None = HELD_OUT_TOKENS,
    positions: Sequence[int] | None = None,
    k: int = NUM_CANDIDATE_IDS,
    temperatures: Sequence[float] = TEMPERATURES,
) -> Inspection:
    """Measure a teacher's soft labels of held-out tokens, with one forward pass.

    Args:
        pair: its teacher is inspected; a student is not run.
        tokens: number of target tokens after which no further batch is read; None reads all rows.
        positions: indices of the target tokens to show, from 0; None shows those of POSITIONS that exist.
        k: number of likeliest ids to show at each position.
        temperatures: for `by_temperature`; T = 1 and the pair's temperature are added.

    Returns:
        the measurements of the soft labels.

    Raises:
        DistillError: the held-out rows have no target token, there is no teacher, or an argument is out of range.
    """
    requested = {*(POSITIONS if positions is None else positions)}
    if k < 1 or any(t <= 0 for t in temperatures) or any(i < 0 for i in requested):
        raise DistillError(
            f"k is {k}, temperatures are {[*temperatures]}, positions are {sorted(requested)}: k must be at least 1, "
            "temperatures must be above 0, and positions are counted from 0."
        )
    if pair.teacher is None:
        raise DistillError("There is no teacher to inspect: give the pair a teacher.")
    measures = SoftLabels(sorted({*temperatures, 1.0, pair.temperature}), sorted({1.0, pair.temperature}))
    shown: list[Position] = []
    vocab = num_tokens = num_rows = 0
    hidden: int | None = None
    for batch in pair.with_student(None).batches(tokens):
        source = batch.teacher
        assert source is not None
        vocab, hidden = source.vocab_size, source.hidden.shape[1] if isinstance(source, LazyLogits) else None
        for block, logits in blocks_of(source):
            for token in range(block.start, block.stop):
                if num_tokens + token in requested:
                    shown.append(_position(pair, batch, num_tokens + token, token, logits[token - block.start], k))
            measures.add(logits, batch.targets.labels[block])
        num_tokens, num_rows = num_tokens + len(batch.targets), num_rows + len(batch.targets.batch_rows.unique())
    if positions is not None and max(requested, default=0) >= num_tokens:
        raise DistillError(
            f"Position {max(requested)} was requested, but only {num_tokens:,} target tokens were measured, counted "
            "from 0: raise tokens, or data.eval.max_rows in the recipe."
        )
    return _inspection(pair, measures, shown, vocab, measures.caches(vocab, hidden, num_tokens / num_rows))


def _inspection(
    pair: ModelPair, measures: SoftLabels, shown: list[Position], vocab: int, caches: list[CacheKind]
) -> Inspection:
    entropy, ids, effects = measures["entropy@1.0"], measures["ids"], measures.effects(vocab)
    edges = [edge for edge in _HISTOGRAM_EDGES_NATS if edge < log(vocab)]
    bins = zip(edges, [*edges[1:], float("inf")], strict=True)
    accuracy, cross_entropy = measures["hit"].mean().item(), measures["cross_entropy"].mean().item()
    at_one = next(effect for effect in effects if effect.temperature == 1)
    return Inspection(
        tokens=len(entropy),
        vocab_size=vocab,
        temperature=pair.temperature,
        entropy=at_one.entropy,
        entropy_bits=at_one.entropy / log(2),
        histogram=[(low, int(((entropy >= low) & (entropy < high)).sum())) for low, high in bins],
        mass=at_one.mass,
        ids_for_99={
            "mean": ids.mean().item(),
            "median": ids.quantile(0.5).item(),
            "p90": ids.quantile(0.9).item(),
        },
        accuracy=accuracy,
        cross_entropy=cross_entropy,
        perplexity=exp(min(cross_entropy, 700)),
        by_temperature=effects,
        positions=shown,
        caches=caches,
        advice=advice_of(effects, pair.temperature, vocab, accuracy, cross_entropy, caches, pair.divergence),
    )


def _position(pair: ModelPair, batch: PairBatch, index: int, token: int, logits: Tensor, k: int) -> Position:
    """Describe one target token.

    Args:
        pair: for its tokenizer.
        batch: the token's batch.
        index: of the token among all target tokens.
        token: its index among the batch's target tokens.
        logits: [V] of the teacher.
        k: number of likeliest ids.
    """
    targets = batch.targets
    row, label = int(targets.batch_rows[token]), int(targets.labels[token])
    log_q = logits.double().log_softmax(-1)
    q = log_q.exp()
    likeliest = log_q.topk(min(k, len(log_q)))
    column = int(targets.positions[token]) % targets.shape[-1]
    context, mask = batch.inputs["input_ids"][row, : column + 1], batch.inputs.get("attention_mask")
    if mask is not None and mask.shape == batch.inputs["input_ids"].shape:
        context = context[mask[row, : column + 1] != 0]

    def decode(ids: list[int]) -> str:
        return " ".join(map(str, ids)) if pair.tokenizer is None else str(pair.tokenizer.decode(ids))

    return Position(
        index=index,
        context=decode(context[-_CONTEXT_TOKENS:].tolist()),
        target=decode([label]),
        target_probability=q[label].item(),
        rank=int((log_q > log_q[label]).sum()) + 1,
        entropy=torch.special.entr(q).sum().item(),
        candidates=[
            Candidate(decode([int(i)]), value.exp().item(), int(i) == label)
            for i, value in zip(likeliest.indices, likeliest.values, strict=True)
        ],
    )
