"""Checks on small random models that the units which were found can be removed.

Two properties are checked on logits: setting all weights of some neurons or heads to 0 is the same as removing them,
and a model in which all hidden channels exist twice, with half the weight where they are read, is the same model.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..errors import DistillError
from .pruned_shape import KeptUnits
from .width_axes import KIND_OF_SIZE, WidthStructure
from .width_probe import probe_structure, reads_units, with_head_dim

_VOCAB, _TOKENS, _NEURONS, _CHANNELS_PER_HEAD = 32, 6, 5, 8
_TOLERANCE = 1e-3  # of the largest logit; an error in the layout changes the logits by their own size


def check_units(
    model_class: type[PreTrainedModel], config: PretrainedConfig, structure: WidthStructure
) -> WidthStructure:
    """Return a structure without the sizes whose units cannot be removed, and with the scale of the embeddings.

    Args:
        model_class: class of the model.
        config: its config.
        structure: see `probe_structure`.
    """
    small = _small_config(config, structure)
    missing = dict(structure.missing)
    is_scaled = False
    try:
        twin = _Twin(model_class, small)
    except Exception as error:
        reason = f"a small model of its class, which checks the units, cannot be run ({error})"
        return replace(structure, sizes={}, missing=missing | dict.fromkeys(structure.sizes, reason))
    for size in structure.sizes:
        if size not in KIND_OF_SIZE or size == "num_experts":
            continue  # a router chooses among the experts that are left, and each has an index of its own
        try:
            if size == "hidden_size":
                is_scaled = twin.check_channels()
            else:
                twin.check_zeros(size)
        except DistillError as error:
            missing[size] = str(error)
        except Exception as error:
            missing[size] = f"a small model of its class with another number of them cannot be run ({error})"
    sizes = {name: value for name, value in structure.sizes.items() if name not in missing}
    return replace(structure, sizes=sizes, missing=missing, scaled_embeddings=is_scaled)


def _small_config(config: PretrainedConfig, structure: WidthStructure) -> PretrainedConfig:
    """Return the config of a small model with the units of a structure: at most two key-value groups, few neurons."""
    small = with_head_dim(config)
    text = small.get_text_config()
    sizes = structure.sizes
    heads = 1
    if "num_attention_heads" in sizes:
        groups = min(2, sizes["num_key_value_heads"])
        heads = groups * structure.heads_per_group
        text.num_attention_heads = heads
        if getattr(text, "num_key_value_heads", None) is not None:
            text.num_key_value_heads = groups
    if "hidden_size" in sizes:
        text.hidden_size = heads * _CHANNELS_PER_HEAD
    for size in ("intermediate_size", "moe_intermediate_size"):
        if size in sizes:
            setattr(text, size, _NEURONS)
    text.vocab_size, text.pad_token_id, text.tie_word_embeddings = _VOCAB, 0, False
    small.tie_word_embeddings = False
    small._attn_implementation = small._experts_implementation = "eager"
    return small


class _Twin:
    """A small model of a class with random weights.

    Args:
        model_class: class of the model.
        config: config of the small model.
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PretrainedConfig):
        self.model_class = model_class
        self.config = config
        self.structure = probe_structure(model_class, config)
        self.generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, _VOCAB, (2, _TOKENS), generator=self.generator)
        self.state = {
            name: torch.randn(shape, generator=self.generator) * 0.3 for name, shape in self.structure.shapes.items()
        }
        self.logits = self._run(config, self.state)

    def check_zeros(self, size: str) -> None:
        """Check that units can be removed: neurons or heads.

        Raises:
            DistillError: the logits are not those of a model in which their weights are 0.
        """
        kind, structure = KIND_OF_SIZE[size], self.structure
        if kind == "heads" and structure.sizes["num_key_value_heads"] == 1:
            return  # no head can be removed
        groups = [group for group, of_size in structure.groups(kind).items() if of_size == size]
        units = {group: self._choose_units(size) for group in groups}
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        setattr(text, size, len(units[groups[0]]))
        if kind == "heads" and getattr(text, "num_key_value_heads", None) is not None:
            text.num_key_value_heads = 1
        kept = KeptUnits.from_json({kind: units})
        zeroed, narrow = {}, {}
        for name, value in self.state.items():
            axes = structure.axes[name]
            zeroed[name] = value.clone()
            for dim, axis in enumerate(axes):
                if axis is not None and axis.size == size:
                    is_kept = torch.zeros(value.shape[dim]).index_fill(
                        0, structure.entries(axis, units[axis.group]), 1.0
                    )
                    zeroed[name] *= is_kept.unflatten(0, (-1, *[1] * (value.dim() - dim - 1)))
            narrow[name] = structure.narrow(value, axes, kept)
        if not _are_close(self._run(self.config, zeroed), self._run(config, narrow)):
            raise DistillError(
                f"in a small random model of its class, removing {kind} differs from setting their weights to 0: they "
                "share a norm, or their order in a weight is not known"
            )

    def _choose_units(self, size: str) -> list[int]:
        """Return random units to keep: three neurons, or the heads of one of two key-value groups."""
        if size == "num_attention_heads":
            count = self.structure.heads_per_group
            first = int(torch.randint(2, (1,), generator=self.generator)) * count
            return list(range(first, first + count))
        return sorted(torch.randperm(_NEURONS, generator=self.generator)[:3].tolist())

    def check_channels(self) -> bool:
        """Check the hidden channels; return whether the model multiplies its embeddings by sqrt(hidden_size).

        Raises:
            DistillError: the logits of the model with two copies of each channel are not the same.
        """
        config = copy.deepcopy(self.config)
        config.get_text_config().hidden_size *= 2
        model = self._build(config)
        double = {name: self._doubled(model, name, value) for name, value in self.state.items()}
        if _are_close(self._run(config, double), self.logits):
            return False
        embeddings = [
            name
            for name, value in double.items()
            if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
            and value.shape != self.state[name].shape
        ]
        scaled = double | {name: double[name] * 0.5**0.5 for name in embeddings}
        if _are_close(self._run(config, scaled), self.logits):
            return True
        raise DistillError(
            "in a small random model of its class, two copies of each hidden channel change the logits: something else "
            "than its weights depends on the hidden size"
        )

    def _doubled(self, model: nn.Module, name: str, value: Tensor) -> Tensor:
        for dim, axis in enumerate(self.structure.axes[name]):
            if axis is not None and axis.kind == "channels":
                value = torch.cat([value, value], dim) * (0.5 if reads_units(model, name, dim) else 1)
        return value

    def _build(self, config: PretrainedConfig) -> nn.Module:
        with no_init_weights():
            return self.model_class(copy.deepcopy(config))

    @torch.no_grad()
    def _run(self, config: PretrainedConfig, state: dict[str, Tensor]) -> Tensor:
        model = self._build(config).float().eval()
        differing = model.load_state_dict(state, strict=False)  # buffers whose sizes do not change keep their values
        assert not differing.unexpected_keys
        return model(input_ids=self.ids, use_cache=False).logits


def _are_close(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() <= _TOLERANCE * first.abs().max())
