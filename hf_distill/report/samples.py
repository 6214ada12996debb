"""Texts that the models of a run generate after the same prompts."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import nn
from transformers import GenerationMixin

from ..analysis.initial_student import student_before
from ..analysis.model_pair import ModelPair, load_model
from ..core import run_files
from ..core.defaults import SAMPLE_TOKENS
from ..core.io import write_json
from ..core.targets import IGNORE_INDEX
from ..runner.run_results import Run


@dataclass(frozen=True)
class Sample:
    """A prompt with the text that each model generates.

    prompt:     text
    reference:  continuation in the data
    written:    "teacher", "before", "student", "control" -> generated text
    """

    prompt: str
    reference: str
    written: dict[str, str]


def write_samples(
    run: Run,
    count: int = 3,
    prompt_tokens: int = 32,
    new_tokens: int = SAMPLE_TOKENS,
    on_stage: Callable[[str], None] = lambda text: None,
) -> list[Sample]:
    """Continue held-out rows with teacher, initial student, student and control, and write RUN/samples.json.

    Decoding is greedy, so that the texts are reproducible.

    Args:
        run: see `open_run`.
        count: number of held-out rows, at equal distances.
        prompt_tokens: length of the prompt if the row's target tokens begin at its start; else the prompt is the text
            before the target tokens.
        new_tokens: maximum number of generated tokens.
        on_stage: called with a short description of each stage as it begins.

    Raises:
        DistillError: see `ModelPair.of_run`.
    """
    pair = ModelPair.of_run(run, on_stage=on_stage)
    loaders: dict[str, Callable[[], nn.Module | None]] = {
        "teacher": lambda: pair.teacher,
        "before": lambda: student_before(run, pair.teacher).to(pair.device),
        "student": lambda: pair.student,
    }
    if run.has("control"):
        loaders["control"] = lambda: load_model(run.path("control"), pair.device)
    stride = max(1, len(pair.rows) // max(count, 1))
    rows = [_prompt(pair.rows[i * stride], prompt_tokens) for i in range(min(count, len(pair.rows)))]
    texts: list[dict[str, str]] = [{} for _ in rows]
    for name, load in loaders.items():
        on_stage(f"{name}: generating {len(rows)} samples")
        model = cast(GenerationMixin, load())
        for text, (ids, _) in zip(texts, rows, strict=True):
            text[name] = _continue(model, ids, new_tokens, pair)
    samples = [
        Sample(_decode(pair, ids), _decode(pair, rest[:new_tokens]), text)
        for (ids, rest), text in zip(rows, texts, strict=True)
    ]
    write_json(run.folder / run_files.SAMPLES, {"samples": [asdict(sample) for sample in samples]})
    return samples


def _prompt(row: dict[str, list[int]], count: int) -> tuple[list[int], list[int]]:
    """Split a row into the prompt and its continuation."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), 0)
    first = first if first > 1 else min(count, len(ids) // 2)
    return ids[:first], ids[first:]


@torch.no_grad()
def _continue(model: GenerationMixin, ids: list[int], count: int, pair: ModelPair) -> str:
    prompt = torch.tensor([ids], device=pair.device)
    tokenizer = pair.tokenizer
    assert tokenizer is not None
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=pad_token_id,
    )
    return _decode(pair, output[0, len(ids) :].tolist(), skip_special_tokens=True)


def _decode(pair: ModelPair, ids: list[int], skip_special_tokens: bool = False) -> str:
    assert pair.tokenizer is not None
    return str(pair.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
