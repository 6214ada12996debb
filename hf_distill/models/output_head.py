"""Measures whether a model's logits are the product of its output head, before the fused loss relies on it.

Two short forwards of a few rows of the first batch, without its images, decide, in eval mode and without gradients:

1. The unmodified forward. Its logits at several positions are compared with lazy logits, which are computed from the
   input of the output head.
2. The same forward, in which the output of the head is replaced by known numbers, small and large. The logits of this
   forward show every soft cap, scale, bias or slice after the head, also one whose effect at initialization is below
   rounding, and every trained parameter that is applied after the head.

If either differs, the logits are materialized: the objective is the same, and each step takes more memory.

A module outside transformers does not name its output head. It is the last linear layer whose output has the shape of
the logits, and a third forward shows whether the module accepts a placeholder in their place.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.utils import logging

from ..core.logits import RESHARDED_HEAD, LazyLogits, LogitScaling
from ..errors import DistillError
from .image_inputs import without_images
from .model_call import FLASH_ATTENTION_INPUTS, named_outputs
from .model_types import transformers_model_in, unmeasured_type_of, unwrap_model
from .module_state import eval_mode
from .sharding import is_sharded

logger = logging.get_logger(__name__)

_MAX_ROWS, _MAX_POSITIONS = 2, 64  # part of the batch that the forwards run on
_NUM_COMPARED_POSITIONS = 16
_SEQUENCE_INPUTS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "seq_idx",
    "token_type_ids",
    "mm_token_type_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "decoder_attention_mask",
    "decoder_inputs_embeds",
}


@dataclass(frozen=True)
class LogitSample:
    """Hidden states and logits of the unmodified forward at n positions, on the CPU.

    hidden: [n, H] input of the output head
    logits: [n, V] logits of the model
    eps:    relative rounding error of the logits
    """

    hidden: Tensor
    logits: Tensor
    eps: float


@dataclass(frozen=True)
class OutputHead:
    """The output head of a model, as measured.

    module:  the head; None if the model has none
    scaling: scale and soft cap after the head; None if the logits have to be materialized
    reason:  why the logits have to be materialized, else ""
    sample:  logits of the unmodified forward, for the self-check
    hooks:   keys of the forward hooks of the head when it was measured
    """

    module: nn.Module | None
    scaling: LogitScaling | None
    reason: str = ""
    sample: LogitSample | None = None
    hooks: tuple[int, ...] = ()


_heads: WeakKeyDictionary[nn.Module, OutputHead] = WeakKeyDictionary()


def output_head(model: nn.Module, inputs: dict) -> OutputHead:
    """Return the output head of a model, measured at the first call and after the module or its hooks changed.

    Args:
        model: a model, with or without wrappers; under DDP, FSDP2 and ZeRO-3 every rank has to call it.
        inputs: keyword arguments of its forward.
    """
    inner = unwrap_model(model)
    head = _heads.get(inner)
    module = _named_head(inner) if head is None or hasattr(inner, "get_output_embeddings") else head.module
    if module is None and head is None and unmeasured_type_of(inner).vocabulary:
        module = _find_head(model, inner, inputs)
    obstacle = _obstacle(module)
    hooks = tuple(module._forward_hooks) if module is not None else ()
    if head is None or head.module is not module or head.hooks != hooks or (obstacle and not head.reason):
        if obstacle or not isinstance(module, nn.Linear):
            head = OutputHead(module, None, obstacle)
        else:
            head = _measure(model, inner, module, inputs)
        if not obstacle and not _on_all_ranks(inner, head.scaling is not None) and not head.reason:
            head = OutputHead(module, None, "on another process its logits differ from the lazy ones")
        _heads[inner] = head = replace(head, hooks=hooks)
        if head.reason and unmeasured_type_of(inner).vocabulary:
            _log_cost(inner, head.reason, inputs)
    return head


def head_module(model: nn.Module) -> nn.Module | None:
    """Return the output head that a model names, or that was found in a module outside transformers; None if none."""
    inner = unwrap_model(model)
    registered = _heads.get(inner)
    return _named_head(inner) or (None if registered is None else registered.module)


def _named_head(inner: nn.Module) -> nn.Module | None:
    getter = getattr(inner, "get_output_embeddings", None)
    return getter() if getter else None


def _find_head(model: nn.Module, inner: nn.Module, inputs: dict) -> nn.Module | None:
    """Return the last linear layer of a module whose output has the shape of its logits; None if there is none."""
    called: list[tuple[nn.Module, torch.Size]] = []
    hooks = [
        module.register_forward_hook(lambda module, _args, output: called.append((module, output.shape)))
        for module in inner.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with _short_forward(model):
            logits = _logits(model(**inputs), inner)
    finally:
        for hook in hooks:
            hook.remove()
    return next((module for module, shape in reversed(called) if logits is not None and shape == logits.shape), None)


def known_output_head(model: nn.Module) -> OutputHead | None:
    """Return what `output_head` measured for a model; None before its first forward."""
    return _heads.get(unwrap_model(model))


def forget_output_head(model: nn.Module) -> None:
    """Let the next forward measure the output head again, for example after its weights changed."""
    _heads.pop(unwrap_model(model), None)


def check_head_stays_gathered(model: nn.Module) -> None:
    """Check that FSDP2, if it shards a model, does not free the output head after the model's forward.

    FSDP2 tells this only in attributes of its groups of parameters. A model that is wrapped later is checked when its
    logits are first read, see `LazyLogits.check_weight`.

    Raises:
        DistillError: the head is freed.
    """
    getter = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    wrapped = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in wrapped if head is not None else []:
        state = module._get_fsdp_state()
        is_kept_by_default = module is wrapped[0] and state._auto_reshard_after_forward
        for group in state._fsdp_param_groups:
            holders = [
                holder for p in group.fsdp_params for holder in (p._module_info.module, *p._module_info.shared_modules)
            ]
            if group.post_forward_mesh_info is not None and not is_kept_by_default and head in holders:
                raise DistillError(RESHARDED_HEAD)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[Callable]:
    """Replace a module's forward in a `with` block; its hooks still run, also those that accelerate adds.

    Args:
        module: the module.
        forward: the replacement.

    Yields:
        the original forward.
    """
    name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    instance, original = module.__dict__.get(name), getattr(module, name)
    setattr(module, name, forward)
    try:
        yield original
    finally:
        if instance is None:
            delattr(module, name)
        else:
            setattr(module, name, instance)


def _obstacle(head: nn.Module | None) -> str:
    """Return why the class of a head rules lazy logits out, without a measurement; "" if it does not."""
    if head is None:
        return "the model names no output embeddings, and no linear layer of it returns the logits"
    if not isinstance(head, nn.Linear) or hasattr(head, "base_layer"):
        return f"its output head is a {type(head).__name__}, not a plain linear layer"
    if not head.weight.is_floating_point():
        return f"the weight of its output head is stored as {head.weight.dtype}"
    name = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
    replaced = head.__dict__.get(name)
    if replaced is not None and getattr(replaced, "__func__", None) is not nn.Linear.forward:
        return "the forward of its output head was replaced on the instance"
    if type(head).forward is not nn.Linear.forward:
        return f"its output head is a {type(head).__name__}, whose forward is not that of a linear layer"
    return ""


def _measure(model: nn.Module, inner: nn.Module, head: nn.Linear, inputs: dict) -> OutputHead:
    short = _shorten(without_images(inputs, unmeasured_type_of(inner).placeholders))
    try:
        return _compare(model, inner, head, inputs if short is None else short)
    except Exception:
        if short is None:
            raise
        return _compare(model, inner, head, inputs)  # the model cannot read a part of a row


def _shorten(inputs: dict) -> dict | None:
    """Return a few rows and positions of a batch; None if an input is not known to be [B, S]."""
    inputs = {name: value for name, value in inputs.items() if name not in FLASH_ATTENTION_INPUTS}  # of the full row
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if not tensors or not set(tensors) <= _SEQUENCE_INPUTS or any(t.dim() < 2 for t in tensors.values()):
        return None
    if len({len(t) for t in tensors.values()}) > 1:
        return None
    mask = inputs.get("attention_mask")
    left_padded = mask is not None and mask.dim() == 2 and bool((mask[:_MAX_ROWS, 0] == 0).any())
    window = slice(-_MAX_POSITIONS, None) if left_padded else slice(_MAX_POSITIONS)
    short = {}
    for name, value in tensors.items():
        if value.dim() > 2 and not name.endswith("inputs_embeds"):
            return None
        short[name] = value[:_MAX_ROWS, slice(_MAX_POSITIONS) if name.startswith("decoder_") else window]
    return inputs | short


def _compare(model: nn.Module, inner: nn.Module, head: nn.Linear, inputs: dict) -> OutputHead:
    sample: list[tuple[Tensor, Tensor, Tensor]] = []  # hidden states, lazy logits without scaling, positions
    outputs_of_head: list[Tensor] = []

    def record(hidden: Tensor) -> Tensor:
        outputs_of_head.append(original(hidden))
        flat = hidden.flatten(0, -2)
        positions = torch.linspace(0, len(flat) - 1, min(_NUM_COMPARED_POSITIONS, len(flat)), device=flat.device).long()
        lazy = LazyLogits.of_head(flat[positions], head.weight, head.bias)
        sample.append((lazy.hidden.clone(), lazy.project(), positions))
        return outputs_of_head[-1]

    with _short_forward(model):
        with replaced_forward(head, record) as original:
            outputs = model(**inputs)
        logits = _logits(outputs, inner)
        if reason := _shape_mismatch(outputs_of_head, logits):
            return OutputHead(head, None, reason)
        assert logits is not None
        hidden, raw, positions = sample[0]
        model_logits = logits.flatten(0, -2)[positions.to(logits.device)].to(raw.dtype)
        del outputs_of_head[1:]
        probe = _probe(outputs_of_head[0])
        parameters = _UsedParameters()
        with replaced_forward(head, lambda _hidden: parameters.enter(probe)), parameters.around(inner):
            outputs = model(**inputs)
        probe_logits = _logits(outputs, inner)
        if not isinstance(inner, PreTrainedModel) and not _accepts_placeholder(model, inner, head, inputs):
            return OutputHead(head, None, "its forward computes with the logits")
    is_half = logits.dtype.itemsize < 4 or hidden.dtype.itemsize < 4
    sampled = LogitSample(hidden.cpu(), model_logits.cpu(), max(torch.finfo(t.dtype).eps for t in (logits, hidden)))
    if parameters.used:
        return OutputHead(head, None, "it applies a trained parameter after its output head")
    described = transformers_model_in(inner)
    candidates = [LogitScaling()] if described is None else [LogitScaling.of(described.config), LogitScaling()]
    candidates = list(dict.fromkeys(candidates))
    for scaling in candidates:
        explains_probe = probe_logits is not None and _is_close(
            scaling.apply_(probe.to(raw.dtype)), probe_logits, probe_logits.dtype.itemsize < 4
        )
        if explains_probe and _is_close(scaling.apply_(raw.clone()), model_logits, is_half, is_product=True):
            return OutputHead(head, scaling, sample=sampled)
    return OutputHead(head, None, "its logits are not the output of its output head (the model applies a cap, scale, "
                      "bias or mask after it that hf_distill does not know)")  # fmt: skip


@contextmanager
def _short_forward(model: nn.Module) -> Iterator[None]:
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(d.index or 0 for d in devices)))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(eval_mode(model))
        yield


def _logits(outputs: object, inner: nn.Module) -> Tensor | None:
    try:
        return cast(Tensor, named_outputs(outputs, inner)["logits"])
    except DistillError:  # the first full forward raises it
        return None


def _accepts_placeholder(model: nn.Module, inner: nn.Module, head: nn.Linear, inputs: dict) -> bool:
    """Whether a module passes on any output of its head; one that computes with it fails, or returns another shape."""
    placeholder = head.weight.new_zeros(1, 1, 1)
    with replaced_forward(head, lambda _hidden: placeholder):
        try:
            outputs = model(**inputs)
        except Exception:  # any error of the module's own code
            return False
    logits = _logits(outputs, inner)
    return logits is not None and logits.shape == placeholder.shape


def _shape_mismatch(outputs_of_head: list[Tensor], logits: Tensor | None) -> str:
    if len(outputs_of_head) != 1:
        return f"its forward calls the output head {len(outputs_of_head)} times"
    if logits is None or logits.shape != outputs_of_head[0].shape:
        shape = None if logits is None else tuple(logits.shape)
        return f"its logits have shape {shape} and the output of its output head {tuple(outputs_of_head[0].shape)}"
    return ""


def _probe(like: Tensor) -> Tensor:
    """Return numbers that replace a head's output: each row has another standard deviation, from 0.01 to 50."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(like.shape, generator=generator)
    sizes = torch.logspace(-2, 1.7, values.shape[:-1].numel()).view(*values.shape[:-1], 1)
    return (values * sizes).to(like.device, like.dtype)


