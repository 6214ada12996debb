"""How a frozen teacher is held: whole, quantised, spread over devices, or sharded over processes.

Whatever holds it, `from_pretrained` puts it there while it loads, so that what does not fit is never whole.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.integrations import deepspeed as integration
from transformers.utils import logging

from ..core.deepspeed_config import check_placement, check_teacher_config, fill_teacher_config, read_deepspeed
from ..errors import DistillError, collect_errors, raise_if_any, require_package
from ..models.model_types import is_zero3_partitioned, model_type_of
from .pretrained import load_pretrained

logger = logging.get_logger(__name__)
QUANTIZATIONS = ("nf4", "int8")
_M_MMAP_THRESHOLD = -3  # malloc.h
_FIGHT = (
    "{given} spreads one teacher over devices for which {count} processes would fight: start one process, or shard the "
    "teacher (deepspeed='zero3-teacher.json' or fsdp=True)"
)


@dataclass(frozen=True)
class TeacherLoader:
    """How a teacher is to be loaded and held.

    quantization: "nf4" (double quantisation, 2305.14314) or "int8" (2208.07339), of all but its head
    deepspeed:    shard it by ZeRO-3 (1910.02054): a config, the path of one, or the name of a packaged one
    fsdp:         shard it by FSDP2 over all processes
    init_kwargs:  of from_pretrained: dtype (in which a quantised model computes), revision, device_map, ...
    """

    quantization: str | None = None
    deepspeed: str | dict | None = None
    fsdp: bool = False
    init_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        problems = []
        if self.quantization not in (None, *QUANTIZATIONS):
            problems.append(f"quantization is {self.quantization!r}; known: {', '.join(QUANTIZATIONS)}")
        quantized: Any = self.quantization or self.init_kwargs.get("quantization_config")
        device_map = self.init_kwargs.get("device_map")
        with collect_errors(problems):
            check_placement(quantized, self.deepspeed, self.fsdp, device_map)
        if device_map is not None and env_world_size() > 1 and _spreads(device_map):
            problems.append(_FIGHT.format(given=f"device_map={device_map!r}", count=env_world_size()))
        with collect_errors(problems):
            if self.quantization:
                require_package("bitsandbytes", "quant", f"quantization={self.quantization!r}")
            if self.deepspeed:
                require_package("deepspeed", "deepspeed", "A ZeRO-3 teacher")
                _check_zero3(read_deepspeed(self.deepspeed))
            if self.fsdp:
                _check_processes("fsdp", 2)
        raise_if_any(problems)

    def load(self, student: nn.Module, path: str, config: PretrainedConfig, device: torch.device) -> nn.Module:
        """The model, frozen, in eval mode, ready for calls.

        Args:
            student: of whose kind it is to be.
            path: or id.
            config: the model's.
            device: of this process.

        Raises:
            DistillError: a quantised checkpoint is to be sharded or quantised again; there is no such model.
        """
        kwargs, task = dict(self.init_kwargs), model_type_of(student)
        before = getattr(config, "quantization_config", None)
        if before is not None and (self.quantization or self.deepspeed or self.fsdp):
            raise DistillError(
                f"{path} is a quantised checkpoint already: it is loaded as it is, on each process, and neither "
                "quantised again nor sharded. Leave quantization, deepspeed and fsdp out, or name the checkpoint that "
                "it was made from."
            )
        if self.quantization:
            kwargs["quantization_config"] = quantization_config(self.quantization, dtype_of(config, kwargs))
        if device.type != "cpu" and (before is not None or "quantization_config" in kwargs):
            kwargs.setdefault("device_map", {"": device})
        if self.fsdp:
            kwargs["distributed_config"] = DistributedConfig(fsdp_size=env_world_size())
        if not self.deepspeed:
            with zero3_init_context(None):
                return load_pretrained(path, task, student, config, kwargs)
        with zero3_init_context(self._zero3(config)), _malloc_trim_while_loading():
            return load_pretrained(path, task, student, config, kwargs)

    def dispatch(self, model: nn.Module, device: torch.device) -> nn.Module:
        """A frozen model where it stays: in DeepSpeed's engine, where it was spread or sharded, or on the device.

        A model that is partitioned because it was loaded while a student's ZeRO-3 config was alive gets an engine too.

        Raises:
            DistillError: the model is spread over devices, and there are several processes.
        """
        if isinstance(model, PreTrainedModel) and (self.deepspeed or is_zero3_partitioned(model)):
            return engine(model, self._zero3(model.config))
        spread = getattr(model, "hf_device_map", None)
        if spread is not None and env_world_size() > 1 and _spreads(spread):
            raise DistillError(_FIGHT.format(given=f"the teacher's device map {spread}", count=env_world_size()))
        fixed = spread is not None or getattr(model, "quantization_method", None) is not None
        if fixed or is_zero3_partitioned(model) or is_fsdp_managed_module(model):
            return keep_layout(model)
        return model.to(device)

    def _zero3(self, config: PretrainedConfig) -> dict[str, Any]:
        zero = read_deepspeed(self.deepspeed or "zero3-teacher.json")
        dtype = str(dtype_of(config, self.init_kwargs)).removeprefix("torch.")
        return fill_teacher_config(zero, config.get_text_config().hidden_size, dtype)


def run_eagerly(model: nn.Module) -> nn.Module:
    """The model inside wrappers for data parallelism or compilation, which a teacher does not need.

    A compiled forward would keep the output head that is replaced for each call.
    """
    inner, compiled = model, False
    while isinstance(inner, OptimizedModule | DistributedDataParallel | DataParallel):
        compiled |= isinstance(inner, OptimizedModule)
        inner = inner._orig_mod if isinstance(inner, OptimizedModule) else inner.module
    if getattr(inner, "_compiled_call_impl", None) is not None:
        inner._compiled_call_impl, compiled = None, True
    if compiled:
        logger.warning_once("The teacher is compiled: it runs without compilation, which would hide its output head.")
    return inner


def quantization_config(name: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """bitsandbytes' settings for "nf4" or "int8"; NF4 computes in `dtype`."""
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_layout(model: nn.Module) -> nn.Module:
    """On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights, but not rows shorter than a block: these stay."""
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and state.shape[-1] % state.blocksize:
            module.support_avx512bf16_for_cpu = False
    return model


