"""Measures of a teacher's soft labels: a few numbers of each token are stored, never its distribution."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.defaults import SAMPLES_PER_TOKEN, TOP_K_IDS
from ..core.logits import cumulative_sum
from ..planning.cache_size import kinds_of

MASS_IDS = (1, 10, 100)  # numbers of likeliest ids whose mass is measured
_FIRST_IDS = 1024  # ids that are sorted first, because sorting a full vocabulary takes longer than the forward pass


@dataclass(frozen=True)
class AtTemperature:
    """Means over the tokens of softmax(z / T).

    entropy: nats
    mass:    k -> share of the k likeliest ids
    """

    temperature: float
    entropy: float
    mass: dict[int, float]


@dataclass(frozen=True)
class CacheKind:
    """Size and error of a cache of this teacher, which stores an estimate e of the teacher's distribution q.

    The gradient of the forward KL with respect to a token's logits is p - q, where p is the student's distribution, so
    e - q is the gradient's error.

    temperature:     at which the cache is written; None: it supports every temperature
    bytes_per_token: expected
    truncated_mass:  for top_k, mean mass outside the stored ids; else 0
    error:           |e - q| / |q| over all tokens; for sampled, from the expected squared error of the draws; for
                     top_k, with e = 0 outside the stored ids (the loss knows that mass, but not its ids); for hidden, 0
                     (only rounding)
    error_of_sum:    the same for the sum over all tokens, where sampling errors cancel and truncation errors do not
    """

    kind: str
    temperature: float | None
    bytes_per_token: float
    truncated_mass: float
    error: float
    error_of_sum: float


class SoftLabels:
    """Collects measures of each token; `self[name]` is [T], in float64 on the CPU.

    cross_entropy, hit: of the labels at T = 1: nats; 1 where no id is likelier than the label
    ids:                number of the likeliest ids that have 99 % of the mass, at T = 1
    entropy@T, massk@T: of softmax(z / T), for each T and each k of MASS_IDS

    Args:
        temperatures: each T; 1 is among them.
        cache_temperatures: those for which caches are measured.
    """

    def __init__(self, temperatures: Sequence[float], cache_temperatures: Sequence[float]):
        self.temperatures, self.cache_temperatures = temperatures, cache_temperatures
        self._blocks: dict[str, list[Tensor]] = {}
        self._sums: dict[float, Tensor] = {}  # T -> [2, V]: sum of q, sum of what top_k leaves out

    def __getitem__(self, name: str) -> Tensor:
        """A measure of every token, [T]."""
        return torch.cat(self._blocks[name])

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Measure a block of tokens.

        Args:
            logits: [r, V] of the teacher.
            labels: [r].
        """
        label_logits = logits.gather(1, labels[:, None])[:, 0]
        self._append("cross_entropy", torch.logsumexp(logits, -1) - label_logits)
        self._append("hit", label_logits >= logits.amax(-1))
        likeliest = logits.topk(min(max(*MASS_IDS, TOP_K_IDS), logits.shape[1])).indices  # the same at every T
        for t in self.temperatures:
            q = (logits / t).softmax(-1)
            self._append(f"entropy@{t}", torch.special.entr(q).sum(-1))
            mass = cumulative_sum(q.gather(1, likeliest).double())
            for k in MASS_IDS:
                self._append(f"mass{k}@{t}", mass[:, min(k, mass.shape[1]) - 1])
            if t == 1:
                self._append("ids", ids_for(q, 0.99))
            if t in self.cache_temperatures:
                self._add_cache_errors(t, q, likeliest[:, :TOP_K_IDS])

    def _add_cache_errors(self, t: float, q: Tensor, top_ids: Tensor) -> None:
        """Measure the errors of a sampled and a top_k cache of the teacher's probabilities q, [r, V]."""
        tail = q.scatter(1, top_ids, 0)
        fraction = (SAMPLES_PER_TOKEN * q).frac_()
        self._append(f"square@{t}", torch.linalg.vecdot(q, q))
        self._append(f"noise@{t}", torch.linalg.vecdot(fraction, 1 - fraction) / SAMPLES_PER_TOKEN**2)
        self._append(f"truncated@{t}", tail.sum(-1))
        self._append(f"truncated_square@{t}", torch.linalg.vecdot(tail, tail))
        self._append(f"distinct@{t}", (SAMPLES_PER_TOKEN * q).clamp_(max=1).sum(-1))
        sums = torch.stack([x.sum(0, dtype=torch.float64) for x in (q, tail)])
        self._sums[t] = self._sums[t] + sums if t in self._sums else sums

    def _append(self, name: str, values: Tensor) -> None:
        self._blocks.setdefault(name, []).append(values.double().cpu())

    def effects(self, vocab: int) -> list[AtTemperature]:
        """Return the means at each T."""
        return [
            AtTemperature(
                t,
                self[f"entropy@{t}"].mean().item(),
                {k: self[f"mass{k}@{t}"].mean().item() for k in MASS_IDS if k < vocab},
            )
            for t in self.temperatures
        ]

    def caches(self, vocab: int, hidden: int | None, length: float) -> list[CacheKind]:
        """Return the caches of this teacher: each kind at each T of `cache_temperatures`.

        Args:
            vocab: V.
            hidden: H; None: hidden states cannot be stored.
            length: mean number of target tokens of a row.
        """
        caches: list[CacheKind] = []
        for t in self.cache_temperatures:
            costs = {c.kind: c.bytes_per_token for c in kinds_of(vocab, hidden, length, 0, self._mean(f"distinct@{t}"))}
            if "hidden" in costs and not caches:
                caches.append(CacheKind("hidden", None, costs["hidden"], 0.0, 0.0, 0.0))
            squares, (sum_norm, tail_norm) = self[f"square@{t}"], self._sums[t].norm(dim=1).tolist()
            noise, truncated, norm = (
                self[f"noise@{t}"].sum(),
                self[f"truncated_square@{t}"].sum(),
                squares.sum().sqrt(),
            )
            sampling_errors = (noise.sqrt() / norm).item(), noise.sqrt().item() / sum_norm
            caches.append(CacheKind("sampled", t, costs["sampled"], 0.0, *sampling_errors))
            truncation_errors = (truncated.sqrt() / norm).item(), tail_norm / sum_norm
            truncated_mass = self._mean(f"truncated@{t}")
            caches.append(CacheKind("top_k", t, costs["top_k"], truncated_mass, *truncation_errors))
        return caches

    def _mean(self, name: str) -> float:
        return self[name].mean().item()


def ids_for(probs: Tensor, share: float) -> Tensor:
    """Return how many of the likeliest ids have a share of the mass, [r].

    Args:
        probs: [r, V] probabilities.
        share: of the mass, below 1.
    """
    vocab = probs.shape[1]
    counts = torch.full((len(probs),), vocab, device=probs.device)
    remaining, k = torch.arange(len(probs), device=probs.device), min(_FIRST_IDS, vocab)
    while len(remaining):
        mass = cumulative_sum(probs[remaining].topk(k).values.double())
        count = (mass < share).sum(-1) + 1
        is_complete = count <= k
        counts[remaining[is_complete]] = count[is_complete]
        remaining = remaining[~is_complete] if k < vocab else remaining[:0]
        k = min(8 * k, vocab)
    return counts
