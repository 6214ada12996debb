"""The frozen teacher: a model that does not change during training."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.utils import logging

from ..core.logits import enabled_autocast_dtype
from ..core.signals import FeatureKey, Signals
from ..core.targets import FeatureTokens, Targets
from ..errors import DistillError
from ..models.blocks import LayerStack, get_layer_stack
from ..models.declared_types import type_as_teacher
from ..models.forward import extract_signals
from ..models.frozen_head import FrozenHead, head_sample
from ..models.model_call import accepted_inputs
from ..models.model_types import model_type_of, unwrap_model
from ..models.output_head import check_head_stays_gathered
from ..models.placement import devices_of, input_device, is_tensor_parallel
from ..models.precision import autocast_like, computes_in_float32, in_dtype_of, is_deepspeed_engine
from .base import Teacher
from .compatibility import check_model_types, check_teacher_student, load_tokenizer
from .input_limits import InputLimits, check_data
from .loading import TENSOR_PARALLEL_TEACHER, TeacherLoader, run_eagerly
from .pretrained import as_path, check_checkpoint, hub_options, read_adapter_config, read_config

logger = logging.get_logger(__name__)


class FrozenTeacher(Teacher):
    """A model in eval mode, without gradients; it is neither in the optimizer nor in the student's checkpoint.

    Args:
        model: a model (frozen in place), or the path or Hub id of a model or of adapters. A path or id is loaded in the
            class that wrote the checkpoint, which must be of the student's model type; the checkpoint must hold every
            weight. A model on the CPU without a device map is moved to the student's device; one that is on an
            accelerator, or has a device map, stays and runs there.
        processing_class: the teacher's tokenizer, which is compared with the student's; None: the tokenizer in the
            model's folder, if it is on this machine.
        quantization: load the model in 4 bits ("nf4") or 8 bits ("int8").
        deepspeed: shard the model with ZeRO-3, independently of the student's strategy: a config, its path, or the name
            of a packaged config such as "zero3-teacher.json".
        fsdp: shard the model with FSDP2 over all processes.
        init_kwargs: passed to `from_pretrained` (dtype, revision, device_map, quantization_config, ...).

    Raises:
        DistillError: placements that exclude each other or that this machine or launch does not support; loading
            options for a model that is already loaded.
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
        **init_kwargs: Any,
    ):
        self._loader = TeacherLoader(quantization, deepspeed, fsdp, init_kwargs)
        options = [*sorted(init_kwargs), *(["quantization"] if quantization else []), *(["fsdp"] if fsdp else [])]
        model = as_path(model)
        if not isinstance(model, str) and options:
            raise DistillError(
                f"teacher_init_kwargs {options} say how to load a model, but the teacher is a model that is already "
                "loaded: give the model's id or path instead, or load the model with these arguments yourself."
            )
        self._path: Any = model if isinstance(model, str) else None
        self.processing_class = processing_class
        self.model = None if isinstance(model, str) else run_eagerly(model)
        self._limits: InputLimits | None = None
        self.reads_own_tokens = False  # a wrapper sets it, and `prepare` then gets the teacher's tokenizer
        self._head, self._is_float32 = FrozenHead(), False

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Check that the model fits the student, load it if it is a path or id, freeze it and place it on its device.

        Raises:
            DistillError: the model cannot be loaded, or cannot teach this student.
        """
        model_type, options = model_type_of(student), self._loader.init_kwargs
        model_or_config = self.model
        if model_or_config is None:
            model_or_config = read_config(self._path, options)
            is_adapter = read_adapter_config(self._path, options) is not None
            check_checkpoint(self._path, model_type, model_or_config, is_adapter)
        self.other_tokens = check_teacher_student(
            model_or_config,
            student,
            self.processing_class,
            processing_class,
            self._path or "",
            reads_own_tokens=self.reads_own_tokens,
            **hub_options(options),
        )
        if self.model is None:
            self.model = self._loader.load(student, self._path, model_or_config, device)
            check_model_types(type_as_teacher(self.model, student), model_type)
        if is_tensor_parallel(self.model):
            raise DistillError(TENSOR_PARALLEL_TEACHER.format(option="The teacher is divided over processes") + ".")
        check_head_stays_gathered(self.model)
        self.model.requires_grad_(False).eval()
        self._is_float32 = computes_in_float32(self.model)
        self.model = self._loader.dispatch(self.model, device)
        self._limits = InputLimits.of(self.model, student, self.reads_own_tokens or self.other_tokens is not None)
        self.context_length = self._limits.positions

    def keep_ids(self, ids: Tensor) -> None:
        """Return the logits of some ids only, if they are lazy.

        Args:
            ids: [V'] the ids.
        """
        self._head.ids = ids

    def load_tokenizer(self) -> Any:
        """Return the tokenizer that is stored with the model; None if there is none.

        Raises:
            DistillError: it cannot be loaded.
        """
        path = self._path or getattr(unwrap_model(self.model), "name_or_path", "")
        return load_tokenizer(path, **hub_options(self._loader.init_kwargs)) if path else None

    def is_elsewhere(self, device: torch.device) -> bool:
        """Whether the user placed the model on other devices than the student's, before `prepare` or by a device map.

        Args:
            device: the student's device.
        """
        if self.model is None:
            return self._loader.init_kwargs.get("device_map") is not None
        return any(each.type != "cpu" and each != device for each in devices_of(self.model))

    def check_data(self, rows: Any, name: str) -> None:
        """Check that the model has an embedding for every id of a data set."""
        if self._limits is not None:
            check_data(self._limits, rows, name)

    def layer_stack(self, which: str | None = None) -> LayerStack:
        """The layers of the model, or of its encoder or decoder."""
        return get_layer_stack(self.model, which)

    def numbers_to_read(self, inputs: dict, shift: bool) -> dict[str, Tensor]:
        """Return the numbers that the check of ids and positions needs, and a sample of the output head."""
        numbers = {} if self._limits is None else self._limits.numbers_to_read(inputs)
        return numbers | self.numbers_of_any_rows(inputs, shift)

    def numbers_of_any_rows(self, inputs: dict, shift: bool) -> dict[str, Tensor]:
        """Return a sample of the output head, which tells whether its copy is still valid."""
        device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        sample = head_sample(self.model, device, self._head.ids is not None)
        return {} if sample is None else {self._sample_name: sample}

    @torch.no_grad()
    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Run the frozen model once, on its device, with those inputs that its forward accepts."""
        inputs = accepted_inputs(self.model, inputs)
        if self._limits is not None:
            inputs = self._limits.readable(inputs, targets.numbers)
        if (sample := targets.numbers.get(self._sample_name)) is None:  # not read with the batch
            tensor = head_sample(self.model, targets.labels.device, self._head.ids is not None)
            sample = () if tensor is None else tensor.tolist()
        self._head.sample = tuple(sample)
        device = input_device(self.model) or targets.labels.device
        if device != targets.labels.device:
            inputs = send_to_device(inputs, device)
        if not self._is_float32:
            inputs = in_dtype_of(self.model, inputs)
        with self._precision(targets.labels.device, device):
            return extract_signals(self.model, inputs, targets, feature_requests, self._head)

    @property
    def _sample_name(self) -> str:
        """The name of the sample of the output head in `Targets.numbers`; another one for each teacher."""
        return f"output head {id(self)}"

    def _precision(self, student_device: torch.device, device: torch.device) -> AbstractContextManager[object]:
        """Run a model in float32 under the student's autocast, and any other model in the dtype of its weights."""
        is_engine = is_deepspeed_engine(self.model)
        if self._is_float32 and is_engine and enabled_autocast_dtype(student_device) is not None:
            logger.warning_once(
                "The ZeRO-3 teacher is loaded in float32 and runs in float32, because DeepSpeed does not use the "
                "autocast of the student. Load it in a lower precision with teacher_init_kwargs={'dtype': 'bfloat16'}."
            )
        return autocast_like(student_device, device, enabled=self._is_float32 and not is_engine)
