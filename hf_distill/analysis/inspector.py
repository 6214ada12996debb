"""What a teacher's soft labels hold, over held-out rows: how much there is beside the label, and where."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

import torch
from torch import Tensor

from ..cache.drawing import blocks_of
from ..errors import DistillError
from ..planning.anatomy import Anatomy
from ..planning.caches import DRAWS, K, caches_of
from ..tasks import bare
from .advice import advice_of
from .pair import Pair

TEMPERATURES = (0.5, 1.0, 2.0, 5.0, 10.0)
MASSES = (1, 10, 100)
_EDGES = (0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0)  # nats


@dataclass(frozen=True)
class AtTemperature:
    """Means over the tokens of softmax(z / T).

    entropy: nats
    mass:    of the k likeliest ids, k -> share
    """

    temperature: float
    entropy: float
    mass: dict[int, float]


@dataclass(frozen=True)
class Candidate:
    """One of the likeliest ids of a position: its text, its probability at T = 1, whether the data go on with it."""

    text: str
    probability: float
    is_target: bool


@dataclass(frozen=True)
class Position:
    """A token to look at: the text before it, the data's own, and what the teacher expects.

    rank: of the data's token among all ids, from 1
    """

    index: int
    context: str
    target: str
    target_probability: float
    rank: int
    entropy: float
    candidates: list[Candidate]


@dataclass(frozen=True)
class CacheKind:
    """A cache of this teacher.

    lost:   top_k: mean mass outside the stored ids, at T = 1; else 0
    cosine: between one token's stored and whole distribution, expected; over the tokens of a batch the errors of draws
            cancel, and those of a tail that is cut do not
    """

    kind: str
    bytes_per_token: float
    lost: float
    cosine: float


@dataclass(frozen=True)
class Inspection:
    """A teacher over held-out rows, at T = 1 where nothing else is said.

    tokens:         that were looked at
    vocab_size:     V
    entropy:        nats/token; `entropy_bits`: the same in bits
    histogram:      [lower edge in nats, tokens], ...
    mass:           of the k likeliest ids, k -> mean share
    ids_for_99:     "mean", "median", "p90" over the tokens: how many ids hold 99 % of the mass
    accuracy:       share of tokens whose likeliest id is the label
    cross_entropy:  of the labels, nats/token; `perplexity`: its exp
    by_temperature: what T does
    positions:      tokens that were asked for
    caches:         kinds of caches
    advice:         what this means for the recipe
    """

    tokens: int
    vocab_size: int
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
    pair: Pair,
    tokens: int | None = 4096,
    positions: Sequence[int] = (8, 64, 128),
    k: int = 8,
    temperatures: Sequence[float] = TEMPERATURES,
) -> Inspection:
    """Look at what a teacher says of held-out tokens, in one forward of it.

    Args:
        pair: its teacher is looked at; a student is not run.
        tokens: until so many were asked; None: all.
        positions: which of the asked tokens to show, counted from 0.
        k: ids of each.
        temperatures: for `by_temperature`, in which 1 and the pair's own are added.

    Raises:
        DistillError: the slice is empty, or an argument makes no sense.
    """
    if k < 1 or any(t <= 0 for t in temperatures) or any(i < 0 for i in positions):
        raise DistillError(
            f"k is {k}, temperatures are {[*temperatures]}, positions are {[*positions]}: k is at least 1, "
            "temperatures are above 0, positions are counted from 0."
        )
    if pair.teacher is None:
        raise DistillError("There is no teacher to inspect: give the pair one.")
    at = sorted({*temperatures, 1.0, pair.temperature})
    found: dict[str, list[Tensor]] = {}
    shown: list[Position] = []
    done = 0
    for seen in pair.beside(None).seen(tokens):
        assert seen.teacher is not None
        for rows, logits in blocks_of(seen.teacher):
            labels = seen.targets.labels[rows]
            for i in positions:
                own = i - done - rows.start
                if 0 <= own < len(labels):
                    shown.append(_position(i, seen, rows.start + own, logits[own].clone(), k, pair.tokenizer))
            for name, values in _measured(logits, labels, at).items():
                found.setdefault(name, []).append(values.double().cpu())
        done += len(seen.targets)
    return _inspection(pair, at, {name: torch.cat(values) for name, values in found.items()}, shown)


def _measured(logits: Tensor, labels: Tensor, temperatures: Sequence[float]) -> dict[str, Tensor]:
    """Of each token of a block, name -> [r]."""
    ordered = logits.sort(-1, descending=True).values
    ordered = ordered - ordered[:, :1]
    found, inside = {}, labels < logits.shape[1]
    for t in temperatures:
        log_p = (ordered / t).log_softmax(-1)
        p = log_p.exp()
        found[f"entropy@{t}"] = -(p * log_p.masked_fill(p == 0, 0)).sum(-1)
        mass = p.cumsum(-1, dtype=torch.float64)
        for k in (*MASSES, K):
            found[f"mass{k}@{t}"] = mass[:, min(k, mass.shape[1]) - 1]
        if t == 1.0:
            found["ids"] = (mass < 0.99).sum(-1) + 1
            found["squares"] = p.square().sum(-1)
            kept = p[:, :K].square().sum(-1)
            found["kept"] = (kept / found["squares"]).sqrt()
    told = logits.gather(1, (labels * inside)[:, None])[:, 0]
    cross_entropy = torch.logsumexp(logits, -1) - told
    found["cross_entropy"] = torch.where(inside, cross_entropy, torch.inf)
    found["hit"] = (logits.argmax(-1) == labels).double()
    return found


def _inspection(pair: Pair, at: Sequence[float], found: dict[str, Tensor], shown: list[Position]) -> Inspection:
    mean = {name: values.mean().item() for name, values in found.items()}
    entropy, ids = found["entropy@1.0"], found["ids"]
    counts = [int(((entropy >= low) & (entropy < high)).sum()) for low, high in _bins()]
    model: Any = bare(pair.teacher)
    anatomy = Anatomy.of(model.config) if hasattr(model.config, "vocab_size") else None
    vocab_size = int(model.config.get_text_config().vocab_size)
    by_temperature = [
        AtTemperature(t, mean[f"entropy@{t}"], {k: mean[f"mass{k}@{t}"] for k in MASSES if k < vocab_size}) for t in at
    ]
    squares = found["squares"]
    cosine = {
        "hidden": 1.0,
        # E|q - p|^2 = (1 - |p|^2) / n for n draws from p itself
        "sampled": (squares / (squares + (1 - squares) / DRAWS)).sqrt().mean().item(),
        "top_k": mean["kept"],
    }
    caches = []
    if anatomy is not None:
        length = max(len(pair.rows[0]["input_ids"]), 1)
        for cost in caches_of(anatomy, length, 0, 1.0, 3.0, None).kinds:
            lost = 1 - mean[f"mass{K}@1.0"] if cost.kind == "top_k" else 0.0
            caches.append(CacheKind(cost.kind, cost.bytes_per_token, max(lost, 0.0), cosine[cost.kind]))
    return Inspection(
        tokens=len(entropy),
        vocab_size=vocab_size,
        entropy=mean["entropy@1.0"],
        entropy_bits=mean["entropy@1.0"] / log(2),
        histogram=[(low, count) for (low, _), count in zip(_bins(), counts, strict=True)],
        mass={k: mean[f"mass{k}@1.0"] for k in MASSES if k < vocab_size},
        ids_for_99={"mean": mean["ids"], "median": ids.median().item(), "p90": ids.quantile(0.9).item()},
        accuracy=mean["hit"],
        cross_entropy=mean["cross_entropy"],
        perplexity=exp(min(mean["cross_entropy"], 700)),
        by_temperature=by_temperature,
        positions=shown,
        caches=caches,
        advice=advice_of(by_temperature, pair.temperature, vocab_size, mean["hit"], caches),
    )


def _bins() -> list[tuple[float, float]]:
    return [*zip(_EDGES, (*_EDGES[1:], float("inf")), strict=True)]


def _position(index: int, seen: Any, at: int, logits: Tensor, k: int, tokenizer: Any) -> Position:
    """What the teacher expects at one asked token."""
    targets = seen.targets
    row, label = int(targets.rows[at]), int(targets.labels[at])
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    best = log_p.topk(min(k, len(log_p)))
    ids: Any = seen.inputs.get("input_ids")
    column = int(targets.positions[at]) % targets.shape[-1] if len(targets.shape) > 1 else ids.shape[1] - 1
    before = ids[row, max(0, column - 15) : column + 1].tolist()

    def text(of: list[int]) -> str:
        return " ".join(map(str, of)) if tokenizer is None else tokenizer.decode(of)

    known = label < len(log_p)
    rank = int((log_p > log_p[label]).sum()) + 1 if known else len(log_p) + 1
    return Position(
        index=index,
        context=text(before),
        target=text([label]),
        target_probability=p[label].item() if known else 0.0,
        rank=rank,
        entropy=-(p * log_p.masked_fill(p == 0, 0)).sum().item(),
        candidates=[
            Candidate(text([int(i)]), value.exp().item(), int(i) == label)
            for i, value in zip(best.indices, best.values, strict=True)
        ],
    )
