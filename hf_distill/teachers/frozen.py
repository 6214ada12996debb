"""A teacher that does not move."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from ..blocks import Stack, stack_of
from ..errors import DistillError
from ..forward import parameters_of, teacher_signals
from ..signals import Signals, Tap, Targets
from ..tasks import Task, bare, task_of
from .base import Teacher
from .loading import Loading
from .vocabulary import check_classes, check_vocabulary


class FrozenTeacher(Teacher):
    """A model in eval mode, without gradients, never in the optimizer and never in the student's checkpoint.

    Args:
        model: a model (frozen in place), or the path or id of one, loaded in the student's auto class.
        processing_class: its tokenizer, compared with the student's. Without it the one beside the model's files is
            read, if there is one on this machine.
        quantization: hold it in 4 bits ("nf4") or 8 ("int8").
        deepspeed: shard it by ZeRO-3, whatever the student's strategy: a config, its path, or a packaged name such as
            "zero3-teacher.json".
        fsdp: shard it by FSDP2 over all processes.
        init_kwargs: passed to `from_pretrained` (dtype, revision, device_map, quantization_config, ...).

    Raises:
        DistillError: ways that exclude each other or that this machine or launch cannot go; options of loading beside
            a model that is loaded already.
    """

    def __init__(
        self,
        model: nn.Module | str,
        *,
        processing_class: Any = None,
        quantization: str | None = None,
        deepspeed: str | dict | None = None,
        fsdp: bool = False,
        **init_kwargs,
    ):
        self._loading = Loading(quantization, deepspeed, fsdp, init_kwargs)
        given = [*sorted(init_kwargs), *(["quantization"] if quantization else []), *(["fsdp"] if fsdp else [])]
        if not isinstance(model, str) and given:
            raise DistillError(
                f"teacher_init_kwargs {given} were given beside a model that is loaded already: give the "
                "model's id or path instead, or load it with them yourself."
            )
        self._path = model if isinstance(model, str) else None
        self.processing_class = processing_class
        self.model = None if isinstance(model, str) else model

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Check that the model fits the student, load it if need be, freeze it, put it where it stays."""
        task = task_of(student)
        if self.model is student:
            raise DistillError(
                "Teacher and student are the same object: freezing the teacher would freeze the student. Load the "
                "model twice, or copy it."
            )
        config = self._check_fit(student, task, processing_class)
        if self.model is None:
            self.model = self._loading.load(task, str(self._path), config, device)
        if (own := task_of(self.model)) is not task:
            raise DistillError(
                f"The teacher is a {own.name} and the student a {task.name}: use two models of one kind."
            )
        self.model.requires_grad_(False).eval()
        self.model = self._loading.place(self.model, device)

    def _check_fit(self, student: nn.Module, task: Task, processing_class: Any) -> PretrainedConfig:
        if self.model is not None:
            config, path = bare(self.model).config, bare(self.model).name_or_path
        else:
            path = self._path
            config = AutoConfig.from_pretrained(path, revision=self._loading.init_kwargs.get("revision"))
        if not task.vocabulary:
            check_classes(config, student.config)
            return config
        check_vocabulary(
            self.processing_class or local_tokenizer(path),
            processing_class or local_tokenizer(student.name_or_path),
            config.get_text_config().vocab_size,
            student.config.get_text_config().vocab_size,
        )
        return config

    def stack(self, which: str | None = None) -> Stack:
        """The model's blocks, or those of its encoder or decoder."""
        return stack_of(self.model, which)

    @torch.no_grad()
    def __call__(self, inputs: dict, targets: Targets, wanted: Mapping[Tap, Targets]) -> Signals:
        """One forward of the frozen model; inputs that its class does not name are left out."""
        model = bare(self.model)
        named = parameters_of(model.__class__)
        if model.main_input_name in named:
            inputs = {k: v for k, v in inputs.items() if k in named or k == "labels"}
        return teacher_signals(self.model, inputs, targets, wanted)


def local_tokenizer(path: str) -> Any:
    """The tokenizer beside a model's files, from this machine alone; None where there is none."""
    if not path:
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None