def dtype_of(config: PretrainedConfig, init_kwargs: dict[str, Any]) -> torch.dtype:
    """In which dtype `from_pretrained` loads: the one given, else the checkpoint's."""
    given = init_kwargs.get("dtype", "auto")
    if given == "auto":
        given = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, given) if isinstance(given, str) else given


def engine(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """DeepSpeed's engine around a teacher: gathers layer by layer in the forward, no optimizer.

    Args:
        model: partitioned by `zero.Init`, or whole: it is partitioned here then.
        config: a filled ZeRO-3 config.
    """
    import deepspeed

    wrapped = deepspeed.initialize(model=model, config=config)[0]
    wrapped.eval()
    return wrapped


def env_world_size() -> int:
    """Processes of this run, as its launcher says; 0 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 0


@contextmanager
def zero3_init_context(config: dict[str, Any] | None) -> Iterator[None]:
    """`from_pretrained` shards for this config, or for none, whatever the student's is."""
    before = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    mine = config and integration.HfDeepSpeedConfig(config)  # a weak reference is kept: it lives as long as this does
    try:
        yield
    finally:
        del mine
        integration._hf_deepspeed_config_weak_ref = before


@contextmanager
def _malloc_trim_while_loading() -> Iterator[None]:
    """glibc gives each MiB back when it is freed, instead of keeping holes between the shards of a model.

    With the holes a rank that loads into CPU memory ends up holding as much as the whole model.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # where glibc itself ends up in a process with large tensors


def _check_zero3(config: dict[str, Any]) -> None:
    check_teacher_config(config)
    _check_processes("deepspeed", 1 if "offload_param" in config["zero_optimization"] else 2)


def _check_processes(way: str, least: int) -> None:
    if env_world_size() < least:
        raise DistillError(
            f"a teacher held by {way} is sharded over the processes of a launcher, {least} or more; here "
            f"{'is 1' if env_world_size() else 'is no launcher'}. Start with `torchrun --nproc_per_node "
            f"{max(least, 2)} ...` or `accelerate launch ...`, or hold it on one GPU with quantization='nf4'."
        )


def _spreads(device_map: Any) -> bool:
    return not isinstance(device_map, dict) or len(set(map(str, device_map.values()))) > 1
