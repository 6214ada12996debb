"""What an inspection means for a recipe."""

from collections.abc import Sequence
from math import log
from typing import Any

# Below it soft labels are hard labels: the likeliest id has more than 97 % of the mass.
HARD = 0.15  # nats
# Above this share of log V the teacher's preferences drown in the noise of thousands of unlikely ids.
FLAT = 0.6
# A cache of the likeliest ids that leaves out more than this teaches a student a tail that is not its teacher's.
LOST = 0.05
# Labels that the teacher misses more often than this are where its soft labels and hard labels pull apart.
WEAK = 0.25


def advice_of(
    by_temperature: Sequence[Any], temperature: float, vocab_size: int, accuracy: float, caches: Sequence[Any]
) -> list[str]:
    """Advice, a sentence or two each.

    Args:
        by_temperature: what T does, see `AtTemperature`.
        temperature: of the recipe.
        vocab_size: V.
        accuracy: of the teacher on the labels.
        caches: kinds of caches, see `CacheKind`.
    """
    at = {found.temperature: found.entropy for found in by_temperature}
    own, most = at[temperature], log(vocab_size)
    lines = [_of_temperature(at, temperature, own, most)]
    if accuracy < WEAK:
        lines.append(
            f"The teacher's first choice is the label for {accuracy:.0%} of the tokens: check that it fits the data "
            "(language, template, shift of the labels), and keep distill.alpha low if it does."
        )
    top_k = next((cache for cache in caches if cache.kind == "top_k"), None)
    if top_k is not None:
        cut = f"{top_k.lost:.1%} of the mass lies outside of the ids that a top_k cache keeps"
        lines.append(
            f"Cache: {cut}: take sampled (no bias, {_bytes(caches, 'sampled')} bytes/token), or hidden (exact, "
            f"{_bytes(caches, 'hidden')})."
            if top_k.lost > LOST
            else f"Cache: {cut}: any kind serves; sampled is the smallest ({_bytes(caches, 'sampled')} bytes/token), "
            f"hidden the exact one ({_bytes(caches, 'hidden')})."
        )
        lines.append("A cache pays from the second pass over the data on; `hf-distill plan` shows what it saves.")
    return lines


def _of_temperature(at: dict[float, float], temperature: float, own: float, most: float) -> str:
    told = f"At the recipe's T = {temperature:g} the teacher's entropy is {own:.2f} nats of at most {most:.2f}"
    if own < HARD:
        softer = next((t for t in sorted(at) if t > temperature and at[t] >= HARD), None)
        raised = f"T = {softer:g} has {at[softer]:.2f}" if softer else "a higher T, or hard labels alone, serve as well"
        return f"{told}: it says little more than a hard label would. {raised}."
    if own > FLAT * most:
        lower = [t for t in sorted(at) if t < temperature and at[t] <= FLAT * most]
        hint = f" T = {lower[-1]:g} has {at[lower[-1]]:.2f}." if lower else ""
        return f"{told}: most of the gradient comes from ids that it thinks unlikely.{hint}"
    return f"{told}: neither a hard label nor noise. `hf-distill temperature` finds which T serves this student."


def _bytes(caches: Sequence[Any], kind: str) -> str:
    return f"{next(cache.bytes_per_token for cache in caches if cache.kind == kind):,.0f}"
