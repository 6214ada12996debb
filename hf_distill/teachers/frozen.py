"""A teacher that does not move."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..blocks import Stack, stack_of
from ..errors import DistillError
from ..forward import teacher_signals
from ..model_call import accepted_inputs
from ..signals import Signals, Tap, Targets
from ..tasks import task_of
from .base import Teacher
from .loading import Loading
from .vocabulary import check_fit


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

    kind = "frozen"

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
        self._path: Any = model if isinstance(model, str) else None
        self.processing_class = processing_class
        self.model = None if isinstance(model, str) else model

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Check that the model fits the student, load it if need be, freeze it, put it where it stays."""
        asked = {k: v for k, v in self._loading.init_kwargs.items() if k in ("revision", "trust_remote_code")}
        config = check_fit(self.model or self._path, student, self.processing_class, processing_class, **asked)
        if self.model is None:
            self.model = self._loading.load(task_of(student), self._path, config, device)
        self.model.requires_grad_(False).eval()
        self.model = self._loading.place(self.model, device)

    def stack(self, which: str | None = None) -> Stack:
        """The model's blocks, or those of its encoder or decoder."""
        return stack_of(self.model, which)

    @torch.no_grad()
    def __call__(self, inputs: dict, targets: Targets, wanted: Mapping[Tap, Targets]) -> Signals:
        """One forward of the frozen model; inputs that its forward does not accept are left out."""
        return teacher_signals(self.model, accepted_inputs(self.model, inputs), targets, wanted)
