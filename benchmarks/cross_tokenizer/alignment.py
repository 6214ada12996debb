"""Speed of the alignment on one core, beside that of TRL's GOLDTrainer on the same text.

    python alignment.py

Both start with tokens of the student and end with the teacher's tokens and the spans of text at which both agree. The
text is the training rows, two rows a batch; longer rows are joined from them.
"""

import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from models import TEACHERS, model_path
from rows import training_rows
from train import TEXTS
from transformers import AutoTokenizer
from trl.experimental.gold.gold_trainer import ULDLoss, build_teacher_inputs_from_texts
from trl.experimental.utils import encode_with_byte_offsets

from hf_distill.data.alignment.teacher_rows import TeacherRowMaker
from hf_distill.data.collator import Collator

ROUNDS, BATCH = 7, 2


def main() -> dict[str, Any]:
    """Return megabytes of text a second for both teachers and several lengths of rows."""
    torch.set_num_threads(1)
    student = AutoTokenizer.from_pretrained(model_path("smollm2"))
    results: dict[str, Any] = {}
    for name in TEACHERS:
        teacher = AutoTokenizer.from_pretrained(model_path(name))
        for joined in (1, 4, 16):
            rows = training_rows(TEXTS)
            texts = ["".join(rows[start : start + joined]) for start in range(0, len(rows), joined)]
            contestants = {"ours": _ours(student, teacher, texts)}
            if name.startswith("qwen"):  # GOLD refuses tokenizers that are not byte-level
                contestants["gold"] = _gold(student, teacher, texts)
            tokens = sum(len(ids) for ids in student(texts)["input_ids"]) // len(texts)
            size = sum(len(text.encode()) for text in texts) / 1e6
            seconds = _interleaved(contestants)
            figures = {
                who: {"mb_per_second": size / each, "ms_per_batch": 1e3 * each * BATCH / len(texts)}
                for who, each in seconds.items()
            }
            results[f"{name}, rows of {tokens} tokens"] = figures
    return {"alignment": results, "rows_in_a_batch": BATCH}


def _ours(student: Any, teacher: Any, texts: list[str]) -> Callable[[], None]:
    maker, collate = TeacherRowMaker(student, teacher), Collator(student.pad_token_id)
    rows = [{"input_ids": ids, "labels": ids} for ids in student(texts)["input_ids"]]
    batches = [collate(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]

    def align() -> None:
        for batch in batches:
            maker(batch)

    return align


def _gold(student: Any, teacher: Any, texts: list[str]) -> Callable[[], None]:
    """What `GOLDTrainer.compute_loss` does before and between its forwards: it is not part of the data loader."""
    offsets = [each for _, each in encode_with_byte_offsets(student.backend_tokenizer, texts)]
    batches = [
        (texts[i : i + BATCH], [torch.tensor(each) for each in offsets[i : i + BATCH]])
        for i in range(0, len(texts), BATCH)
    ]

    def align() -> None:
        for batch, student_offsets in batches:
            *_, teacher_offsets = build_teacher_inputs_from_texts(teacher, [""] * len(batch), batch)
            for one, other in zip(student_offsets, teacher_offsets, strict=True):
                ULDLoss._align_by_byte_offsets(one.tolist(), other.tolist())

    return align


def _interleaved(contestants: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Return the median CPU seconds of values, which take turns after one call to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(ROUNDS + 1):
        for name, align in contestants.items():
            start = time.process_time()
            align()
            if number:
                seconds[name].append(time.process_time() - start)
    return {name: median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    print(json.dumps(main()))
