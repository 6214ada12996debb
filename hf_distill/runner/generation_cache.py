"""Writes the teacher cache of a generated data set from the distributions that the teacher predicted meanwhile."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..cache import Manifest, write_cache
from ..cache.api import ServedTeacher, TeacherName
from ..core.defaults import SAMPLES_PER_TOKEN, TOP_K_IDS
from ..core.json_types import JSONObject
from ..core.logits import LazyLogits
from ..core.results import ServerFacts
from ..core.targets import Targets
from ..core.teacher_inputs import teacher_inputs
from ..errors import DistillError, raise_if_any
from ..generation.backends.local_scores import LocalScorer
from ..generation.generated_teacher import Coverage, GeneratedTeacher
from ..generation.store import CompletionStore
from ..generation.token_signals import Capture, SignalIndex
from ..losses import get_loss
from ..recipe.generation import Generation
from ..recipe.load import validate
from ..recipe.models import TeacherSpec
from ..recipe.schema import Recipe
from ..teachers import FrozenTeacher
from ..teachers.remote.api import RowTensors, TokenRow
from ..teachers.remote.rows import token_rows
from .datasets import PreparedData, num_training_rows
from .model_loading import load_pretrained, model_without_weights, resolve_model
from .tasks import task_of
from .teacher_only import with_teacher
from .training_arguments import arguments

logger = logging.get_logger(__name__)
CACHE = "cache"  # folder of the teacher cache in that of the data set
_OPTIONS_OF_PROMPTS = ("split", "name", "column", "streaming")  # of data.task, which the data set does not need
_MANY_OTHER_TOKENS = 0.1  # share of target tokens that need another forward, above which a warning is logged


@dataclass(frozen=True)
class CacheSource:
    """The source of the distributions of a teacher cache.

    spec:       the teacher, as the manifest of the cache records it
    tokenizer:  the student's tokenizer, which the training uses
    capture:    what the backend records
    score:      computes distributions at positions of rows that were not generated
    vocab_size: V of the teacher
    model:      the teacher, if it is in this process
    head:       its output head, if hidden states are recorded
    facts:      what the manifest records of a teacher that is no model of this process
    """

    spec: TeacherSpec
    tokenizer: PreTrainedTokenizerBase
    capture: Capture
    score: Callable[[Sequence[TokenRow]], list[RowTensors]]
    vocab_size: int
    model: nn.Module | None = None
    head: LazyLogits | None = None
    facts: ServerFacts | None = None


def capture_of(recipe: Recipe, options: Generation) -> Capture | None:
    """Return what a generation records for its teacher cache; None if it writes none.

    Raises:
        DistillError: The recipe cannot be trained from such a cache.
    """
    if options.cache is None:
        return None
    problems, temperature = [], recipe.distill.soft_temperature or 1.0
    if recipe.on_policy:
        problems.append("an on-policy recipe trains on completions of the student, which no cache holds")
    if recipe.is_cross_tokenizer:
        problems.append(
            "distill.cross_tokenizer is set, and the distributions are those of the student's tokens: write the cache "
            "with `hf-distill cache write` after the generation"
        )
    if features := sorted({spec.name for spec in recipe.losses if get_loss(spec.name).feature}):
        problems.append(
            f"{', '.join(features)} compares features of further layers, which are not recorded: write the cache with "
            "`hf-distill cache write` after the generation, or remove the loss"
        )
    if options.backend != "transformers" and temperature != 1:
        problems.append(
            f"distill.temperature is {temperature:g}, and backend {options.backend} returns log-probabilities at "
            "temperature 1: set distill.temperature to 1, or use backend transformers"
        )
    raise_if_any([f"generate.cache: {problem}" for problem in problems])
    if options.cache == "top_k":
        return Capture("top_k", options.k or TOP_K_IDS, temperature)
    return Capture("hidden", 0)


def student_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer with which the training tokenizes the data set."""
    return cast(PreTrainedTokenizerBase, task_of(recipe).load_processor())


