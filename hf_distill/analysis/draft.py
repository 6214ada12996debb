"""Speculative decoding: how good a student is as the draft model of its teacher."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from ..cache.sampling import blocks_of
from ..core import run_files
from ..core.defaults import DRAFT_NEW_TOKENS, DRAFT_PROMPTS, DRAFTED_TOKENS, HELD_OUT_TOKENS, PROMPT_TOKENS
from ..core.io import write_json
from ..errors import DistillError
from ..recipe.schema import Recipe
from ..runner.run_results import Run
from .model_pair import ModelPair
from .run_models import RunModels, prompt_length

DRAFTS = ("before", "student", "control")


@dataclass(frozen=True)
class DraftScore:
    """Measurements of a draft model.

    parameters:        number of its parameters
    acceptance_rate:   mean over held-out tokens of sum_v min(p_v, q_v) at T = 1: the probability that the teacher
                       accepts a drafted token when it samples
    accepted_tokens:   mean number of drafted tokens that the teacher accepts in one of its forward passes, greedy
    tokens_per_second: of the teacher with the draft model, greedy
    speedup:           seconds of the teacher alone / seconds with the draft model, of the same prompts
    equal_outputs:     share of the prompts for which the teacher generates the same tokens with and without the draft
                       model; rounding may change a token where two are almost equally likely
    """

    parameters: int
    acceptance_rate: float
    accepted_tokens: float
    tokens_per_second: float
    speedup: float
    equal_outputs: float


@dataclass(frozen=True)
class DraftMeasurement:
    """Scores of draft models.

    teacher_parameters:        number of the teacher's parameters
    teacher_tokens_per_second: of the teacher alone, greedy, one prompt at a time
    drafted_tokens:            number of tokens that are drafted for each forward pass of the teacher
    prompts, new_tokens:       number of prompts, and the largest number of tokens that are generated for each
    drafts:                    name -> `DraftScore`
    """

    teacher_parameters: int
    teacher_tokens_per_second: float
    drafted_tokens: int
    prompts: int
    new_tokens: int
    drafts: dict[str, DraftScore]


@dataclass
class _Decoding:
    """Sums over the prompts: seconds and tokens of the teacher alone, and with a draft model."""

    alone_seconds: float = 0.0
    alone_tokens: int = 0
    seconds: float = 0.0
    tokens: int = 0
    forwards: int = 0
    equal: int = 0


def measure_drafts(
    pair: ModelPair,
    drafts: Mapping[str, Callable[[], nn.Module]],
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int = DRAFT_NEW_TOKENS,
    drafted_tokens: int = DRAFTED_TOKENS,
    held_out_tokens: int = HELD_OUT_TOKENS,
) -> DraftMeasurement:
    """Measure draft models of a teacher: acceptance rates, accepted tokens, and the speed of greedy decoding.

    The teacher generates with `generate(assistant_model=...)` of transformers, one prompt at a time; the same prompt is
    decoded with and without a draft model in turn.

    Args:
        pair: the teacher, with the held-out rows for the acceptance rate.
        drafts: name -> function that loads a draft model; one is in memory at a time.
        prompts: ids of the prompts.
        new_tokens: largest number of tokens that are generated for each prompt.
        drafted_tokens: number of tokens that are drafted for each forward pass of the teacher.
        held_out_tokens: number of target tokens for the acceptance rate.

    Raises:
        DistillError: there is no prompt or no teacher, a number is below 1, the teacher has another tokenizer or
            vocabulary than a draft model, or transformers cannot decode the teacher with a draft model.

    Source: speculative decoding, arXiv 2211.17192; distilled draft models, arXiv 2310.08461.
    """
    if not prompts or not all(prompts) or min(new_tokens, drafted_tokens) < 1:
        raise DistillError(
            f"There are {len(prompts)} prompts, new_tokens is {new_tokens} and drafted_tokens is {drafted_tokens}: "
            "give at least one prompt, no empty one, and numbers of at least 1. The prompts of a run are those of the "
            "held-out rows (data.eval)."
        )
    if pair.teacher is None:
        raise DistillError("There is no teacher to decode with: give the pair a teacher.")
    teacher = cast(PreTrainedModel, pair.teacher)
    scores, alone = {}, _Decoding()
    for name, load in drafts.items():
        draft = cast(PreTrainedModel, load())
        _check_vocabulary(teacher, draft, name)
        decoding = _decode(teacher, draft, prompts, new_tokens, drafted_tokens)
        alone.seconds, alone.tokens = alone.seconds + decoding.alone_seconds, alone.tokens + decoding.alone_tokens
        scores[name] = DraftScore(
            parameters=draft.num_parameters(),
            acceptance_rate=_acceptance_rate(pair.with_student(draft), held_out_tokens),
            accepted_tokens=decoding.tokens / decoding.forwards - 1,
            tokens_per_second=decoding.tokens / decoding.seconds,
            speedup=decoding.alone_seconds / decoding.seconds,
            equal_outputs=decoding.equal / len(prompts),
        )
    per_second = alone.tokens / alone.seconds if alone.seconds else float("nan")
    return DraftMeasurement(teacher.num_parameters(), per_second, drafted_tokens, len(prompts), new_tokens, scores)


def measure_drafts_of(
    run: Run,
    prompts: int = DRAFT_PROMPTS,
    new_tokens: int = DRAFT_NEW_TOKENS,
    drafted_tokens: int = DRAFTED_TOKENS,
    on_stage: Callable[[str], None] = lambda text: None,
) -> DraftMeasurement:
    """Measure the student of a run as the draft model of its teacher, and write RUN/draft.json.

    The initial student and the control of the run are measured too.

    Args:
        run: see `open_run`.
        prompts: number of held-out rows whose prompts are completed, at equal distances.
        new_tokens: see `measure_drafts`.
        drafted_tokens: see `measure_drafts`.
        on_stage: called with a short description of each stage as it begins.

    Returns:
        accepted tokens and speed of each model of the run as a draft model.

    Raises:
        DistillError: see `ModelPair.of_run`, `measure_drafts`.
    """
    _check_recipe(run.recipe)
    models = RunModels.of_run(run, on_stage)
    pair = models.pair
    stride = max(1, len(pair.rows) // max(prompts, 1))
    rows = [pair.rows[i * stride] for i in range(min(prompts, len(pair.rows)))]
    texts = [models.prompt_ids("teacher", row, prompt_length(row, PROMPT_TOKENS)) for row in rows]

    def load(name: str) -> nn.Module:
        on_stage(f"{name}: drafting {drafted_tokens} tokens for each forward pass of the teacher")
        return models.load(name)

    drafts = {name: partial(load, name) for name in DRAFTS if name != "control" or run.has("control")}
    result = measure_drafts(pair, drafts, texts, new_tokens=new_tokens, drafted_tokens=drafted_tokens)
    write_json(run.folder / run_files.DRAFT, asdict(result))
    return result


def _check_recipe(recipe: Recipe) -> None:
    """Check that the student of a recipe has the ids of its teacher, before a model is loaded."""
    if recipe.is_cross_tokenizer:
        raise DistillError(
            "The teacher of this run has another tokenizer than the student (distill.cross_tokenizer). A draft model "
            "proposes ids of the teacher's vocabulary, so it must have the teacher's tokenizer."
        )
    if recipe.student.from_teacher is not None and recipe.student.from_teacher.vocab is not None:
        raise DistillError(
            "The student of this run has a trimmed vocabulary (student.from_teacher.vocab), and a draft model proposes "
            "ids of the teacher's full vocabulary. Train a student without student.from_teacher.vocab."
        )


def _check_vocabulary(teacher: PreTrainedModel, draft: PreTrainedModel, name: str) -> None:
    sizes = [model.config.get_text_config().vocab_size for model in (teacher, draft)]
    if sizes[0] != sizes[1]:
        raise DistillError(
            f"The teacher has {sizes[0]:,} ids and the draft model ({name}) has {sizes[1]:,}: a draft model proposes "
            "ids of the teacher's vocabulary. Train a student without a trimmed vocabulary."
        )


@torch.no_grad()
def _acceptance_rate(pair: ModelPair, tokens: int) -> float:
    """Return the mean over held-out target tokens of sum_v min(p_v, q_v)."""
    total, count = 0.0, 0
    for batch in pair.batches(tokens):
        assert batch.student is not None
        assert batch.teacher is not None
        blocks = zip(blocks_of(batch.teacher), blocks_of(batch.student), strict=True)
        for (_, teacher_logits), (_, student_logits) in blocks:
            total += float(torch.minimum(teacher_logits.softmax(-1), student_logits.softmax(-1)).sum())
        count += len(batch.targets)
    return total / count


def _decode(
    teacher: PreTrainedModel, draft: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int, drafted: int
) -> _Decoding:
    """Decode every prompt with the teacher alone and with the draft model, after a warm-up with the first prompt."""
    sums, settings = _Decoding(), draft.generation_config
    draft.generation_config = _constant_number_of_drafts(teacher, draft, drafted)
    tensors = [torch.tensor([prompt], device=teacher.device) for prompt in prompts]
    try:
        for model in (None, draft):
            _generate(teacher, tensors[0], new_tokens, model)
        for ids in tensors:
            alone, seconds, _ = _generate(teacher, ids, new_tokens, None)
            sums.alone_seconds, sums.alone_tokens = sums.alone_seconds + seconds, sums.alone_tokens + len(alone)
            output, seconds, forwards = _generate(teacher, ids, new_tokens, draft)
            sums.seconds, sums.tokens = sums.seconds + seconds, sums.tokens + len(output)
            sums.forwards, sums.equal = sums.forwards + forwards, sums.equal + (alone == output)
    finally:
        draft.generation_config = settings
    return sums


def _constant_number_of_drafts(teacher: PreTrainedModel, draft: PreTrainedModel, drafted: int) -> GenerationConfig:
    config = GenerationConfig.from_model_config(draft.config)
    config.eos_token_id = _eos_token_ids(teacher)
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = drafted, "constant"
    config.assistant_confidence_threshold = 0.0
    return config


def _eos_token_ids(teacher: PreTrainedModel) -> int | list[int] | None:
    return teacher.generation_config.eos_token_id if teacher.generation_config else None


@torch.no_grad()
def _generate(
    teacher: PreTrainedModel, ids: Tensor, new_tokens: int, draft: PreTrainedModel | None
) -> tuple[list[int], float, int]:
    """Return the tokens that the teacher generates after a prompt, the seconds, and its number of forward passes."""
    forwards = itertools.count()
    handle = teacher.register_forward_hook(lambda *_: (next(forwards), None)[1])
    eos = _eos_token_ids(teacher)
    start = time.perf_counter()
    try:
        output = cast(GenerationMixin, teacher).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=(eos[0] if isinstance(eos, list) else eos) or 0,
            assistant_model=draft,
        )
    except ValueError as error:
        if draft is None:
            raise
        raise DistillError(
            f"transformers cannot decode {type(teacher).__name__} with the draft model {type(draft).__name__}: {error}"
        ) from error
    finally:
        handle.remove()
    tokens = cast(Tensor, output)[0, ids.shape[1] :].tolist()  # waits for the device
    return tokens, time.perf_counter() - start, next(forwards)
