"""Layer pruning: students that are their teacher with fewer layers."""

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import DistillError
from .blocks import find_blocks, get_layer_stack
from .model_types import unwrap_model
from .pruned_origin import PrunedOrigin, record_origin

Value = TypeVar("Value")


class InfluenceRecorder:
    """Sums what `block_influence` measures while a model runs, from the hooks of its layers.

    Args:
        model: a model whose layers `find_blocks` finds.
        hooks: stack that removes the hooks when it is closed.
    """

    def __init__(self, model: nn.Module, hooks: ExitStack):
        _, blocks = find_blocks(model)
        self.device = next(model.parameters()).device
        self.sums = torch.zeros(len(blocks), dtype=torch.float64, device=self.device)
        self.count = 0
        self._mask: Tensor | None = None
        for i, block in enumerate(blocks):
            hooks.callback(block.register_forward_hook(self._hook(i), with_kwargs=True).remove)

    def start_batch(self, mask: Tensor) -> None:
        """Set the tokens of the next batch that are counted, a boolean [B, S]."""
        self._mask = mask
        self.count += int(mask.sum())

    def influence(self) -> list[float]:
        """Return the influence of each layer on all tokens so far.

        Raises:
            DistillError: there was no token.
        """
        if self.count == 0:
            raise DistillError("block_influence needs at least one batch with a token in it.")
        return (self.sums / self.count).tolist()

    def _hook(self, i: int) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            self.sums[i] += (1 - cosine)[self._mask].double().sum().to(self.device)

        return record