def local_source(
    recipe: Recipe,
    spec: TeacherSpec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    capture: Capture,
    batching: str,
) -> CacheSource:
    """Return the source of a teacher in this process.

    Args:
        recipe: The recipe.
        spec: Its teacher.
        model: The loaded teacher.
        tokenizer: Its tokenizer.
        prompt: Token ids of any prompt, with which the output head is measured.
        capture: What is recorded.
        batching: How the backend batches: continuous or padded.

    Raises:
        DistillError: The teacher cannot teach the student, or its hidden states cannot be recorded.
    """
    of_student = student_tokenizer(recipe)
    path = resolve_model(recipe.tokenizer_model)
    config = load_pretrained(AutoConfig, path, revision=recipe.tokenizer_revision)
    student = model_without_weights(AutoModelForCausalLM, config)
    teacher = FrozenTeacher(model, processing_class=tokenizer)
    teacher.prepare(student, model.device, of_student)
    scorer = LocalScorer(teacher, capture, model.device)
    head = None
    if capture.values == "hidden":
        head = scorer.output_head(prompt)
        if batching == "continuous" and not cast(Any, model)._supports_logits_to_keep():
            raise DistillError(
                f"generate.cache: {type(model).__name__} computes the logits of all tokens, so that continuous "
                "batching cannot record its hidden states: set generate.batching to padded, or generate.cache to top_k."
            )
    weight = cast(torch.Tensor, cast(nn.Module, model.get_output_embeddings()).weight)
    return CacheSource(spec, of_student, capture, scorer, len(weight), model, head)


def write_generated_cache(
    recipe: Recipe,
    options: Generation,
    source: CacheSource,
    store: CompletionStore,
    on_stage: Callable[[str], None],
) -> tuple[Manifest, Coverage]:
    """Write the teacher cache of the rows that a run of the recipe trains and evaluates on with the data set.

    Args:
        recipe: The recipe.
        options: Its section `generate`.
        source: Where the distributions come from.
        store: The data set, which is complete.
        on_stage: Called with a short description of each stage when it begins.

    Returns:
        The manifest of the cache, and how many of its target tokens have a distribution of the generation.
    """
    values = _training_values(recipe, source.spec, store.folder)
    training = validate(values)
    args = arguments(training)
    data = task_of(training).prepare_data(source.tokenizer, args.seed, num_training_rows(args))
    index = SignalIndex(store.signal_files())
    coverage = _measure_coverage(index, data)
    on_stage(
        f"Writing the teacher cache: {coverage.tokens:,} target tokens from the generation, "
        f"{coverage.other_tokens:,} from another forward of the teacher"
    )
    if coverage.other_tokens > _MANY_OTHER_TOKENS * (coverage.tokens + coverage.other_tokens):
        logger.warning(
            f"{coverage.other_rows:,} rows of the teacher cache need another forward of the teacher, because their "
            "tokens are not those that were generated after the same prompt: system_prompt, reasoning, the chat "
            "template of the student or rows that were not generated (data.eval.path, further sources) can be reasons."
        )
    teacher = GeneratedTeacher(
        index, source.score, source.vocab_size, source.model, source.head, source.capture.temperature
    )
    kind_options: dict[str, Any] = {"kind": options.cache, "temperature": recipe.distill.soft_temperature or 1.0}
    kind_options |= {"k": options.k or TOP_K_IDS, "samples_per_token": options.samples_per_token or SAMPLES_PER_TOKEN}
    manifest = write_cache(
        store.folder / CACHE,
        teacher,
        data.train,
        data.held_out,
        collator=data.collator,
        processing_class=source.tokenizer,
        batch_size=args.per_device_train_batch_size,
        device=None if source.model is None else next(source.model.parameters()).device,
        teacher_name=_teacher_name(source),
        recipe=values,
        served=None if source.facts is None else ServedTeacher(source.vocab_size, source.facts),
        replaces_other=True,
        **kind_options,
    )
    return manifest, coverage


def _training_values(recipe: Recipe, spec: TeacherSpec, folder: Path) -> JSONObject:
    """Return the values of a recipe that trains on a data set: `data.task.path` is its folder."""
    values = with_teacher(recipe, spec)
    data = cast(JSONObject, values["data"])
    task = cast(JSONObject, data["task"])
    kept: JSONObject = {name: value for name, value in task.items() if name not in _OPTIONS_OF_PROMPTS}
    return values | {"data": {**data, "task": {**kept, "path": str(folder)}}}


def _measure_coverage(index: SignalIndex, data: PreparedData) -> Coverage:
    """Count the target tokens of all different rows that have a distribution of the generation."""
    coverage, seen = Coverage(), set[bytes]()
    for part in (data.train, data.held_out):
        for number in range(len(part)):
            batch = teacher_inputs(data.collator([part[number]]))
            for row in token_rows(batch, Targets.from_batch(batch, shift=True)):
                key = hashlib.blake2b(repr(row).encode(), digest_size=16).digest()
                if key not in seen:
                    seen.add(key)
                    coverage = coverage.add(index.count(row), len(row.positions))
    return coverage


def _teacher_name(source: CacheSource) -> TeacherName | None:
    if source.facts is not None:
        return None
    spec = source.spec
    return {"model": spec.model, "revision": spec.revision, "quantization": spec.quantization}
