"""`ServedTeacher`: computes hidden states of rows of token ids with a frozen model.

Shape letters are those of `hf_distill.core.targets`: B rows, S positions, T target tokens, V vocabulary, H width.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..cache.fingerprints import tokenizer_fingerprint, weights_fingerprint
from ..core.devices import default_device
from ..core.logits import LazyLogits
from ..core.references import public_name
from ..core.signals import FeatureKey, Signals
from ..core.targets import Targets
from ..errors import DistillError
from ..models.blocks import get_layer_stack
from ..models.forward import extract_signals
from ..models.model_call import accepted_inputs
from ..models.model_types import model_type_of, unwrap_model
from ..models.output_head import known_output_head
from ..models.placement import input_device
from ..recipe.models import TeacherSpec
from ..runner.model_factory import build_frozen_teacher
from ..runner.model_loading import load_tokenizer_if_any, model_without_weights, resolve_model
from ..teachers.input_limits import InputLimits
from ..teachers.pretrained import as_path, read_config
from ..teachers.remote.api import RowTensors, TokenRow
from ..teachers.remote.wire import DTYPES, HeadTensors, TeacherInfo, layer_name

logger = logging.get_logger(__name__)
_PROBE_TOKENS = 16  # of the forward at the start, which measures the output head
_MAX_CHANGE = 0.1  # of hidden states by later tokens, relative to their norm; rounding changes them by less


class ServedTeacher:
    """A frozen causal language model that answers for rows of token ids; one thread calls it.

    Args:
        model: the model in eval mode, on its devices.
        name: id or path of the model.
        tokenizer: its tokenizer, or None.
        revision: commit of the id.
        quantization: nf4, int8, or None.
        max_batch_tokens: largest number of tokens of a forward, with padding.

    Raises:
        DistillError: the model is no causal language model, or its logits are not computed from its last hidden states
            by a linear output head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        quantization: str | None = None,
        max_batch_tokens: int,
    ):
        model_type = model_type_of(model)
        if not model_type.is_decoder:
            raise DistillError(
                f"{name} is {model_type.with_article}, and only causal language models can be served: use it as a "
                "local teacher."
            )
        self.model, self.tokenizer = model, tokenizer
        limits = InputLimits.of(model, model)
        self._fill = limits.fill
        positions = limits.positions or getattr(model.config.get_text_config(), "max_position_embeddings", None)
        context_length = min(positions or max_batch_tokens, max_batch_tokens)
        row = _probe_row(
            limits.ids or model_type.vocabulary_size(unwrap_model(model), "hf-distill serve"), context_length
        )
        logits = self._probe(name, row)
        depth, layer_width = self._probe_layers(name, row)
        self.head = HeadTensors(logits.weight, logits.bias, logits.scaling)
        self.info = TeacherInfo(
            model=public_name(name) or name,
            revision=revision,
            quantization=quantization,
            dtype=_name_of_dtype(logits.hidden.dtype),
            width=logits.hidden.shape[-1],
            depth=depth,
            layer_width=layer_width,
            vocab_size=logits.vocab_size,
            embeddings=limits.ids or logits.vocab_size,
            context_length=context_length,
            max_request_tokens=max_batch_tokens,
            tokenizer=tokenizer_fingerprint(tokenizer),
            weights=weights_fingerprint(model),
            head=self.head.digest(),
        )

    def _probe(self, name: str, row: TokenRow) -> LazyLogits:
        """Run a short forward of a row and its first half, by which the output head is measured.

        Raises:
            DistillError: the logits are not lazy, or depend on later tokens, which clients do not send.
        """
        length, half = len(row.ids), len(row.ids) // 2
        logits = self._forward([row, TokenRow(row.ids[:half], row.positions[:half])]).logits
        if not isinstance(logits, LazyLogits):
            head = known_output_head(self.model)
            raise DistillError(
                f"{name} cannot be served, because {head.reason if head else 'its output head is not known'}: its "
                "logits cannot be computed from its last hidden states. Use it as a local teacher, or write a cache of "
                "kind top_k or sampled."
            )
        full_row, first_half = logits.hidden[:half].float(), logits.hidden[length:].float()
        if (full_row - first_half).norm() > _MAX_CHANGE * full_row.norm():
            raise DistillError(
                f"{name} cannot be served, because its predictions depend on later tokens of a row: it is no causal "
                "language model (of an encoder such as BERT, is_decoder is false in its config)."
            )
        return logits

    def _probe_layers(self, name: str, row: TokenRow) -> tuple[int, int]:
        """Return the number of layers whose outputs can be requested, and their width; (0, 0) if they cannot be read.

        A model without them is served for losses on logits.
        """
        try:
            depth = len(get_layer_stack(self.model).blocks)
            features = self._forward([replace(row, layers=tuple(range(depth)))]).features
            widths = {feature.shape[-1] for feature in features.values()}
            if len(features) != depth or len(widths) != 1:
                raise DistillError(f"{len(features)} of {depth} layers were run, and their widths are {sorted(widths)}")
        except DistillError as error:
            logger.warning(f"{name} is served without the outputs of its layers, which cannot be read: {error}")
            return 0, 0
        return depth, widths.pop()

    def compute_rows(self, rows: Sequence[TokenRow]) -> list[RowTensors]:
        """Return tensors of the target tokens of each row, [T, H] on the CPU, by the names of `wire.tensor_widths`.

        These are the input of the output head, and the outputs of the layers that the row requests. Rows may request
        different ones; one forward returns those of all.

        Args:
            rows: rows within the limits of `info`.
        """
        signals = self._forward(rows)
        assert isinstance(signals.logits, LazyLogits)
        hidden = signals.logits.hidden.split([len(row.positions) for row in rows])
        tensors: list[RowTensors] = [{"hidden_states": each} for each in hidden]
        for layer, indices in _rows_by_layer(rows).items():
            parts = signals.features[FeatureKey("hidden", layer)].split([len(hidden[index]) for index in indices])
            for index, part in zip(indices, parts, strict=True):
                tensors[index][layer_name(layer)] = part
        return tensors

    @torch.no_grad()
    def _forward(self, rows: Sequence[TokenRow]) -> Signals:
        """Run the model on rows, which are padded on the right to the longest, [B, S].

        Returns:
            logits of the target tokens of all rows, and each layer's features of those of the rows that request it.
        """
        width = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), width), self._fill)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
            mask[number, : len(row.ids)] = 1
        all_rows, by_layer = tuple(range(len(rows))), _rows_by_layer(rows)
        targets = {indices: _targets(rows, indices, width) for indices in {all_rows, *by_layer.values()}}
        feature_requests = {FeatureKey("hidden", layer): targets[indices] for layer, indices in by_layer.items()}
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if (device := input_device(self.model)) is not None:
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        inputs = accepted_inputs(self.model, inputs)
        return extract_signals(self.model, inputs, targets[all_rows], feature_requests)


