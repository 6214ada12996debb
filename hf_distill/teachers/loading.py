"""Loading and placement of a frozen teacher: on one device, quantized, spread over devices, or sharded over processes.

`from_pretrained` places the weights while it loads them, so that no device ever holds the full model unless it has to.
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
from transformers.distributed.fsdp import is_fsdp_enabled, is_fsdp_managed_module
from transformers.integrations import deepspeed as integration
from transformers.utils import logging

from ..core.deepspeed_config import check_placement, check_teacher_config, fill_teacher_config, read_deepspeed
from ..errors import DistillError, collect_errors, raise_if_any, require_package
from ..models.compilation import without_compilation_around_head
from ..models.model_types import is_zero3_partitioned, model_type_of
from ..models.placement import devices_of, parameters_without_values
from ..models.sharding import is_sharded
from .pretrained import load_pretrained

logger = logging.get_logger(__name__)
QUANTIZATIONS = ("nf4", "int8")
_M_MMAP_THRESHOLD = -3  # malloc.h
_DEVICES_ARE_SHARED = (
    "{option} spreads one teacher over several devices, and each of the {count} processes of this launch would load "
    "one onto the same devices: start one process, or shard the teacher (deepspeed='zero3-teacher.json' or fsdp=True)"
)

TENSOR_PARALLEL_TEACHER = (
    "{option}: tensor parallelism divides the output head of the teacher over processes, and the loss needs the whole "
    "head. Shard the teacher with fsdp=True or deepspeed='zero3-teacher.json', or quantize it (quantization='nf4')"
)


@dataclass(frozen=True)
class TeacherLoader:
    """How a teacher is loaded and where its weights are placed.

    quantization: "nf4" (with double quantization, arXiv 2305.14314) or "int8" (arXiv 2208.07339), of all weights but
                  those of the output head
    deepspeed:    shard with ZeRO-3 (arXiv 1910.02054): a config, the path of one, or the name of a packaged one
    fsdp:         shard with FSDP2 over all processes
    init_kwargs:  arguments of from_pretrained: dtype (in which a quantized model computes), revision, device_map, ...

    Raises:
        DistillError: placements that exclude each other, do not work in this launch or need a missing package.
    """

    quantization: str | None = None
    deepspeed: str | dict | None = None
    fsdp: bool = False
    init_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        if self.quantization not in (None, *QUANTIZATIONS):
            problems.append(f"quantization is {self.quantization!r}; known: {', '.join(QUANTIZATIONS)}")
        quantized: Any = self.quantization or self.init_kwargs.get("quantization_config")
        device_map = self.init_kwargs.get("device_map")
        with collect_errors(problems):
            check_placement(quantized, self.deepspeed, self.fsdp, device_map)
        if device_map is not None and env_world_size() > 1 and _spreads(device_map):
            problems.append(_DEVICES_ARE_SHARED.format(option=f"device_map={device_map!r}", count=env_world_size()))
        tp_options = [name for name in ("tp_plan", "tp_size") if self.init_kwargs.get(name) is not None]
        if (getattr(self.init_kwargs.get("distributed_config"), "tp_size", None) or 1) > 1:
            tp_options.append("distributed_config")
        if tp_options:
            problems.append(TENSOR_PARALLEL_TEACHER.format(option=" and ".join(tp_options)))
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
        """Load the model of a path or id.

        Args:
            student: the student, whose model type the model must have.
            path: folder or id of the model.
            config: the model's config.
            device: device of this process.

        Raises:
            DistillError: there is no such model, or a quantized checkpoint would be quantized again or sharded.
        """
        kwargs, model_type = dict(self.init_kwargs), model_type_of(student)
        checkpoint_quantization = getattr(config, "quantization_config", None)
        if checkpoint_quantization is not None and (self.quantization or self.deepspeed or self.fsdp):
            raise DistillError(
                f"{path} is already a quantized checkpoint: every process loads it as it is, and it can neither be "
                "quantized again nor sharded. Leave quantization, deepspeed and fsdp out, or give the unquantized "
                "checkpoint."
            )
        if self.quantization:
            kwargs["quantization_config"] = quantization_config(self.quantization, dtype_of(config, kwargs))
        if device.type != "cpu" and (checkpoint_quantization is not None or "quantization_config" in kwargs):
            kwargs.setdefault("device_map", {"": device})
        if self.fsdp:
            kwargs["distributed_config"] = DistributedConfig(fsdp_size=env_world_size())
        elif not self.deepspeed and "distributed_config" not in kwargs:
            kwargs = direct_loading(device) | kwargs
        if not self.deepspeed:
            with zero3_init_context(None):
                return load_pretrained(path, model_type, student, config, kwargs)
        with zero3_init_context(self._zero3(config)), _malloc_trim_while_loading():
            return load_pretrained(path, model_type, student, config, kwargs)

    def dispatch(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Place a frozen model in a DeepSpeed engine or, if it is on the CPU, on the device of this process.

        A model that its user placed on an accelerator stays there, and so does one that is spread over devices, has a
        device map, is quantized or sharded. A model that was partitioned because a ZeRO-3 config of the student existed
        while it was loaded gets an engine too.

        Raises:
            DistillError: parameters have no values; or there are several processes, and the model is spread over
                devices or is on the device of another process.
        """
        if isinstance(model, PreTrainedModel) and (self.deepspeed or is_zero3_partitioned(model)):
            return deepspeed_engine(model, self._zero3(model.config))
        device_map = getattr(model, "hf_device_map", None)
        if device_map is not None and env_world_size() > 1 and _spreads(device_map):
            raise DistillError(
                _DEVICES_ARE_SHARED.format(option=f"the teacher's device map {device_map}", count=env_world_size())
            )
        if is_sharded(model) or is_fsdp_managed_module(model):
            return keep_layout(model)
        if without_values := parameters_without_values(model):
            raise DistillError(
                f"The teacher has no values for {len(without_values)} parameters ({without_values[0]}, ...), which are "
                "on the meta device: load it with from_pretrained, or give its path or id instead."
            )
        devices = devices_of(model)
        _check_device_of_process(devices, device)
        is_placed = device_map is not None or getattr(model, "quantization_method", None) is not None
        if is_placed or any(each.type != "cpu" for each in devices):
            return keep_layout(model)
        return model.to(device)

    def _zero3(self, config: PretrainedConfig) -> dict[str, Any]:
        zero = read_deepspeed(self.deepspeed or "zero3-teacher.json")
        dtype = str(dtype_of(config, self.init_kwargs)).removeprefix("torch.")
        return fill_teacher_config(zero, config.get_text_config().hidden_size, dtype)


