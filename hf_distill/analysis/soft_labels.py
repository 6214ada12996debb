"""Measures of a teacher's soft labels, block by block: a few numbers of each token are kept, never its distribution."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..planning.cache_size import DRAWS, K, kinds_of

MASSES = (1, 10, 100)
_FIRST = 1024  # ids that are ordered first: sorting a whole vocabulary takes longer than the teacher's forward


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
class CacheKind:
    """A cache of this teacher, which puts an estimate q in the place of its distribution p.

    The gradient of forward KL by a token's logits is p_student - p, so q - p is the error of the gradient.

    temperature:     at which it is written; None: it serves every one
    bytes_per_token: expected
    lost:            top_k: mean mass outside the ids that it keeps; else 0
    error:           |q - p| / |p| over all tokens, each by itself; of sampled by the expected square of its draws, of
                     top_k with 0 outside what it keeps (the loss knows that mass, but not whose it is), of hidden 0 but
                     for the rounding
    error_of_sum:    the same of the sum over all tokens: there errors of draws cancel, and those of a cut do not
    """

    kind: str
    temperature: float | None
    bytes_per_token: float
    truncated_mass: float
    error: float
    error_of_sum: float


class SoftLabels:
    """What was measured of the tokens so far; `self[name]` is [T], in float64 on the CPU.

    cross_entropy, hit: of the labels, at T = 1: nats; 1 where no id is likelier than the label
    ids:                how many of the likeliest ids hold 99 % of the mass, at T = 1
    entropy@T, massk@T: of softmax(z / T), for each T and each k of MASSES

    Args:
        temperatures: each T; 1 is among them.
        stored: those of them for which caches are measured.
    """

    def __init__(self, temperatures: Sequence[float], stored: Sequence[float]):
        self.temperatures, self.stored = temperatures, stored
        self._blocks: dict[str, list[Tensor]] = {}
        self._sums: dict[float, Tensor] = {}  # T -> [2, V]: of p, of what top_k leaves out

    def __getitem__(self, name: str) -> Tensor:
        """A measure of every token, [T]."""
        return torch.cat(self._blocks[name])

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Measure a block of tokens.

        Args:
            logits: [r, V] of the teacher.
            labels: [r].
        """
        own = logits.gather(1, labels[:, None])[:, 0]
        self._note("cross_entropy", torch.logsumexp(logits, -1) - own)
        self._note("hit", own >= logits.amax(-1))
        best = logits.topk(min(max(*MASSES, K), logits.shape[1])).indices  # at every T
        for t in self.temperatures:
            p = (logits / t).softmax(-1)
            self._note(f"entropy@{t}", torch.special.entr(p).sum(-1))
            mass = p.gather(1, best).cumsum(-1, dtype=torch.float64)
            for k in MASSES:
                self._note(f"mass{k}@{t}", mass[:, min(k, mass.shape[1]) - 1])
            if t == 1:
                self._note("ids", ids_for(p, 0.99))
            if t in self.stored:
                self._store(t, p, best[:, :K])

    def _store(self, t: float, p: Tensor, kept: Tensor) -> None:
        tail = p.scatter(1, kept, 0)
        part = (DRAWS * p).frac_()
        self._note(f"square@{t}", torch.linalg.vecdot(p, p))
        self._note(f"noise@{t}", torch.linalg.vecdot(part, 1 - part) / DRAWS**2)
        self._note(f"lost@{t}", tail.sum(-1))
        self._note(f"lost_square@{t}", torch.linalg.vecdot(tail, tail))
        self._note(f"distinct@{t}", (DRAWS * p).clamp_(max=1).sum(-1))
        sums = torch.stack([x.sum(0, dtype=torch.float64) for x in (p, tail)])
        self._sums[t] = self._sums[t] + sums if t in self._sums else sums

    def _note(self, name: str, values: Tensor) -> None:
        self._blocks.setdefault(name, []).append(values.double().cpu())

    def at(self, vocab: int) -> list[AtTemperature]:
        """Means at each T."""
        return [
            AtTemperature(
                t,
                self[f"entropy@{t}"].mean().item(),
                {k: self[f"mass{k}@{t}"].mean().item() for k in MASSES if k < vocab},
            )
            for t in self.temperatures
        ]

    def caches(self, vocab: int, hidden: int | None, length: float) -> list[CacheKind]:
        """Caches of this teacher: of each kind, at each T of `stored`.

        Args:
            vocab: V.
            hidden: H; None: hidden states cannot be stored.
            length: asked tokens of a row.
        """
        found: list[CacheKind] = []
        for t in self.stored:
            costs = {c.kind: c.bytes_per_token for c in kinds_of(vocab, hidden, length, 0, self._mean(f"distinct@{t}"))}
            if "hidden" in costs and not found:
                found.append(CacheKind("hidden", None, costs["hidden"], 0.0, 0.0, 0.0))
            squares, (whole, tail) = self[f"square@{t}"], self._sums[t].norm(dim=1).tolist()
            noise, cut, norm = self[f"noise@{t}"].sum(), self[f"lost_square@{t}"].sum(), squares.sum().sqrt()
            drawn = (noise.sqrt() / norm).item(), noise.sqrt().item() / whole
            found.append(CacheKind("sampled", t, costs["sampled"], 0.0, *drawn))
            left_out = (cut.sqrt() / norm).item(), tail / whole
            found.append(CacheKind("top_k", t, costs["top_k"], self._mean(f"lost@{t}"), *left_out))
        return found

    def _mean(self, name: str) -> float:
        return self[name].mean().item()


def ids_for(p: Tensor, share: float) -> Tensor:
    """How many of the likeliest ids hold a share of the mass, [r].

    Args:
        p: [r, V] probabilities.
        share: of the mass, below 1.
    """
    vocab = p.shape[1]
    found = torch.full((len(p),), vocab, device=p.device)
    left, k = torch.arange(len(p), device=p.device), min(_FIRST, vocab)
    while len(left):
        mass = p[left].topk(k).values.cumsum(-1, dtype=torch.float64)
        count = (mass < share).sum(-1) + 1
        inside = count <= k
        found[left[inside]] = count[inside]
        left = left[~inside] if k < vocab else left[:0]
        k = min(8 * k, vocab)
    return found
