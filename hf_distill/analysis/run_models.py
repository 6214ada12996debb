"""The models of a run, each with its own tokenizer, for evaluations that read and generate text."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..core.targets import IGNORE_INDEX
from ..runner.run_results import Run
from .initial_student import student_before
from .model_pair import ModelPair, load_model


@dataclass(frozen=True)
class RunModels:
    """Teacher, initial student, student and control of a run; made by `RunModels.of_run`.

    run:  see `open_run`
    pair: teacher and student with the held-out rows
    """

    run: Run
    pair: ModelPair

    @classmethod
    def of_run(cls, run: Run, on_stage: Callable[[str], None] = lambda text: None) -> "RunModels":
        """Load the teacher and the student of a run, whose tokenizers may differ.

        Raises:
            DistillError: see `ModelPair.of_run`.
        """
        return cls(run, ModelPair.of_run(run, on_stage=on_stage, one_tokenizer=False))

    def load(self, name: str) -> nn.Module:
        """Return the teacher, "before" (the student before training), the student or the control."""
        if name == "before":
            full = self.pair.full_vocabulary_teacher
            kept_ids = None if full is None else full.kept_ids.tolist()
            return student_before(self.run, self.pair.teacher, kept_ids).to(self.pair.device)
        if name == "control":
            return load_model(self.run.path("control"), self.pair.device)
        model = {"teacher": self.pair.teacher, "student": self.pair.student}[name]
        assert model is not None
        return model

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """Return the tokenizer of a model: all but the teacher have the student's."""
        of_teacher = self.pair.cross_tokenizer_teacher or self.pair.full_vocabulary_teacher
        tokenizer = self.pair.tokenizer if name != "teacher" or of_teacher is None else of_teacher.tokenizer
        assert tokenizer is not None
        return tokenizer

    def prompt_ids(self, name: str, row: dict[str, list[int]], count: int) -> list[int]:
        """Return the prompt of a held-out row in the tokens of a model.

        A teacher with another tokenizer reads the prompt that was rendered with its own chat template, if the row has
        one, or the text of the student's prompt.

        Args:
            name: of the model, see `load`.
            row: of `pair.rows`.
            count: length of the student's prompt, see `prompt_length`.
        """
        prompt = list(row["input_ids"])[:count]
        if name == "teacher" and (full := self.pair.full_vocabulary_teacher) is not None:
            return full.kept_ids[torch.tensor(prompt)].tolist()
        teacher = self.pair.cross_tokenizer_teacher
        if name != "teacher" or teacher is None:
            return prompt
        if row.get("teacher_labels") is not None:
            ids, labels = list(row["teacher_input_ids"]), list(row["teacher_labels"])
            return ids[: next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(ids))]
        text = torch.tensor([prompt])
        rows = teacher.row_maker({"input_ids": text, "labels": text})
        return rows[teacher.keys.teacher_input_ids][0].tolist()


def prompt_length(row: dict[str, list[int]], count: int) -> int:
    """Return the number of tokens before the first target token of a row; `count` if the targets begin at its start."""
    first = next((i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX), 0)
    return first if first > 1 else min(count, len(row["input_ids"]) // 2)