def run_on_batches(model: nn.Module, batches: Iterable[dict], start_batch: Callable[[Tensor], None]) -> None:
    """Run a model on calibration batches, without dropout and gradients.

    Args:
        model: a model that reads tokens.
        batches: inputs, `input_ids` [B, S] and optionally `attention_mask` [B, S].
        start_batch: called before each forward with the tokens that are counted, a boolean [B, S].
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                inputs = {k: v.to(device) for k, v in batch.items() if k in ("input_ids", "attention_mask")}
                start_batch(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool())
                model(**inputs)
    finally:
        model.train(training)


def block_influence(model: nn.Module, batches: Iterable[dict]) -> list[float]:
    """Block influence: how much each layer changes its hidden states.

    1 - mean over tokens of cos(input of the layer, output of the layer)

    Args:
        model: a model whose layers `find_blocks` finds.
        batches: inputs, `input_ids` [B, S] and optionally `attention_mask` [B, S]; masked tokens are not counted.

    Returns:
        one number for each layer, in [0, 2]; removing the layer with the smallest changes the model least.

    Raises:
        DistillError: there is no batch with a token.

    Source: ShortGPT, arXiv 2403.03853.
    """
    with ExitStack() as hooks:
        recorder = InfluenceRecorder(model, hooks)
        run_on_batches(model, batches, recorder.start_batch)
    return recorder.influence()


def cut_student(
    teacher: nn.Module,
    layers: Sequence[int] | None = None,
    *,
    encoder_layers: Sequence[int] | None = None,
    decoder_layers: Sequence[int] | None = None,
) -> PreTrainedModel:
    """Copy a teacher with only some of its layers, in their order; the teacher is not changed.

    Args:
        teacher: a transformers model.
        layers: indices of the layers to keep, each once; layer 0 is the first after the embeddings. For a model that
            has an encoder and a decoder, use the other arguments.
        encoder_layers: the same for the encoder of a model that has both; None keeps all of its layers.
        decoder_layers: the same for the decoder of a model that has both; None keeps all of its layers.

    Returns:
        a model of the teacher's class in training mode, whose config has the new number of layers.

    Raises:
        DistillError: an index does not exist or is repeated, or there is no index; the arguments are those of another
            kind of model; the teacher is quantized; or a layer that is left out has weights that the student needs.
    """
    model = unwrap_model(teacher)
    if getattr(model, "quantization_method", None) is not None:
        raise DistillError(
            f"{type(model).__name__} is quantized, and its weights cannot be copied into a student: load it in "
            "bfloat16 or float32 to prune it. A run with a quantized student keeps its weights in student-unquantized."
        )
    cuts = find_cuts(model, {None: layers, "encoder": encoder_layers, "decoder": decoder_layers})
    config = model.config
    for cut in cuts:
        config = prune_config(config, cut.keep, cut.depth, cut.stack)
    state = model.state_dict()
    for cut in cuts:
        state = cut.rename(state)
    return student_of(model, config, state, cuts)


def student_of(
    model: PreTrainedModel,
    config: PretrainedConfig,
    state: Mapping[str, Tensor],
    cuts: Sequence["BlockCut"],
    channels: Sequence[int] | None = None,
) -> PreTrainedModel:
    """Build a student of its teacher's class, with the teacher's generation config, in training mode.

    Args:
        model: the teacher.
        config: config of the student.
        state: weights of the student.
        cuts: which layers were kept.
        channels: which hidden channels were kept; None: all.

    Raises:
        DistillError: the student needs other weights.
    """
    student = type(model)(config)
    differing = cast(nn.Module, student).to(model.dtype).load_state_dict(state, strict=False)
    if differing.missing_keys or differing.unexpected_keys:
        names = ", ".join([*differing.missing_keys, *differing.unexpected_keys][:3])
        raise DistillError(
            f"{type(model).__name__} cannot be cut to these layers: its layers have different weights ({names}). Keep "
            "layer 0, which may hold weights that all layers share, such as relative position biases."
        )
    student.tie_weights()
    generation_config = copy.deepcopy(model.generation_config) if model.can_generate() else None
    for cut in cuts if generation_config is not None else ():
        if cut.stack == "decoder" and (heads := getattr(generation_config, "alignment_heads", None)):
            # Whisper reads the times of words from these heads, each a pair (layer of the decoder, head).
            kept = [[cut.keep.index(block), head] for block, head in heads if block in cut.keep]
            setattr(generation_config, "alignment_heads", kept or None)  # noqa: B010  # no attribute of the class
    student.generation_config = generation_config  # type: ignore[assignment]
    record_origin(student, _origin(model, cuts, channels))
    return student.train()


def _origin(model: PreTrainedModel, cuts: Sequence["BlockCut"], channels: Sequence[int] | None) -> PrunedOrigin:
    """Return what a student consists of; a stack that is not cut is kept whole."""
    depths: dict[str | None, int] = {cut.stack: cut.depth for cut in cuts}
    layers: dict[str | None, tuple[int, ...]] = {cut.stack: tuple(cut.keep) for cut in cuts}
    of_both: tuple[str | None, ...] = ("encoder", "decoder")
    for stack in (None,) if not cuts else of_both if None not in depths else ():
        depths.setdefault(stack, len(get_layer_stack(model, stack).blocks))
        layers.setdefault(stack, tuple(range(depths[stack])))
    width = getattr(model.config.get_text_config(), "hidden_size", 0)
    return PrunedOrigin(depths, layers, width, None if channels is None else tuple(channels))


@dataclass(frozen=True)
class BlockCut:
    """Which layers of a stack are kept.

    stack: "encoder" or "decoder" of a model that has both, else None
    name:  name of the list of layers inside the model
    keep:  indices of the layers to keep, ascending
    depth: number of layers
    """

    stack: str | None
    name: str
    keep: list[int]
    depth: int

    def rename(self, state: Mapping[str, Value]) -> dict[str, Value]:
        """Return the entries of a model's weights without those of other layers, under their names in the student."""
        new_index = {old: new for new, old in enumerate(self.keep)}
        pattern = re.compile(rf"^{re.escape(self.name)}\.(\d+)\.")
        renamed = {}
        for key, value in state.items():
            match = pattern.match(key)
            if match is None:
                renamed[key] = value
            elif int(match[1]) in new_index:
                renamed[f"{self.name}.{new_index[int(match[1])]}.{key[match.end() :]}"] = value
        return renamed


