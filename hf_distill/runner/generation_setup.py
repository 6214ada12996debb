"""Prepares what generates a data set: the backend, the prompts that it can complete, and what its cache needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..cache.fingerprints import weights_fingerprint
from ..core.defaults import CONCURRENT_REQUESTS, REQUEST_TIMEOUT_SECONDS, RETRY_SECONDS
from ..core.devices import default_device
from ..core.json_types import JSONObject
from ..data.training_templates import training_template
from ..errors import DistillError
from ..generation.backends.api import Backend
from ..generation.backends.local import TransformersBackend
from ..generation.backends.server import ServerBackend
from ..generation.backends.server_capture import ServerCapture
from ..generation.backends.vllm import VLLMBackend
from ..generation.completion import Prompt, Request, SamplingSettings
from ..generation.prompts import PromptRenderer, SourceRow, with_system_prompt
from ..generation.reasoning import ends_with_open_tag
from ..generation.token_signals import Capture
from ..recipe.generation import Generation
from ..recipe.load import validate
from ..recipe.models import TeacherSpec
from ..recipe.schema import Recipe
from ..teachers.loading import direct_loading, dtype_of, quantization_config
from ..teachers.remote.pool import ServerPool
from .generation_cache import CacheSource, local_source, student_tokenizer
from .model_loading import check_and_pin, load_pretrained, resolve_model, trust_options, vocabulary_size
from .teacher_only import static_teacher_spec, with_teacher

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Setup:
    """The prompts of a generation, and the backend that completes them.

    sources: prompts that fit into the context
    opened:  index of a prompt -> whether its rendered text ends with the first tag of reasoning
    backend: the backend
    cache:   where the distributions of the teacher cache come from; None if none is written
    """

    sources: Sequence[SourceRow]
    opened: Mapping[int, bool]
    backend: Backend
    cache: CacheSource | None


def _settings(options: Generation) -> SamplingSettings:
    return SamplingSettings(
        options.temperature, options.top_p, options.max_new_tokens, tuple(options.stop), options.log_probs
    )


def server_setup(recipe: Recipe, options: Generation, sources: Sequence[SourceRow], capture: Capture | None) -> Setup:
    """Connect to the servers; a teacher cache needs prompts as token ids of the student's tokenizer."""
    if options.url is None:
        raise DistillError("generate.backend server needs a URL: pass generate.url=http://HOST:PORT.")
    pool = ServerPool(
        options.url,
        timeout=options.timeout or REQUEST_TIMEOUT_SECONDS,
        retry_seconds=RETRY_SECONDS if options.retry_seconds is None else options.retry_seconds,
        concurrency=options.concurrency or CONCURRENT_REQUESTS,
        api_key_env=options.api_key_env,
    )
    variables = options.chat_template_kwargs
    backend = ServerBackend(pool, options.model, _settings(options), options.reasoning_tags, variables)
    if capture is None:
        return Setup(sources, {}, backend, None)
    spec = TeacherSpec.model_validate(
        {"kind": "remote", "url": options.url, "model": backend.model, "top_k": capture.k}
    )
    training = validate(with_teacher(recipe, spec))
    tokenizer = student_tokenizer(training)
    vocab_size = vocabulary_size(training.tokenizer_model, training.tokenizer_revision)
    rendered = _render(recipe, options, sources, tokenizer)
    served = ServerCapture(pool, backend.model, capture, vocab_size, rendered.encode)
    served.check(tokenizer)
    backend.capture = served
    cache = CacheSource(spec, tokenizer, capture, served.score, vocab_size, facts=served.facts())
    return Setup(sources, rendered.opened, backend, cache)


@dataclass(frozen=True)
class _Rendered:
    """Prompts as the model reads them.

    ids:    index of a prompt -> its token ids
    opened: index of a prompt -> whether its text ends with the first tag of reasoning
    """

    ids: Mapping[int, list[int]]
    opened: Mapping[int, bool]

    def encode(self, request: Request) -> list[int]:
        return self.ids[request.prompt.index]


def _render(
    recipe: Recipe, options: Generation, sources: Sequence[SourceRow], tokenizer: PreTrainedTokenizerBase
) -> _Rendered:
    """Render the prompts with the chat template of the recipe, or that of the tokenizer."""
    template = None if recipe.data.chat_template is None else training_template(recipe.data.chat_template)
    renderer = PromptRenderer(tokenizer, template, options.chat_template_kwargs)
    prompts = {row.prompt.index: with_system_prompt(row.prompt, options.system_prompt) for row in sources}
    return _Rendered(
        {index: renderer.ids(prompt) for index, prompt in prompts.items()},
        {index: _is_open(renderer, prompt, options) for index, prompt in prompts.items()},
    )


