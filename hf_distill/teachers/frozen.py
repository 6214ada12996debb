"""A teacher that does not move."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..core.signals import FeatureKey, Signals
from ..core.targets import Targets
from ..errors import DistillError
from ..models.blocks import LayerStack, get_layer_stack
from ..models.forward import extract_signals
from ..models.model_call import accepted_inputs
from ..models.model_types import model_type_of
from .base import Teacher
from .compatibility import check_kinds, check_teacher_student
from .input_limits import InputLimits, check_data
from .loading import TeacherLoader, run_eagerly
from .pretrained import as_path, check_checkpoint, hub_options, read_adapter_config, read_config


class FrozenTeacher(Teacher):
    """A model in eval mode, without gradients, never in the optimizer and never in the student's checkpoint.

    Args:
        model: a model (frozen in place), or the path or id of one, or of adapters. It is loaded in the class that wrote
            the checkpoint, which must be of the student's kind, and every weight must be in the checkpoint.
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
        self._loading = TeacherLoader(quantization, deepspeed, fsdp, init_kwargs)
        given = [*sorted(init_kwargs), *(["quantization"] if quantization else []), *(["fsdp"] if fsdp else [])]
        model = as_path(model)
        if not isinstance(model, str) and given:
            raise DistillError(
                f"teacher_init_kwargs {given} were given beside a model that is loaded already: give the "
                "model's id or path instead, or load it with them yourself."
            )
        self._path: Any = model if isinstance(model, str) else None
        self.processing_class = processing_class
        self.model = None if isinstance(model, str) else run_eagerly(model)
        self._limits: InputLimits | None = None

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Check that the model fits the student, load it if need be, freeze it, put it where it stays."""
        task, options = model_type_of(student), self._loading.init_kwargs
        given = self.model
        if given is None:
            given = read_config(self._path, options)
            is_adapter = read_adapter_config(self._path, options) is not None
            check_checkpoint(self._path, task, given, is_adapter)
        check_teacher_student(
            given, student, self.processing_class, processing_class, self._path or "", **hub_options(options)
        )
        if self.model is None:
            self.model = self._loading.load(student, self._path, given, device)
            check_kinds(model_type_of(self.model), task)
        self.model.requires_grad_(False).eval()
        self.model = self._loading.dispatch(self.model, device)
        self._limits = InputLimits.of(self.model, student)

    def check_data(self, rows: Any, name: str) -> None:
        """Refuse rows with ids beyond the model's embedding."""
        if self._limits is not None:
            check_data(self._limits, rows, name)

    def layer_stack(self, which: str | None = None) -> LayerStack:
        """The model's blocks, or those of its encoder or decoder."""
        return get_layer_stack(self.model, which)

    @torch.no_grad()
    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, Targets]) -> Signals:
        """One forward of the frozen model; inputs that its forward does not accept are left out."""
        inputs = accepted_inputs(self.model, inputs)
        if self._limits is not None:
            inputs = self._limits.readable(inputs)
        return extract_signals(self.model, inputs, targets, feature_requests)