def run_eagerly(model: nn.Module) -> nn.Module:
    """Remove the wrappers of data parallelism, which a teacher does not need, and compilation around its output head.

    A compiled forward would not see that the forward of the output head is replaced for each call.
    """
    inner = model
    while isinstance(inner, OptimizedModule | DistributedDataParallel | DataParallel):
        inner = inner._orig_mod if isinstance(inner, OptimizedModule) else inner.module
    inner, was_compiled = without_compilation_around_head(inner)
    if was_compiled or isinstance(model, OptimizedModule):
        logger.warning_once(
            "The teacher is compiled: it runs without compilation, because the forward of its output head is replaced. "
            "compile_teacher=True, with torch_compile=True, compiles its transformer layers."
        )
    return inner


def quantization_config(name: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the config of bitsandbytes for "nf4", which computes in `dtype`, or for "int8"."""
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_layout(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes from repacking 4-bit weights for AVX512-BF16 whose rows are shorter than a block: it fails."""
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and state.shape[-1] % state.blocksize:
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # mypy expects a tensor or module
    return model


def direct_loading(device: torch.device) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load weights to a device, without a full copy in host memory.

    Nothing is returned for devices and strategies that need the weights on the CPU: mps, and accelerate's FSDP with
    cpu_ram_efficient_loading, in which only one process of each machine loads buffers.

    Args:
        device: device of this process.
    """
    if device.type in ("cpu", "mps") or is_fsdp_enabled():
        return {}
    return {"device_map": {"": device}}


def dtype_of(config: PretrainedConfig, init_kwargs: dict[str, Any]) -> torch.dtype:
    """Return the dtype in which `from_pretrained` loads a model: the requested one, else the checkpoint's."""
    dtype = init_kwargs.get("dtype", "auto")
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def deepspeed_engine(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Wrap a teacher in a DeepSpeed engine without an optimizer, which gathers weights layer by layer in the forward.

    Args:
        model: a model that `zero.Init` partitioned, or an unsharded one, which the engine partitions.
        config: a ZeRO-3 config without "auto" values.
    """
    import deepspeed

    wrapped = deepspeed.initialize(model=model, config=config)[0]
    wrapped.eval()
    return wrapped


def env_world_size() -> int:
    """Return the number of processes of this launch; 0 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 0


@contextmanager
def zero3_init_context(config: dict[str, Any] | None) -> Iterator[None]:
    """Let `from_pretrained` use this DeepSpeed config, or none, instead of the student's."""
    student_config = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    teacher_config = config and integration.HfDeepSpeedConfig(config)  # transformers keeps a weak reference only
    try:
        yield
    finally:
        del teacher_config
        integration._hf_deepspeed_config_weak_ref = student_config


@contextmanager
def _malloc_trim_while_loading() -> Iterator[None]:
    """Let glibc return freed blocks of 1 MiB and more to the system while a model is loaded.

    Fragmentation would otherwise make a rank that loads a shard into CPU memory use as much memory as the full model.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # exists in glibc only
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the value to which glibc raises it in a process with large tensors


def _check_zero3(config: dict[str, Any]) -> None:
    """Check a ZeRO-3 config; with parameters in CPU memory one process is enough."""
    check_teacher_config(config)
    _check_processes("deepspeed", 1 if "offload_param" in config["zero_optimization"] else 2)


def _check_processes(option: str, least: int) -> None:
    """Check that a launcher started at least so many processes.

    Raises:
        DistillError: there are fewer, or there is no launcher.
    """
    if env_world_size() < least:
        raise DistillError(
            f"{option} shards the teacher over the processes of a launcher, and needs {least} or more; this run "
            f"{'has 1 process' if env_world_size() else 'has no launcher'}. Start it with `torchrun --nproc_per_node "
            f"{max(least, 2)} ...` or `accelerate launch ...`, or load the teacher on one GPU with quantization='nf4'."
        )


def _check_device_of_process(devices: list[torch.device], device: torch.device) -> None:
    """Check that a teacher is not on the device on which another process of this machine trains.

    Args:
        devices: devices of the teacher.
        device: device of this process.

    Raises:
        DistillError: it is.
    """
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", env_world_size()))
    for each in devices:
        is_of_process = each.type == device.type != "cpu" and each.index is not None and each.index < num_processes
        if env_world_size() > 1 and is_of_process and each != device:
            raise DistillError(
                f"The teacher is on {each}, on which another process of this launch trains; this process trains on "
                f"{device}. Leave the teacher on the CPU, and each process moves its copy to its device; or place it "
                f"on a device that no process trains on (one of {num_processes} or more)."
            )


def _spreads(device_map: Any) -> bool:
    """Whether a device map may name several devices."""
    return not isinstance(device_map, dict) or len(set(map(str, device_map.values()))) > 1
