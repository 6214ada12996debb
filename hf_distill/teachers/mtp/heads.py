"""Multi-token prediction heads: modules that predict, at each position, the tokens after the next one."""

import copy
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from ...core.files import write_atomic
from ...errors import DistillError
from ...models.blocks import find_blocks
from ...models.finite_weights import check_finite
from ...models.model_types import is_zero3_partitioned, model_type_of, unwrap_model, unwrap_parallel

WEIGHTS, SETTINGS = "mtp.safetensors", "mtp.json"


class MTPHeads(nn.Module):
    """A chain of modules, each of which reads one more token than the one before and predicts the token after it.

    h^d_i = block_d(project_d([norm(h^(d-1)_i); norm(embed(token i + d))])), d = 1..k
    logits of token i + d + 1 = head(norm(h^d_i)), with the model's own embedding and output head

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.2.
    """

    def __init__(self, student: nn.Module, heads: int):
        """Initialize each module from the student's last layer and final norm, without random numbers.

        Args:
            student: a causal language model, with or without parallel wrappers; it is not changed.
            heads: k, how many tokens after the next one are predicted.

        Raises:
            DistillError: `heads` is below 1, or the last layer or output head of the student is not supported.
        """
        super().__init__()
        if heads < 1:
            raise DistillError(f"heads is {heads}: give how many tokens after the next one are predicted, 1 or more.")
        _check(student)
        parent, blocks = find_blocks(student)
        self.settings = _settings(student, heads)
        norm = _final_norm(
            unwrap_model(student).get_submodule(parent.rpartition(".")[0]), blocks, self.settings["hidden_size"]
        )
        self.depths = nn.ModuleList(MTPModule(blocks[-1], norm, self.settings["hidden_size"]) for _ in range(heads))
        self.requires_grad_(True)

    def __len__(self) -> int:
        return len(self.depths)

    def forward(
        self, hidden: Tensor, input_ids: Tensor, embed: nn.Module, block_kwargs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Return the inputs of the output head that predict token i + d + 1 at position i, for d = 1..k.

        Args:
            hidden: [B, S, H] inputs of the model's output head.
            input_ids: [B, S]; the last d positions of a row have no token i + d, so their outputs are meaningless.
            embed: the model's input embedding.
            block_kwargs: arguments of the model's last layer; see `record_last_block_kwargs`.

        Returns:
            k tensors [B, S, H].
        """
        embedded, rows = embed(input_ids), []
        for d, module in enumerate(self.depths, 1):
            # The first tokens of the row are moved to its end, where a causal mask hides them from the others.
            hidden, row = module(hidden, embedded.roll(-d, dims=1), block_kwargs)
            rows.append(row)
        return rows


class MTPModule(nn.Module):
    """One module of the chain; after initialization it is the student's last layer applied to the hidden states."""

    def __init__(self, block: nn.Module, norm: nn.Module, width: int):
        super().__init__()
        like = next(block.parameters())
        self.norm_hidden, self.norm_token, self.norm_out = (_copy(norm).to(like) for _ in range(3))
        self.project = nn.utils.skip_init(nn.Linear, 2 * width, width, bias=False, device=like.device, dtype=like.dtype)
        self.block = _copy(block)
        nn.init.eye_(self.project.weight)  # the last layer gets the hidden states unchanged, as in the student

    def forward(self, hidden: Tensor, tokens: Tensor, block_kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the inputs of the next module and of the output head, both [B, S, H].

        Args:
            hidden: [B, S, H] output of the previous module, or of the model.
            tokens: [B, S, H] embeddings of the tokens d positions later.
            block_kwargs: see `MTPHeads.forward`.
        """
        hidden_and_tokens = torch.cat([self.norm_hidden(hidden), self.norm_token(tokens)], dim=-1)
        outputs = self.block(self.project(hidden_and_tokens), **block_kwargs)
        hidden = outputs[0] if isinstance(outputs, tuple) else outputs
        return hidden, self.norm_out(hidden)


@contextmanager
def record_last_block_kwargs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Record the arguments of the model's last layer by name, without its hidden states and without a KV cache.

    Args:
        model: a transformers model, with or without wrappers; run it inside the context, without past key values.
    """
    block = find_blocks(model)[1][-1]
    names = [name for name in inspect.signature(type(block).forward).parameters if name != "self"]
    block_kwargs: dict[str, Any] = {}

    def record(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        arguments.pop(names[0], None)
        block_kwargs.clear()
        block_kwargs.update((name, None if isinstance(value, Cache) else value) for name, value in arguments.items())

    hook = block.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield block_kwargs
    finally:
        hook.remove()


def save_heads(heads: MTPHeads, folder: str | Path) -> None:
    """Write `mtp.safetensors` and `mtp.json` into a folder, which may be that of the student.

    Raises:
        RunError: some weights of the heads are not finite; nothing is written.
    """
    folder, state = Path(folder), heads.state_dict()
    buffers = state.keys() - dict(heads.named_parameters()).keys()
    advice = "Resume from a checkpoint with a smaller learning_rate."
    check_finite(state, folder, owner="the heads", advice=advice, buffers=buffers)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, folder / WEIGHTS)
    write_atomic(folder / SETTINGS, json.dumps(heads.settings, indent=2) + "\n")


def load_heads(student: nn.Module, folder: str | Path) -> MTPHeads:
    """Read what `save_heads` wrote.

    Args:
        student: the model that the heads were trained with.
        folder: the folder that holds the two files.

    Raises:
        DistillError: the folder has no heads, or the heads of another model.
    """
    folder = Path(folder)
    missing = [name for name in (WEIGHTS, SETTINGS) if not (folder / name).is_file()]
    if missing:
        raise DistillError(f"{folder} has no {' and no '.join(missing)}: give a folder that `save_heads` wrote to.")
    settings = json.loads((folder / SETTINGS).read_text())
    expected = _settings(student, settings.get("heads", 1))
    if settings != expected:
        raise DistillError(
            f"The heads in {folder} have the settings {settings}, and heads of this student have {expected}: load "
            "heads that were trained with this student."
        )
    heads, state = MTPHeads(student, settings["heads"]), load_file(folder / WEIGHTS)
    wrong = [
        name for name, value in heads.state_dict().items() if name not in state or state[name].shape != value.shape
    ]
    wrong += [name for name in state if name not in heads.state_dict()]
    if wrong:
        raise DistillError(
            f"{folder / WEIGHTS} does not fit {type(unwrap_model(student)).__name__}: {len(wrong)} tensors are "
            f"missing, of another shape or unknown (first: {wrong[0]}). Load heads with the "
            "student they were trained with."
        )
    heads.load_state_dict(state)
    return heads


def _check(student: nn.Module) -> None:
    """Raise a DistillError if heads cannot be made from the student."""
    model = unwrap_model(student)
    name, model_type = type(model).__name__, model_type_of(model)
    if not model_type.shifts_labels:
        raise DistillError(
            f"{name} is {model_type.with_article}, and multi-token prediction predicts the tokens after the next one: "
            "use a causal language model."
        )
    if not isinstance(model, PreTrainedModel):
        raise DistillError(
            f"{name} is no transformers model, and multi-token prediction needs its embedding, its output head and its "
            "layers: use a transformers model as student, or another teacher."
        )
    if unwrap_parallel(student) is not model or any(hasattr(module, "base_layer") for module in model.modules()):
        raise DistillError(
            f"{name} has adapters, and multi-token prediction trains a copy of its last layer: merge the adapters "
            "first (`merge_and_unload()`), or train the full student."
        )
    if getattr(model, "is_quantized", False) or is_zero3_partitioned(model):
        state = "is partitioned by ZeRO-3" if is_zero3_partitioned(model) else "is quantized"
        raise DistillError(
            f"{name} {state}, and multi-token prediction trains a copy of its last layer, which needs unsharded "
            "floating-point weights: make the heads from a student that is loaded in bf16 or fp32."
        )
    head, width = model.get_output_embeddings(), _settings(model, 1)["hidden_size"]
    embed: Any = model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or {head.in_features, embed.weight.shape[-1]} != {width}:
        raise DistillError(
            f"{name} has the output head {head} and the embedding {embed}: multi-token prediction uses both, so both "
            f"must have the model's hidden size, {width}, and the head must be a linear layer."
        )


def _settings(model: nn.Module, heads: int) -> dict[str, Any]:
    config = unwrap_model(model).config
    return {"heads": heads, "model_type": config.model_type, "hidden_size": config.get_text_config().hidden_size}


def _final_norm(parent: nn.Module, blocks: nn.ModuleList, width: int) -> nn.Module:
    """Return the norm after the layers: the only sibling whose parameters are all [H]; a new norm if there is none."""
    siblings = [child for child in parent.children() if child is not blocks]
    norms = [child for child in siblings if {tuple(p.shape) for p in child.parameters()} == {(width,)}]
    return norms[0] if len(norms) == 1 else nn.RMSNorm(width, eps=1e-6)


def _copy(module: nn.Module) -> nn.Module:
    """Copy a module without its hooks, whose owners would be copied too; the config is shared with the original."""
    memo: dict[int, Any] = {}
    for inner in module.modules():
        for name, value in vars(inner).items():
            if isinstance(value, PreTrainedConfig):
                memo[id(value)] = value
            elif name.startswith(("_forward_", "_backward_")) and isinstance(value, dict):
                memo[id(value)] = type(value)()
    return copy.deepcopy(module, memo)
