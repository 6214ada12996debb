"""What `hf-distill serve` and its client exchange: requests and facts in JSON, and tensors in safetensors.

Both sides use the functions of this file, which check everything that they read. An answer with tensors names the
teacher that it comes from, and has a checksum, so a truncated, corrupted or foreign answer is recognized. Nothing is
pickled.

Shape letters are those of `hf_distill.core.targets`: S tokens and T target tokens of a row, V vocabulary, H width.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from ...core.logits import LogitScaling
from .api import RowTensors, TokenRow

FORMAT: Final = "hf-distill-serve-1"
INFO, HEAD, HIDDEN_STATES, TOKENIZE, TOKEN_TEXTS = "/info", "/head", "/hidden_states", "/tokenize", "/token_texts"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_NO_SCALING = LogitScaling()
_HIDDEN = "hidden_states"  # name of the tensor with the last hidden states
_LENGTH_BYTES = 8  # of the length of the header with which safetensors begins
_REQUEST_BYTES_PER_TOKEN = 32  # of JSON, at most: an id and a position

_Count = Annotated[int, Field(ge=1)]
_Index = Annotated[int, Field(ge=0)]
_Message = TypeVar("_Message", bound=BaseModel)


class WireError(ValueError):
    """A request or an answer is not what the format allows."""


class TeacherInfo(BaseModel):
    """The answer of a server about its teacher.

    model:              public name: the id, or the last component of the path
    revision:           commit of the id, if it is known
    quantization:       nf4, int8, or None
    dtype:              dtype of the hidden states that the model computes
    width:              H
    depth:              number of layers whose outputs can be requested; 0 if its layers are not known
    layer_width:        hidden size of these outputs; 0 if there are none
    vocab_size:         V of the output head
    embeddings:         number of ids that the model can read
    context_length:     largest number of tokens of a row
    max_request_tokens: largest number of tokens of all rows of a request
    tokenizer:          fingerprint of the tokenizer; see `cache.fingerprints`
    weights:            fingerprint of the weights; see `cache.fingerprints`
    head:               SHA-256 of the output head; see `HeadTensors.digest`
    """

    model_config = ConfigDict(strict=True, frozen=True)

    format: Literal["hf-distill-serve-1"] = FORMAT
    model: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    quantization: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"]
    width: _Count
    depth: _Index
    layer_width: _Index
    vocab_size: _Count
    embeddings: _Count
    context_length: _Count
    max_request_tokens: _Count
    tokenizer: str | None = None
    weights: str
    head: str

    @property
    def max_request_bytes(self) -> int:
        """Largest number of bytes of the body of a request."""
        return 2**16 + _REQUEST_BYTES_PER_TOKEN * self.max_request_tokens


class _Row(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    ids: Annotated[list[_Index], Field(min_length=1)]
    positions: Annotated[list[_Index], Field(min_length=1)]


class _HiddenRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    rows: Annotated[list[_Row], Field(min_length=1)]
    layers: list[_Index] = []
    dtype: Literal["bfloat16", "float16", "float32"]


class TokenizeRequest(BaseModel):
    """A text whose ids are requested, without special tokens."""

    model_config = ConfigDict(strict=True, extra="forbid")
    text: str


class TokenTextsRequest(BaseModel):
    """Ids whose texts are requested, each alone."""

    model_config = ConfigDict(strict=True, extra="forbid")
    ids: list[_Index]


def parse(message: type[_Message], body: bytes | Mapping[str, Any]) -> _Message:
    """Return a message of one of the classes of this file.

    Args:
        message: the class.
        body: JSON, or what it was parsed to.

    Raises:
        WireError: it is not such a message.
    """
    try:
        return message.model_validate_json(body) if isinstance(body, bytes) else message.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise WireError(f"{f'{where}: ' if where else ''}{first['msg']}") from None


def request_body(rows: Sequence[TokenRow], dtype: str) -> dict[str, Any]:
    """Return the JSON of a request for the hidden states of rows with the same layers, in a dtype of `DTYPES`."""
    body = {"rows": [{"ids": list(row.ids), "positions": list(row.positions)} for row in rows], "dtype": dtype}
    return body | {"layers": list(_layers_of(rows))}


def _layers_of(rows: Sequence[TokenRow]) -> tuple[int, ...]:
    (layers,) = {row.layers for row in rows}
    return layers


def layer_name(layer: int) -> str:
    """Return the name of the tensor with the outputs of a layer."""
    return f"layer_{layer}"


def tensor_widths(layers: Sequence[int], info: TeacherInfo) -> dict[str, int]:
    """Return name -> last dimension of the tensors of a row for which the outputs of some layers were requested."""
    return {_HIDDEN: info.width} | {layer_name(layer): info.layer_width for layer in layers}


def parse_request(body: bytes, info: TeacherInfo) -> tuple[list[TokenRow], str]:
    """Return the rows of a request and the requested dtype.

    Args:
        body: its JSON.
        info: the teacher of the server, whose limits apply.

    Raises:
        WireError: it is no such request, or beyond a limit.
    """
    request = parse(_HiddenRequest, body)
    for number, row in enumerate(request.rows):
        _check_row(f"rows.{number}", row, info)
    if (tokens := sum(len(row.ids) for row in request.rows)) > info.max_request_tokens:
        raise WireError(f"the rows have {tokens} tokens, and a request may have {info.max_request_tokens}")
    _check_layers(request.layers, info)
    layers = tuple(request.layers)
    return [TokenRow(tuple(row.ids), tuple(row.positions), layers) for row in request.rows], request.dtype


def _check_layers(layers: Sequence[int], info: TeacherInfo) -> None:
    if any(a >= b for a, b in pairwise(layers)):
        raise WireError("the layers do not ascend")
    if layers and layers[-1] >= info.depth:
        served = f"layers 0 to {info.depth - 1}" if info.depth else "no layers whose outputs can be requested"
        raise WireError(f"the layer {layers[-1]} is requested, and the teacher has {served}")


def _check_row(where: str, row: _Row, info: TeacherInfo) -> None:
    if len(row.ids) > info.context_length:
        raise WireError(f"{where} has {len(row.ids)} tokens, and the teacher reads at most {info.context_length}")
    if (largest := max(row.ids)) >= info.embeddings:
        raise WireError(f"{where} has the id {largest}, and the teacher's ids are 0 to {info.embeddings - 1}")
    if any(a >= b for a, b in pairwise(row.positions)):
        raise WireError(f"the positions of {where} do not ascend")
    if row.positions[-1] >= len(row.ids):
        raise WireError(f"{where} has {len(row.ids)} tokens and the position {row.positions[-1]}")


@dataclass(frozen=True)
class HeadTensors:
    """The output head of a teacher: logits are `scaling(hidden @ weight.T + bias)`.

    weight:  [V, H]
    bias:    [V], or None
    scaling: scale and soft cap after the head
    """

    weight: Tensor
    bias: Tensor | None = None
    scaling: LogitScaling = _NO_SCALING

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, on the CPU."""
        named = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}

    def digest(self) -> str:
        """Return the SHA-256 of names, dtypes, shapes and bytes of the tensors, and of the scaling."""
        digest = hashlib.sha256(_scaling_text(self.scaling).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(f" {name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(_bytes_of(tensor))
        return digest.hexdigest()


def write_head(head: HeadTensors, file: Path) -> None:
    """Write the body of an answer with an output head to a file, from which it is sent; it may have gigabytes."""
    tensors = head.tensors()
    save_file(tensors, file, _metadata(tensors, {"scaling": _scaling_text(head.scaling)}))


def decode_head(body: bytes, info: TeacherInfo) -> HeadTensors:
    """Return an output head.

    Args:
        body: the content of the file of `write_head`.
        info: the teacher whose head was requested.

    Raises:
        WireError: the body is truncated or corrupted, or the head is not that of the teacher.
    """
    tensors, metadata = _unpack(body)
    if set(tensors) not in ({"weight"}, {"weight", "bias"}):
        raise WireError(f"the output head consists of {sorted(tensors)}")
    head = HeadTensors(tensors["weight"], tensors.get("bias"), _parse_scaling(metadata.get("scaling", "")))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes["weight"] != (info.vocab_size, info.width) or shapes.get("bias", (info.vocab_size,)) != (
        info.vocab_size,
    ):
        raise WireError(f"the output head has shapes {shapes}, and the teacher V = {info.vocab_size}, H = {info.width}")
    if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in tensors.values()):
        raise WireError("the output head has values that are not finite")
    if (digest := head.digest()) != info.head:
        raise WireError(f"the output head has the digest {digest[:12]}, and that of the teacher is {info.head[:12]}")
    return head


def encode_hidden_states(rows: Sequence[RowTensors], dtype: str, info: TeacherInfo) -> bytes:
    """Return the body of an answer with hidden states.

    Args:
        rows: tensors [T, H] of each row, whose names are those of `tensor_widths`.
        dtype: the requested dtype.
        info: the teacher.
    """
    return _pack(
        {name: torch.cat([row[name].to(DTYPES[dtype]) for row in rows]) for name in rows[0]},
        {"weights": info.weights, "head": info.head},
    )


def decode_hidden_states(body: bytes, rows: Sequence[TokenRow], dtype: str, info: TeacherInfo) -> list[RowTensors]:
    """Return the tensors of each row, [T, H], whose names are those of `tensor_widths`.

    Args:
        body: the result of `encode_hidden_states`.
        rows: the requested rows, with the same layers.
        dtype: the requested dtype.
        info: the teacher, as it was before training.

    Raises:
        WireError: the body is truncated or corrupted, or not the answer to this request by this teacher.
    """
    tensors, metadata = _unpack(body)
    if (metadata.get("weights"), metadata.get("head")) != (info.weights, info.head):
        raise WireError("it comes from another teacher: the server was restarted with another model")
    counts = [len(row.positions) for row in rows]
    widths = tensor_widths(_layers_of(rows), info)
    if set(tensors) != set(widths):
        raise WireError(f"it has the tensors {sorted(tensors)}; requested were {sorted(widths)}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != (sum(counts), widths[name]) or tensor.dtype != DTYPES[dtype]:
            raise WireError(
                f"its {name} has shape {tuple(tensor.shape)} and {tensor.dtype}; requested was "
                f"{(sum(counts), widths[name])} in {dtype}"
            )
        if not tensor.isfinite().all():
            raise WireError(f"its {name} is not finite")
    parts = {name: tensors[name].split(counts) for name in widths}
    return [{name: parts[name][index] for name in parts} for index in range(len(rows))]


def _scaling_text(scaling: LogitScaling) -> str:
    return json.dumps({"scale": float(scaling.scale), "softcap": scaling.softcap and float(scaling.softcap)})


def _parse_scaling(text: str) -> LogitScaling:
    try:
        values = json.loads(text)
        scale, softcap = values["scale"], values["softcap"]
    except (ValueError, TypeError, KeyError):
        raise WireError("the output head has no logit scaling") from None
    if not isinstance(scale, float) or not isinstance(softcap, float | None):
        raise WireError("the logit scaling of the output head is no number")
    return LogitScaling(scale, softcap)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    checksum = xxhash.xxh3_128()
    for name in sorted(tensors):
        checksum.update(_bytes_of(tensors[name]))
    return checksum.hexdigest()


def _pack(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return tensors on the CPU as safetensors, with a checksum in the metadata."""
    return save(tensors, _metadata(tensors, metadata))


def _metadata(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    return metadata | {"format": FORMAT, "checksum": _checksum(tensors)}


def _unpack(body: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and metadata of a result of `_pack` or `write_head`.

    Raises:
        WireError: the body is truncated, corrupted, or of another format.
    """
    try:
        tensors = load(body)
        header = json.loads(body[_LENGTH_BYTES : _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "little")])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WireError(f"it is truncated or no safetensors ({error})") from None
    metadata = header.get("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise WireError(f"its format is {metadata.get('format')!r}, and this version reads {FORMAT!r}")
    if metadata.get("checksum") != _checksum(tensors):
        raise WireError("its checksum is wrong: it was changed on the way")
    return tensors, metadata