def _probe_row(num_ids: int, context_length: int) -> TokenRow:
    """Return a short row whose ids are spread over all ids of the model."""
    length = min(_PROBE_TOKENS, context_length)
    return TokenRow(tuple(torch.linspace(0, num_ids - 1, length).long().tolist()), tuple(range(length)))


def _rows_by_layer(rows: Sequence[TokenRow]) -> dict[int, tuple[int, ...]]:
    """Return each requested layer, in their order, with the indices of the rows that request it."""
    indices: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        for layer in row.layers:
            indices[layer].append(index)
    return {layer: tuple(indices[layer]) for layer in sorted(indices)}


def _targets(rows: Sequence[TokenRow], indices: Sequence[int], width: int) -> Targets:
    """Return the target tokens of some of the rows, all of which are padded to `width`."""
    positions = torch.tensor([index * width + position for index in indices for position in rows[index].positions])
    return Targets(torch.zeros_like(positions), positions, positions // width, torch.Size((len(rows), width)))


def load_served_teacher(spec: TeacherSpec, max_batch_tokens: int) -> ServedTeacher:
    """Load the model of a teacher and its tokenizer.

    Args:
        spec: a frozen teacher.
        max_batch_tokens: see `ServedTeacher`.

    Raises:
        DistillError: the model cannot be loaded or served, or would be sharded over processes.
    """
    if spec.deepspeed or spec.fsdp:
        raise DistillError(
            "The server is one process, and deepspeed and fsdp shard a teacher over several: use quantization or "
            "device_map instead."
        )
    name = str(spec.model)
    path = as_path(resolve_model(name))
    teacher, options = build_frozen_teacher(spec, path)
    student = _model_without_weights(name, read_config(path, options))
    teacher.processing_class = tokenizer = load_tokenizer_if_any(path, spec.revision)
    teacher.prepare(student, default_device(), tokenizer)
    return ServedTeacher(
        teacher.model,
        name,
        tokenizer=tokenizer,
        revision=options.get("revision"),
        quantization=spec.quantization,
        max_batch_tokens=max_batch_tokens,
    )


def _model_without_weights(name: str, config: PretrainedConfig) -> PreTrainedModel:
    """Build the model on the meta device: a frozen teacher is prepared for a student, here for its own model type.

    Raises:
        DistillError: the config is not that of a causal language model.
    """
    try:
        if config.is_encoder_decoder:
            raise ValueError("it has an encoder and a decoder")
        return model_without_weights(AutoModelForCausalLM, config)
    except ValueError as error:
        raise DistillError(
            f"{name} is no causal language model ({str(error).partition('.')[0]}), and only these can be served."
        ) from None


def _name_of_dtype(dtype: torch.dtype) -> Any:
    """Return the name of a dtype of `wire.DTYPES`.

    Raises:
        DistillError: it is none.
    """
    for name, known in DTYPES.items():
        if dtype == known:
            return name
    raise DistillError(f"The model computes in {dtype}; it can be served in {', '.join(DTYPES)}: set --dtype.")
