"""Sentences that show the plan of a generation in a terminal."""

from .generation import GenerationPlan, LocalGeneration
from .render import bytes_text, number_text


def generation_lines(generation: GenerationPlan | None, mfu: float) -> list[str]:
    """Say what a generation costs; nothing where a recipe has none.

    Args:
        generation: the generation of a plan.
        mfu: share of the peak that the plan assumes.
    """
    if generation is None:
        return []
    at_most = "at most " if generation.is_upper_bound else ""
    unknown = "" if generation.is_known else " (of an unknown number: pass --prompts)"
    completions = "completion" if generation.samples == 1 else "completions"
    lines = [
        "",
        f"Generation with backend {generation.backend}: {generation.prompts:,} prompts{unknown} of "
        f"{generation.prompt_tokens:,} tokens (--prompt-tokens), {generation.samples} {completions} each of {at_most}"
        f"{generation.completion_tokens:,} tokens (--completion-tokens): {at_most}{generation.tokens:.3g} tokens to "
        "generate",
    ]
    if generation.local:
        lines += _local(generation.local, mfu)
    elif generation.server_hours is None:
        lines.append("Time: pass the rate of the server with --tokens-per-second")
    else:
        lines.append(f"Time: {number_text(generation.server_hours)} hours at the rate of the server")
    cache = f", and {bytes_text(round(generation.cache))} for the teacher cache" if generation.cache else ""
    disk = bytes_text(round(generation.disk))
    lines.append(f"Size: about {disk} on the disk, before filters, for English text{cache}")
    return lines


def _local(local: LocalGeneration, mfu: float) -> list[str]:
    flop = f"{local.prefill_flop:.3g} FLOP to read the prompts, {local.decoding_flop:.3g} FLOP to generate"
    memory = (
        f"Memory: {bytes_text(local.weights)} of weights and {bytes_text(local.kv_bytes)} of KV cache per token; "
        f"{local.fitting:,} sequences fit on a GPU"
    )
    if local.hours is None:
        return [flop, f"{memory}: shard the teacher with teacher.device_map, or use a server"]
    limit = "memory bandwidth" if local.is_memory_bound else f"{mfu:.0%} of the peak"
    return [
        flop,
        f"{memory}. {local.sequences:,} at a time take {bytes_text(local.kv_cache)} of cache",
        f"Time: {number_text(local.hours)} hours on 1 GPU at the upper bound of {local.tokens_per_second:,.0f} "
        f"tokens/s, which {limit} sets. Real rates are lower, for small models by far: generate.max_prompts=200 "
        "measures them",
    ]