def _is_close(lazy: Tensor, logits: Tensor, is_half: bool, is_product: bool = False) -> bool:
    """Return whether lazy logits and those of the model differ by rounding only: each element, and the overall scale.

    Args:
        lazy: [..., V].
        logits: [..., V] of the model.
        is_half: whether a half-precision dtype rounded them.
        is_product: whether both are matrix products, whose rounding error is relative to the largest element of a row,
            and not to each element.
    """
    lazy, logits = lazy.double(), logits.to(lazy.device).double()
    if not torch.equal(lazy == -torch.inf, logits == -torch.inf):
        return False
    finite = lazy.isfinite() & logits.isfinite()
    lazy, logits = lazy.where(finite, 0), logits.where(finite, 0)
    tolerance = 3e-2 if is_half else 2e-3  # TF32 has a relative error of 1e-3
    size = logits.abs().amax(-1, keepdim=True) if is_product else logits.abs()
    if ((lazy - logits).abs() > tolerance * size + 1e-6).any():
        return False
    square = logits.square().sum()
    return bool(((lazy - logits) * logits).sum().abs() <= tolerance / 8 * square) if square > 0 else True


class _UsedParameters(TorchFunctionMode):
    """Records whether a trained parameter is applied to the head's output before the model's forward ends.

    Tensors computed from the head's output, and tensors computed from trained parameters, are tracked. An operation on
    one of each sets `used`; hooks that only move parameters, such as those of ZeRO-3, do not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used, self._active = False, False
        self._from_head: dict[int, Tensor] = {}
        self._from_parameters: dict[int, Tensor] = {}  # both hold their tensors, so that no id is reused

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        from_head = any(id(t) in self._from_head for t in tensors)
        from_parameters = any(
            id(t) in self._from_parameters or (isinstance(t, nn.Parameter) and t.requires_grad) for t in tensors
        )
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if outputs and from_head and from_parameters:
            self.used = True
        for tensor in outputs:
            if from_head:
                self._from_head[id(tensor)] = tensor
            if from_parameters and not isinstance(tensor, nn.Parameter):
                self._from_parameters[id(tensor)] = tensor
        return result

    def enter(self, probe: Tensor) -> Tensor:
        """Start tracking and return a copy of the probe, which replaces the head's output."""
        probe = probe.clone()
        self._from_head[id(probe)] = probe
        if not self._active:
            self._active = True
            self.__enter__()
        return probe

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """Stop tracking when the model's forward ends."""
        hook = model.register_forward_hook(lambda *_: self._leave(), always_call=True)
        try:
            yield
        finally:
            hook.remove()
            self._leave()

    def _leave(self) -> None:
        if self._active:
            self._active = False
            self.__exit__(None, None, None)


def _on_all_ranks(model: nn.Module, possible: bool) -> bool:
    """Return whether lazy logits are possible on all ranks, since the ranks of a sharded model have to do the same."""
    if not is_sharded(model) or not dist.is_initialized():
        return possible
    flag = torch.tensor(possible, dtype=torch.int32, device=next(model.parameters()).device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def _log_cost(model: nn.Module, reason: str, inputs: dict) -> None:
    ids = next((inputs[k] for k in ("decoder_input_ids", "input_ids") if isinstance(inputs.get(k), Tensor)), None)
    vocab_size = unmeasured_type_of(model).num_outputs(model)
    cost = ""
    if ids is not None and vocab_size is not None:
        mebibytes = ids.numel() * vocab_size * 4 / 2**20
        cost = f", {ids.numel()} x {vocab_size} float32 numbers ({mebibytes:.0f} MiB) for this batch"
    logger.warning_once(
        f"The logits of {type(model).__name__} are materialized{cost}, because {reason}. The objective is the same; "
        "each step takes more memory."
    )