def local_setup(
    recipe: Recipe,
    options: Generation,
    sources: Sequence[SourceRow],
    capture: Capture | None,
    on_stage: Callable[[str], None],
) -> Setup:
    """Load the teacher, and keep the prompts that fit into its context."""
    spec = static_teacher_spec(recipe)
    if spec.deepspeed or spec.fsdp:
        raise DistillError("`hf-distill generate` does not shard the teacher: use teacher.device_map, or a server.")
    path = resolve_model(str(spec.loaded_model))
    tokenizer = load_pretrained(AutoTokenizer, str(spec.loaded_model), revision=spec.revision)
    config = load_pretrained(AutoConfig, str(spec.loaded_model), revision=spec.revision)
    rendered = _render(recipe, options, sources, tokenizer)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    further = 0 if capture is None else 1  # the end-of-text token that is read after a completion that is cut off
    lengths = {index: len(each) + further for index, each in rendered.ids.items()}
    fitting_sources = _fitting(sources, lengths, context, options)
    identity: JSONObject = {"model": str(spec.loaded_model), "revision": spec.revision, "dtype": spec.dtype}
    identity["quantization"] = spec.quantization
    on_stage(f"Loading {spec.loaded_model}")
    settings, encode = _settings(options), rendered.encode
    if options.backend == "vllm":
        engine = _vllm_options(spec, path, options)
        identity["revision"] = engine["revision"]
        vocab_size = int(config.get_text_config().vocab_size)
        vllm = VLLMBackend(path, engine, encode, settings, identity, capture, vocab_size)
        source = None
        if capture is not None:
            of_student = student_tokenizer(recipe)
            source = CacheSource(spec, of_student, capture, vllm.score, vocab_size, facts=vllm.facts())
        return Setup(fitting_sources, rendered.opened, vllm, source)
    model = _load_model(spec, config)
    identity["weights"] = weights_fingerprint(model)
    backend = TransformersBackend(
        model, tokenizer, encode, settings, options.batching, options.batch_size, identity, capture
    )
    source = None
    if capture is not None:
        prompt = rendered.ids[fitting_sources[0].prompt.index]
        source = local_source(recipe, spec, model, tokenizer, prompt, capture, backend.batching)
    return Setup(fitting_sources, rendered.opened, backend, source)


def _vllm_options(spec: TeacherSpec, path: str, options: Generation) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`: the commit that was checked, and the weights and code that the policy allows.

    Raises:
        DistillError: The recipe sets an option of the teacher that vLLM does not get, or the policy does not allow the
            files of the model.
    """
    if unused := [name for name in ("quantization", "device_map", "attn_implementation") if getattr(spec, name)]:
        raise DistillError(
            f"generate.backend vllm does not use teacher.{', teacher.'.join(unused)}: remove it, or use backend "
            "transformers."
        )
    policy = trust_options()
    formats = {"load_format": "safetensors"} if policy.get("use_safetensors") else {}
    return {
        **{"revision": spec.revision, "dtype": spec.dtype, "max_num_seqs": options.batch_size},
        **{"trust_remote_code": policy["trust_remote_code"], **formats},
        **check_and_pin(path, spec.revision, weights=False),
    }


def _is_open(renderer: PromptRenderer, prompt: Prompt, options: Generation) -> bool:
    return not isinstance(prompt.content, str) and ends_with_open_tag(renderer.text(prompt), options.reasoning_tags)


def _fitting(
    sources: Sequence[SourceRow], lengths: Mapping[int, int], context: int | None, options: Generation
) -> list[SourceRow]:
    """Return the prompts that fit into the context together with their completions.

    Raises:
        DistillError: Some do not fit and `overflow` is error, or none fits.
    """
    limit = None if context is None else context - options.max_new_tokens
    long = [row for row in sources if limit is not None and lengths[row.prompt.index] > limit]
    if not long:
        return list(sources)
    first = long[0].prompt
    text = (
        f"{len(long):,} of {len(sources):,} prompts do not fit into the context of {context:,} tokens together with "
        f"generate.max_new_tokens = {options.max_new_tokens:,}; the first is data.{first.source}, row {first.row} "
        f"(counted from 0), with {lengths[first.index]:,} tokens"
    )
    if len(long) == len(sources):  # none would be left
        raise DistillError(f"{text}. Lower max_new_tokens, or use shorter prompts.")
    if options.overflow == "error":
        raise DistillError(f"{text}. Lower max_new_tokens, or set generate.overflow to drop, which leaves them out.")
    logger.warning(f"{text}. They are left out.")
    left_out = {row.prompt.index for row in long}
    return [row for row in sources if row.prompt.index not in left_out]


def _load_model(spec: TeacherSpec, config: Any) -> PreTrainedModel:
    """Load the teacher on the accelerator of this machine, if it has one."""
    device = default_device()
    options: dict[str, object] = {"revision": spec.revision, "attn_implementation": spec.attn_implementation}
    options = {name: value for name, value in options.items() if value is not None}
    options |= {"device_map": spec.device_map} if spec.device_map else direct_loading(device)
    if spec.quantization:
        options["quantization_config"] = quantization_config(spec.quantization, dtype_of(config, {"dtype": spec.dtype}))
    model = load_pretrained(AutoModelForCausalLM, str(spec.loaded_model), dtype=spec.dtype, **options)
    if not (spec.device_map or spec.quantization):
        cast(nn.Module, model).to(device)
    return model
