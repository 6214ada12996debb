"""Texts that the models of a run generate after the same prompts."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedTokenizerBase

from ..analysis.run_models import RunModels, prompt_length
from ..core import run_files
from ..core.defaults import PROMPT_TOKENS, SAMPLE_TOKENS
from ..core.io import write_json
from ..runner.run_results import Run


@dataclass(frozen=True)
class Sample:
    """A prompt with the text that each model generates.

    prompt:     text
    reference:  continuation in the data; None if it has none
    written:    "teacher", "before", "student", "control" -> generated text
    """

    prompt: str
    reference: str | None
    written: dict[str, str]


def write_samples(
    run: Run,
    count: int = 3,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = SAMPLE_TOKENS,
    on_stage: Callable[[str], None] = lambda text: None,
) -> list[Sample]:
    """Continue held-out rows with teacher, initial student, student and control, and write RUN/samples.json.

    Decoding is greedy, so that the texts are reproducible. Each model reads the prompt in its own tokens; see
    `RunModels.prompt_ids`.

    Args:
        run: see `open_run`.
        count: number of held-out rows, at equal distances.
        prompt_tokens: length of the prompt if the row's target tokens begin at its start; else the prompt is the text
            before the target tokens.
        new_tokens: maximum number of generated tokens.
        on_stage: called with a short description of each stage as it begins.

    Returns:
        the prompts with the continuations of each model.

    Raises:
        DistillError: see `ModelPair.of_run`.
    """
    models = RunModels.of_run(run, on_stage)
    pair, names = models.pair, ["teacher", "before", "student", *(["control"] if run.has("control") else [])]
    stride = max(1, len(pair.rows) // max(count, 1))
    rows = [pair.rows[i * stride] for i in range(min(count, len(pair.rows)))]
    lengths = [prompt_length(row, prompt_tokens) for row in rows]
    texts: list[dict[str, str]] = [{} for _ in rows]
    for name in names:
        on_stage(f"{name}: generating {len(rows)} samples")
        model, tokenizer = cast(GenerationMixin, models.load(name)), models.tokenizer(name)
        for text, row, length in zip(texts, rows, lengths, strict=True):
            prompt = torch.tensor([models.prompt_ids(name, row, length)], device=pair.device)
            text[name] = _continue(model, prompt, new_tokens, tokenizer)
    tokenizer = models.tokenizer("student")
    samples = [
        Sample(
            str(tokenizer.decode(row["input_ids"][:length])),
            str(tokenizer.decode(row["input_ids"][length : length + new_tokens])),
            text,
        )
        for row, length, text in zip(rows, lengths, texts, strict=True)
    ]
    write_json(run.folder / run_files.SAMPLES, {"samples": [asdict(sample) for sample in samples]})
    return samples


@torch.no_grad()
def _continue(model: GenerationMixin, prompt: Tensor, count: int, tokenizer: PreTrainedTokenizerBase) -> str:
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=pad_token_id,
    )
    return str(tokenizer.decode(output[0, prompt.shape[1] :].tolist(), skip_special_tokens=True))
