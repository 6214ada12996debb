"""The plan of a generation: tokens, FLOP, memory of the KV cache, time and size of the data set."""

from dataclasses import dataclass

import torch

from ..core.defaults import GENERATION_PROMPT_TOKENS, GPU_BANDWIDTH_TB_PER_SECOND, SAMPLES_PER_TOKEN, TOP_K_IDS
from ..core.references import reference_kind
from ..data.load import load_columns
from ..recipe.generation import Generation
from ..recipe.schema import Recipe
from ..runner.generated_sources import generation_rows, seed_of
from .cache_size import kinds_of
from .flops import Flops
from .memory import weight_bytes
from .model_stats import ModelStats

# Measured on the English Python documentation, with the tokenizer of SmolLM2 and parquet files as `generate` writes.
_BYTES_PER_TOKEN = 4.1
_PARQUET_SHARE = 0.5  # compressed / uncompressed


@dataclass(frozen=True)
class GenerationRates:
    """Rates and lengths of a generation that are not in a recipe.

    prompts:           number of prompts; None: `max_prompts`, or the number of rows of files and packaged texts
    prompt_tokens:     mean tokens of a prompt
    completion_tokens: mean tokens of a completion; None: `max_new_tokens`, the largest number
    bandwidth:         memory bandwidth of a GPU in TB/s
    tokens_per_second: rate at which a server generates; None if it is not known
    """

    prompts: int | None = None
    prompt_tokens: int = GENERATION_PROMPT_TOKENS
    completion_tokens: int | None = None
    bandwidth: float = GPU_BANDWIDTH_TB_PER_SECOND
    tokens_per_second: float | None = None

    def problems(self) -> list[str]:
        """List the values that are out of range."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        return [f"{name} is {value:g}; it must be above 0." for name, value in values.items() if value <= 0]


@dataclass(frozen=True)
class LocalGeneration:
    """A generation with the teacher in this process, on one GPU.

    prefill_flop:      FLOP of reading the prompts, each sample its own
    decoding_flop:     FLOP of the forwards that generate the further tokens
    weights:           bytes of the teacher's weights
    kv_bytes:          bytes of the KV cache for each token of the context
    sequences:         number of sequences that are generated at the same time: `batch_size`, or what fits
    fitting:           number of sequences that fit into the memory beside the weights
    kv_cache:          bytes of the KV cache of `sequences` at their full length
    tokens_per_second: upper bound of decoding, from the bandwidth and the peak of the GPU
    hours:             lower bound of the whole generation; None where nothing fits
    is_memory_bound:   whether the bandwidth limits decoding, and not the FLOP
    """

    prefill_flop: float
    decoding_flop: float
    weights: int
    kv_bytes: int
    sequences: int
    fitting: int
    kv_cache: int
    tokens_per_second: float
    hours: float | None
    is_memory_bound: bool


@dataclass(frozen=True)
class GenerationPlan:
    """The generation of a recipe.

    backend:           backend of the recipe
    prompts:           number of prompts, or 1,000 where it is unknown
    is_known:          whether the number of prompts is known
    samples:           completions of each prompt
    prompt_tokens:     mean tokens of a prompt
    completion_tokens: mean tokens of a completion
    is_upper_bound:    whether `completion_tokens` is the largest number, `max_new_tokens`
    tokens:            tokens to generate
    disk:              bytes of the folder, before filters: the data set, and all completions
    cache:             bytes of the teacher cache, before filters, and of the recorded distributions; 0 without `cache`
    local:             None for a server
    server_hours:      hours at the given rate; None without a rate, and for other backends
    """

    backend: str
    prompts: int
    is_known: bool
    samples: int
    prompt_tokens: int
    completion_tokens: int
    is_upper_bound: bool
    tokens: int
    disk: float
    cache: float
    local: LocalGeneration | None
    server_hours: float | None


def plan_generation(
    recipe: Recipe, teacher: ModelStats, rates: GenerationRates, usable: int, speed: float
) -> GenerationPlan | None:
    """Plan the generation of a recipe; None if it has no section `generate` and no source with `generate: true`.

    Args:
        recipe: the recipe.
        teacher: the teacher.
        rates: what the recipe does not say.
        usable: bytes of a GPU that may be used.
        speed: FLOP/s of a GPU.
    """
    if recipe.generate is None and not recipe.data.generated:
        return None
    options = recipe.generate or Generation.model_validate({})
    num_prompts = rates.prompts or count_prompts(recipe, options)
    prompts, length = num_prompts or 1000, rates.completion_tokens or options.max_new_tokens
    requests = prompts * options.samples
    text = requests * (rates.prompt_tokens + 2 * length)  # the folder has the data set and all completions
    hours = None
    if options.backend == "server" and rates.tokens_per_second:
        hours = requests * length / rates.tokens_per_second / 3600
    return GenerationPlan(
        backend=options.backend,
        prompts=prompts,
        is_known=num_prompts is not None,
        samples=options.samples,
        prompt_tokens=rates.prompt_tokens,
        completion_tokens=length,
        is_upper_bound=rates.completion_tokens is None,
        tokens=requests * length,
        disk=text * _BYTES_PER_TOKEN * _PARQUET_SHARE,
        cache=requests * length * _cache_bytes(teacher, options, rates.prompt_tokens + length),
        local=None
        if options.backend == "server"
        else _plan_local(recipe, teacher, options, requests, (rates.prompt_tokens, length), rates, usable, speed),
        server_hours=hours,
    )


def _cache_bytes(teacher: ModelStats, options: Generation, length: int) -> float:
    """Return the bytes that `generate.cache` takes for each token: the cache, and what was recorded for it.

    Args:
        teacher: the teacher.
        options: the section `generate`.
        length: tokens of a row.
    """
    if options.cache is None:
        return 0.0
    kinds = {kind.kind: kind.bytes_per_token for kind in kinds_of(teacher.vocab, teacher.hidden, length)}
    k = options.k or TOP_K_IDS
    if options.cache == "top_k":
        return kinds["top_k"] * k / TOP_K_IDS + 8 * k  # an id and a log-probability in 4 bytes each
    share = (options.samples_per_token or SAMPLES_PER_TOKEN) / SAMPLES_PER_TOKEN if options.cache == "sampled" else 1
    return kinds[options.cache] * share + teacher.hidden * teacher.dtype.itemsize


def count_prompts(recipe: Recipe, options: Generation) -> int | None:
    """Return the number of prompts: of sources with `generate: true` if there are any, else of all sources.

    Returns:
        The number. Data on the Hub is not downloaded: None without `max_prompts`.

    Raises:
        DistillError: a local source cannot be read.
    """
    total = 0
    for name in recipe.data.generated or recipe.data.sources:
        source = recipe.data.sources[name]
        if reference_kind(source.path) in ("id", "address"):
            if options.max_prompts is None:
                return None
            total += options.max_prompts
            continue
        count = len(load_columns(source.path, source.split, source.name))
        numbers = generation_rows(recipe, count, seed_of(recipe)) if source.generate else range(count)
        total += len(numbers[: options.max_prompts])
    return total


def generation_flop(stats: ModelStats, prompt: int, completion: int) -> tuple[float, float]:
    """Return the FLOP of reading a prompt and of generating a completion.

    The output head runs on the last token of the prompt, which gives the first token. Each further token is a forward
    of one token that attends to all tokens before it and to itself.

    Args:
        stats: the model.
        prompt: tokens of the prompt, P.
        completion: tokens of the completion, C.

    Returns:
        P * (blocks + attention at length P) + head, and the sum over j = 1 ... C - 1 of
        (blocks + head + attention at length P + j).
    """
    flops = Flops.of(stats, 1)  # attention for each token of the context
    steps = completion - 1
    prefill = prompt * (flops.blocks + prompt * flops.attention) + flops.head
    contexts = steps * prompt + steps * (steps + 1) / 2
    return prefill, steps * (flops.blocks + flops.head) + contexts * flops.attention


def kv_cache_bytes(stats: ModelStats, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values of one token of the context, in all layers."""
    return 2 * stats.depth * stats.kv_heads * stats.head_dim * dtype.itemsize