def find_cuts(model: PreTrainedModel, layers: Mapping[str | None, Sequence[int] | None]) -> list[BlockCut]:
    """Return the cuts of a model.

    Args:
        model: a transformers model, without wrappers.
        layers: stack -> the layers to keep; None keeps all.

    Raises:
        DistillError: see `cut_student`.
    """
    chosen = {stack: indices for stack, indices in layers.items() if indices is not None}
    has_both = model.config.is_encoder_decoder and model not in (model.get_encoder(), model.get_decoder())
    if not chosen or has_both == (None in chosen):
        possible = "encoder_layers, decoder_layers, or both" if has_both else "layers"
        raise DistillError(
            f"{type(model).__name__} has {'an encoder and a decoder' if has_both else 'one stack of layers'}: pass "
            f"{possible} to choose the layers to keep."
        )
    cuts = []
    for stack, indices in chosen.items():
        name, blocks = find_blocks(model) if stack is None else _blocks_of_stack(model, stack)
        depth = len(blocks)
        keep = check_kept_blocks(indices, depth, stack)
        cuts.append(BlockCut(stack, name, keep, depth))
    return cuts


def check_kept_blocks(indices: Sequence[int], depth: int, stack: str | None = None) -> list[int]:
    """Return the indices of the layers to keep, ascending.

    Args:
        indices: Indices of the layers.
        depth: Number of layers of the teacher, or of the stack.
        stack: "encoder" or "decoder" of a model that has both, else None.

    Raises:
        DistillError: There is no index, or one does not exist or is repeated.
    """
    keep = sorted(indices)
    if not keep or len(set(keep)) != len(keep) or keep[0] < 0 or keep[-1] >= depth:
        argument = "layers" if stack is None else f"{stack}_layers"
        raise DistillError(
            f"{argument} is {list(indices)}: give each layer to keep once, from 0 to {depth - 1} (the "
            f"{stack or 'teacher'} has {depth})."
        )
    return keep


def _blocks_of_stack(model: PreTrainedModel, stack: str) -> tuple[str, nn.ModuleList]:
    blocks = get_layer_stack(model, stack).blocks
    return next(name for name, module in cast(nn.Module, model).named_modules() if module is blocks), blocks


def top_layers(influence: Sequence[float], keep_layers: int) -> list[int]:
    """Return the indices of the layers with the largest influence, in ascending order.

    Args:
        influence: see `block_influence`.
        keep_layers: number of layers.

    Raises:
        DistillError: keep_layers is not from 1 to the number of layers.
    """
    if not 0 < keep_layers <= len(influence):
        raise DistillError(
            f"keep_layers is {keep_layers}; the teacher has {len(influence)} layers: give a number from 1 to "
            f"{len(influence)}."
        )
    by_influence = sorted(range(len(influence)), key=lambda i: influence[i], reverse=True)
    return sorted(by_influence[:keep_layers])


def prune_config(
    config: PretrainedConfig, keep: Sequence[int], depth: int, stack: str | None = None
) -> PretrainedConfig:
    """Return the config of a model with only some of its layers.

    Args:
        config: config of the model.
        keep: indices of the layers to keep.
        depth: number of layers of the model, or of the stack.
        stack: "encoder" or "decoder" of a model that has both, else None.

    Raises:
        DistillError: the config has no number of layers for the stack.
    """
    config = copy.deepcopy(config)
    part = config if stack is None else getattr(config, stack, None)
    if isinstance(part, PretrainedConfig):  # a config of the whole model, or one for each stack
        text = part.get_text_config()
        for key, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == depth:  # layer_types and other lists with an entry per layer
                setattr(text, key, [value[i] for i in keep])
        text.num_hidden_layers = len(keep)
        return config
    names = [f"{stack}_layers", f"num_{stack}_layers", *(["num_layers"] if stack == "encoder" else [])]
    name = next((name for name in names if name in vars(config)), None)
    if name is None:
        raise DistillError(
            f"{type(config).__name__} has none of {', '.join(names)}, so the {stack} cannot be cut: build the student "
            "from a config and load the weights yourself."
        )
    setattr(config, name, len(keep))
    return config
