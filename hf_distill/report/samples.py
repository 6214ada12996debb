"""What the models of a run write, side by side."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..analysis.initial_student import student_before
from ..analysis.model_pair import ModelPair, load_model
from ..core.io import write_json
from ..core.targets import IGNORE_INDEX
from ..runner.run_results import Run


@dataclass(frozen=True)
class Sample:
    """One prompt and what each model makes of it.

    prompt:     text
    reference:  how the data go on
    written:    "teacher", "before", "student", "control" -> text
    """

    prompt: str
    reference: str
    written: dict[str, str]


def write_samples(
    run: Run,
    count: int = 3,
    prompt_tokens: int = 32,
    new_tokens: int = 48,
    on_stage: Callable[[str], None] = lambda text: None,
) -> list[Sample]:
    """Let teacher, student before and after, and control continue some held-out rows; leaves RUN/samples.json.

    Each writes its likeliest next token (greedily), so that the texts can be made again.

    Args:
        run: see `open_run`.
        count: rows, evenly from the held-out ones.
        prompt_tokens: of a row that is asked from its start; else the prompt is what comes before the asked tokens.
        new_tokens: that a model writes at most.
        on_stage: told in a few words what begins.

    Raises:
        DistillError: see `ModelPair.of_run`.
    """
    pair = ModelPair.of_run(run, on_stage=on_stage)
    makers: dict[str, Callable[[], Any]] = {
        "teacher": lambda: pair.teacher,
        "before": lambda: student_before(run, pair.teacher).to(pair.device),
        "student": lambda: pair.student,
    }
    if run.has("control"):
        makers["control"] = lambda: load_model(run.path("control"), pair.device)
    every = max(1, len(pair.rows) // max(count, 1))
    rows = [_prompt(pair.rows[i * every], prompt_tokens) for i in range(min(count, len(pair.rows)))]
    written: list[dict[str, str]] = [{} for _ in rows]
    for name, make in makers.items():
        on_stage(f"{name}: writing {len(rows)} samples")
        model = make()
        for text, (ids, _) in zip(written, rows, strict=True):
            text[name] = _continue(model, ids, new_tokens, pair)
    decode = pair.tokenizer.decode
    samples = [
        Sample(decode(ids), decode(rest[:new_tokens]), text) for (ids, rest), text in zip(rows, written, strict=True)
    ]
    write_json(run.folder / "samples.json", {"samples": [asdict(sample) for sample in samples]})
    return samples


def _prompt(row: dict[str, Any], count: int) -> tuple[list[int], list[int]]:
    """A row's tokens up to where a model is to go on, and the rest."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), 0)
    first = first if first > 1 else min(count, len(ids) // 2)
    return ids[:first], ids[first:]


@torch.no_grad()
def _continue(model: nn.Module, ids: list[int], count: int, pair: ModelPair) -> str:
    given = torch.tensor([ids], device=pair.device)
    whole: Any = model
    ends = pair.tokenizer.pad_token_id if pair.tokenizer.pad_token_id is not None else pair.tokenizer.eos_token_id
    out = whole.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, pad_token_id=ends
    )
    return pair.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
