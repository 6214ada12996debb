"""Advice on temperature, labels and caches, derived from an inspection of a teacher."""

from collections.abc import Sequence
from math import log

from ..core.defaults import DIVERGENCE, SAMPLES_PER_TOKEN, TOP_K_IDS
from .soft_labels import AtTemperature, CacheKind
from .verdicts import MAX_ENTROPY_SHARE, MIN_ENTROPY_NATS

MIN_TOP_100_MASS = 0.5  # mass of the likeliest 100 ids; below, the remaining ids outweigh them
MIN_ACCURACY = 0.25  # of the teacher; below, language, template or shift of the data may not fit the teacher
MAX_LABEL_COST_NATS = 0.5  # nats/token by which the cross entropy of the labels may exceed the teacher's entropy
# Both limits lie between measured values (benchmarks/results/inspect.json, SmolLM2-135M-Instruct and a student cut from
# it). The cosine compares the gradient of the output head's weight with the gradient for the full distribution.
MAX_SAMPLING_ERROR = 1.0  # of a sampled cache: cosine 0.985 at error 0.44, 0.69 at 2.5; beyond 1 the draws are noise
MAX_TRUNCATED_MASS = 0.3  # left out by a top_k cache: cosine 0.996 at mass 0.10, 0.94 at 0.75


def advice_of(
    by_temperature: Sequence[AtTemperature],
    temperature: float,
    vocab_size: int,
    accuracy: float,
    cross_entropy: float,
    caches: Sequence[CacheKind],
    divergence: str | dict[str, object] = DIVERGENCE,
) -> list[str]:
    """Return advice of one or two sentences each: on temperature, on the labels, on caches.

    Args:
        by_temperature: effect of T; contains T = 1 and the recipe's T.
        temperature: of the recipe.
        vocab_size: V.
        accuracy: of the teacher on the labels.
        cross_entropy: of the labels, nats/token.
        caches: at T = 1 and the recipe's T.
        divergence: of the recipe: a name, or {"name": ..., options}.
    """
    effects = {effect.temperature: effect for effect in by_temperature}
    lines = [_temperature_advice(effects, temperature, log(vocab_size))]
    if accuracy < MIN_ACCURACY:
        lines.append(
            f"The teacher's likeliest id is the label for only {accuracy:.0%} of the tokens: check that the teacher "
            "fits the data (language, template, shift of the labels), and keep distill.alpha low if it does."
        )
    if cross_entropy > effects[1.0].entropy + MAX_LABEL_COST_NATS:
        lines.append(
            f"The cross entropy of the labels is {cross_entropy:.2f} nats, and the teacher's entropy is "
            f"{effects[1.0].entropy:.2f}: the teacher is overconfident on this data. A higher T or a lower "
            "distill.alpha transfers less of that to the student."
        )
    return [*lines, *_cache_advice(caches, temperature, divergence)]


def _temperature_advice(effects: dict[float, AtTemperature], temperature: float, max_entropy: float) -> str:
    entropy = effects[temperature].entropy
    text = (
        f"At the recipe's T = {temperature:g} the teacher's entropy is {entropy:.2f} nats of at most {max_entropy:.2f}"
    )
    search = "`hf-distill temperature` searches for the best T for this student."
    if entropy < MIN_ENTROPY_NATS:
        softer = next((t for t in sorted(effects) if t > temperature and effects[t].entropy >= MIN_ENTROPY_NATS), None)
        alternative = (
            f"At T = {softer:g} the entropy is {effects[softer].entropy:.2f}"
            if softer
            else "Training on hard labels alone gives about the same result"
        )
        return f"{text}: nearly one-hot, so it carries little more information than a hard label. {alternative}."
    if entropy > MAX_ENTROPY_SHARE * max_entropy:
        lower = [
            t for t in sorted(effects) if t < temperature and effects[t].entropy <= MAX_ENTROPY_SHARE * max_entropy
        ]
        hint = f" At T = {lower[-1]:g} the entropy is {effects[lower[-1]].entropy:.2f}." if lower else ""
        return f"{text}: nearly uniform, so most of the gradient is on ids that the teacher considers unlikely.{hint}"
    top_mass = effects[temperature].mass.get(100, 1.0)
    if top_mass < MIN_TOP_100_MASS:
        before = f" ({effects[1.0].mass[100]:.0%} at T = 1)" if temperature != 1 else ""
        return (
            f"{text}: the tail dominates, because the likeliest 100 ids have only {top_mass:.0%} of the mass{before}. "
            f"Most of the gradient is on ids in the tail. {search}"
        )
    if effects[1.0].entropy < MIN_ENTROPY_NATS:
        return f"{text}; at T = 1 it is nearly one-hot ({effects[1.0].entropy:.2f} nats), so keep T above 1. {search}"
    return f"{text}: neither one-hot nor flat. {search}"


def _cache_advice(caches: Sequence[CacheKind], temperature: float, divergence: str | dict[str, object]) -> list[str]:
    """Say which kinds of cache are suitable at the recipe's T, why others are not, and when a cache pays off."""
    at_recipe = [cache for cache in caches if cache.temperature in (None, temperature)]
    faults = {cache.kind: _cache_fault(cache, divergence) for cache in at_recipe}
    suitable = [cache for cache in at_recipe if not faults[cache.kind]]
    unsuitable = [f"{kind} is not suitable, because {fault}" for kind, fault in faults.items() if fault]
    sizes = ", ".join(f"{cache.kind} ({cache.bytes_per_token:,.0f} bytes/token)" for cache in suitable)
    verb = "is" if len(suitable) == 1 else "are"
    summary = f"{sizes} {verb} suitable" if suitable else "no kind is suitable"
    lines = [f"Caches at T = {temperature:g}: {'; '.join([summary, *unsuitable])}."]
    at_one = [c.kind for c in caches if c.temperature == 1 and faults[c.kind] and not _cache_fault(c, divergence)]
    if at_one:
        lines.append(f"At T = 1 {' and '.join(at_one)} would be suitable.")
    lines.append(
        "Writing a cache takes one forward pass of the teacher over the data, so it pays off from the second pass on: "
        "another epoch, student or run. `hf-distill plan` shows the share of a step that it saves."
    )
    return lines


def _cache_fault(cache: CacheKind, divergence: str | dict[str, object]) -> str:
    """Return why a kind of cache is not suitable; empty if it is."""
    name = divergence["name"] if isinstance(divergence, dict) else divergence
    if cache.kind == "sampled" and name not in ("forward_kl", None):
        return f"it supports only forward_kl, and the recipe's divergence is {name}"
    if cache.kind == "sampled" and cache.error > MAX_SAMPLING_ERROR:
        return (
            f"the error of a token's {SAMPLES_PER_TOKEN} draws is {cache.error:.1f} times the norm of its probabilities"
        )
    if cache.kind == "top_k" and cache.truncated_mass > MAX_TRUNCATED_MASS:
        return f"{cache.truncated_mass:.0%} of the mass is outside its {TOP_K_IDS} ids"
    return ""