def _plan_local(
    recipe: Recipe,
    teacher: ModelStats,
    options: Generation,
    requests: int,
    lengths: tuple[int, int],
    rates: GenerationRates,
    usable: int,
    speed: float,
) -> LocalGeneration:
    spec, (prompt, completion) = recipe.primary_teacher, lengths
    dtype = teacher.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype)
    prefill, decoding = generation_flop(teacher, prompt, completion)
    weights = weight_bytes(teacher, dtype.itemsize, spec.quantization or "full")
    kv = kv_cache_bytes(teacher, dtype)
    fitting = max(usable - weights, 0) // (kv * (prompt + completion))
    sequences = max(1, min(options.batch_size, requests, fitting))
    # A step reads the weights that one token or many tokens need, and the cache of each sequence at its mean length.
    read = weights - _unread(teacher, dtype.itemsize) + sequences * kv * (prompt + completion / 2)
    seconds = {
        "memory": read / (rates.bandwidth * 1e12),
        "compute": sequences * decoding / max(completion - 1, 1) / speed,
    }
    pace = sequences / max(seconds.values())
    hours = (requests * prefill / speed + requests * completion / pace) / 3600
    return LocalGeneration(
        prefill_flop=requests * prefill,
        decoding_flop=requests * decoding,
        weights=weights,
        kv_bytes=kv,
        sequences=sequences,
        fitting=fitting,
        kv_cache=sequences * kv * (prompt + completion),
        tokens_per_second=pace,
        hours=hours if fitting else None,
        is_memory_bound=seconds["memory"] >= seconds["compute"],
    )


def _unread(stats: ModelStats, itemsize: int) -> int:
    """Return the bytes of the input embeddings, of which a step reads a few rows; 0 if they are the output head."""
    return 0 if stats.tied else min(stats.head, stats.outside) * itemsize
