"""What an inspection means for a recipe."""

from collections.abc import Sequence
from math import log
from typing import Any

from ..planning.cache_size import DRAWS, K
from .soft_labels import AtTemperature, CacheKind
from .verdicts import FLAT, HARD

TAIL = 0.5  # mass of the likeliest 100 ids: below, the thousands of others outweigh them
WEAK = 0.25  # accuracy: below, language, template or shift of the data may not be the teacher's
OVERSURE = 0.5  # nats/token that labels cost more than the entropy, which says what they should cost
# Between what was seen of the cosine of the gradient by the head's weight with the whole one, of SmolLM2-135M-Instruct
# and a student of its blocks (benchmarks/results/inspect.json).
NOISY = 1.0  # error of a sampled cache: 0.985 at 0.44, 0.69 at 2.5; beyond 1 a token's draws are mostly noise
LOST = 0.3  # mass that a top_k cache leaves out: 0.996 at 0.10, 0.94 at 0.75


def advice_of(
    by_temperature: Sequence[AtTemperature],
    temperature: float,
    vocab_size: int,
    accuracy: float,
    cross_entropy: float,
    caches: Sequence[CacheKind],
    divergence: Any = "forward_kl",
) -> list[str]:
    """Advice, a sentence or two each: on T, on the labels, on caches.

    Args:
        by_temperature: what T does; 1 and the recipe's are among them.
        temperature: of the recipe.
        vocab_size: V.
        accuracy: of the teacher on the labels.
        cross_entropy: of the labels, nats/token.
        caches: at 1 and the recipe's T.
        divergence: of the recipe: a name, or {"name": ..., options}.
    """
    at = {found.temperature: found for found in by_temperature}
    lines = [_of_temperature(at, temperature, log(vocab_size))]
    if accuracy < WEAK:
        lines.append(
            f"The teacher's first choice is the label for {accuracy:.0%} of the tokens: check that it fits the data "
            "(language, template, shift of the labels), and keep distill.alpha low if it does."
        )
    if cross_entropy > at[1.0].entropy + OVERSURE:
        lines.append(
            f"The labels cost the teacher {cross_entropy:.2f} nats, and its entropy is {at[1.0].entropy:.2f}: it is "
            "surer than it is right on this data. A higher T or a lower distill.alpha copies less of that."
        )
    return [*lines, *_of_caches(caches, temperature, divergence)]


def _of_temperature(at: dict[float, AtTemperature], temperature: float, most: float) -> str:
    own = at[temperature].entropy
    told = f"At the recipe's T = {temperature:g} the teacher's entropy is {own:.2f} nats of at most {most:.2f}"
    tuned = "`hf-distill temperature` finds which T serves this student."
    if own < HARD:
        softer = next((t for t in sorted(at) if t > temperature and at[t].entropy >= HARD), None)
        raised = f"T = {softer:g} has {at[softer].entropy:.2f}" if softer else "hard labels alone serve as well"
        return f"{told}: nearly one-hot, it says little more than a hard label would. {raised}."
    if own > FLAT * most:
        lower = [t for t in sorted(at) if t < temperature and at[t].entropy <= FLAT * most]
        hint = f" T = {lower[-1]:g} has {at[lower[-1]].entropy:.2f}." if lower else ""
        return f"{told}: nearly uniform, most of the gradient is about ids that it thinks unlikely.{hint}"
    likeliest = at[temperature].mass.get(100, 1.0)
    if likeliest < TAIL:
        before = f" ({at[1.0].mass[100]:.0%} at T = 1)" if temperature != 1 else ""
        return (
            f"{told}: the tail dominates, the likeliest 100 ids hold {likeliest:.0%}{before}. The soft labels say "
            f"mostly how unlikely the others are. {tuned}"
        )
    if at[1.0].entropy < HARD:
        return f"{told}, and at T = 1 nearly one-hot ({at[1.0].entropy:.2f}): stay above 1. {tuned}"
    return f"{told}: neither one-hot nor flat. {tuned}"


def _of_caches(caches: Sequence[CacheKind], temperature: float, divergence: Any) -> list[str]:
    """Which kinds serve at the recipe's T, which do not and why, and when one pays."""
    own = [cache for cache in caches if cache.temperature in (None, temperature)]
    faults = {cache.kind: _fault(cache, divergence) for cache in own}
    fit = [cache for cache in own if not faults[cache.kind]]
    unfit = [f"{kind} does not, {fault}" for kind, fault in faults.items() if fault]
    sizes = ", ".join(f"{cache.kind} ({cache.bytes_per_token:,.0f} bytes/token)" for cache in fit)
    serves = f"{sizes} serve{'s' * (len(fit) == 1)}" if fit else "none serves"
    lines = [f"Caches at T = {temperature:g}: {'; '.join([serves, *unfit])}."]
    again = [c.kind for c in caches if c.temperature == 1 and faults[c.kind] and not _fault(c, divergence)]
    if again:
        lines.append(f"At T = 1 {' and '.join(again)} would serve too.")
    lines.append(
        "Writing a cache takes one forward of the teacher, so it pays from the second pass over the data on: an "
        "epoch, another student, another run. `hf-distill plan` says what it saves of a step."
    )
    return lines


def _fault(cache: CacheKind, divergence: Any) -> str:
    """Why a kind does not serve; empty: it does."""
    name = divergence["name"] if isinstance(divergence, dict) else divergence
    if cache.kind == "sampled" and name not in ("forward_kl", None):
        return f"it tells forward_kl alone, and the recipe's divergence is {name}"
    if cache.kind == "sampled" and cache.error > NOISY:
        return f"the error of a token's {DRAWS} draws is {cache.error:.1f} times what they stand for"
    if cache.kind == "top_k" and cache.truncated_mass > LOST:
        return f"{cache.truncated_mass:.0%} of the mass lies outside its {K} ids"
    return ""
