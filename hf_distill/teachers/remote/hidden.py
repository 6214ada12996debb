"""The protocol of `hf-distill serve`: hidden states of the target tokens, and once the output head."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.logits import upload
from ...core.references import public_name
from ...core.results import ServerFacts
from ...core.signals import FeatureKey, Signals
from ...core.targets import FeatureTokens
from ...errors import DistillError, did_you_mean
from ...losses.objective import Term
from ...models.blocks import LayerStack
from ...models.frozen_head import FrozenHead
from . import wire
from .api import RemoteProtocol, RowTensors, ServerInfo, TokenRow
from .identity import START_RETRY_SECONDS, start_error
from .pool import MalformedAnswer, RequestRefused, ServerFailure, ServerPool
from .wire import DTYPES, HeadTensors, TeacherInfo, WireError

MAX_ANSWER_BYTES = 2**28  # of the tensors of an answer, unless a single row needs more
_NO_LAYERS = (
    "the server returns the last hidden states only, because it could not read the outputs of the layers of its model "
    "(its log has the reason): remove the loss, or use a local teacher"
)


class HiddenProtocol(RemoteProtocol):
    """Requests hidden states from `hf-distill serve`, and computes logits from them with the teacher's output head.

    The logits are those of the local teacher, up to the rounding of hidden states to `dtype`, so every divergence and
    temperature is exact. The output head is downloaded once by each process that trains. For losses on hidden states,
    the outputs of the layers that they compare are requested with the last hidden states.

    Args:
        pool: the servers.
        model: public name of the served model, or the path that it was loaded from; None: any.
        dtype: dtype of the hidden states, "bfloat16", "float16" or "float32"; None: that of the served model, which
            rounds nothing.

    Raises:
        DistillError: the dtype is unknown.
    """

    name = "hidden"
    has_full_logits = True
    context_option = "--max-batch-tokens"

    def __init__(self, pool: ServerPool, model: str | None, dtype: str | None = None):
        if dtype is not None and dtype not in DTYPES:
            raise DistillError(f"dtype of a remote teacher is {dtype!r}{did_you_mean(str(dtype), DTYPES)}")
        self.pool, self.model, self.dtype = pool, model, dtype
        self._info: TeacherInfo | None = None
        self._head: HeadTensors | None = None
        self._frozen_head = FrozenHead()

    def __getstate__(self) -> dict[str, Any]:
        """Return what requests need; a process that only requests rows does not need the output head."""
        return self.__dict__ | {"_head": None, "_frozen_head": FrozenHead()}

    @property
    def info(self) -> TeacherInfo:
        """What the servers answered before training.

        Raises:
            DistillError: `check` was not called.
        """
        if self._info is None:
            raise DistillError("The teacher server was not checked yet: call RemoteTeacher.prepare first.")
        return self._info

    @property
    def depth(self) -> int:
        """Number of layers whose outputs the servers return."""
        return self.info.depth

    def check(self) -> list[ServerInfo]:
        """Ask every server for its teacher, and download the output head from the first one.

        Raises:
            DistillError: see `RemoteProtocol.check`.
        """
        infos = {url: self._start(url, wire.INFO, _parse_info) for url in self.pool.urls}
        info_url, info = next(iter(infos.items()))
        if self.model is not None and info.model not in (self.model, public_name(self.model)):
            raise DistillError(
                f"{info_url} serves {info.model}, and not {self.model!r}: set model to the id of the served "
                "model, or start the server with the model that you want."
            )
        if len({(each.model, each.weights, each.head, each.dtype) for each in infos.values()}) > 1:
            served = [
                f"{each.model} in {each.dtype}, weights {each.weights[:8]} ({url})" for url, each in infos.items()
            ]
            raise DistillError(
                "The URLs of a remote teacher must serve one model with the same weights and dtype, and they serve "
                f"{', '.join(served)}."
            )
        names = ("context_length", "max_request_tokens", "embeddings", "depth")
        limits = {name: min(getattr(each, name) for each in infos.values()) for name in names}
        self._info = info.model_copy(update=limits)
        self._head, self._frozen_head = self._start(info_url, wire.HEAD, self._parse_head, _bytes), FrozenHead()
        return [
            ServerInfo(url, each.model, each.context_length, each.vocab_size, each.tokenizer, each.head)
            for url, each in infos.items()
        ]

    def _start(self, url: str, path: str, parse: Callable[[Any], Any], read: Callable[..., Any] | None = None) -> Any:
        """Send a GET request before training.

        Raises:
            DistillError: the server does not answer, or is no `hf-distill serve`.
        """
        options = {} if read is None else {"read": read}
        try:
            return self.pool.request(path, None, parse, url=url, retry_seconds=START_RETRY_SECONDS, **options)
        except (ServerFailure, RequestRefused) as error:
            raise start_error(error, self.name) from None

    def _parse_head(self, body: bytes) -> HeadTensors:
        try:
            return wire.decode_head(body, self.info)
        except WireError as error:
            raise MalformedAnswer(str(error)) from None

    def request_rows(self, rows: Sequence[TokenRow]) -> list[RowTensors]:
        """Request rows in as few requests as the servers accept, at least one for each server.

        Raises:
            DistillError: a row is longer than the context of a server, or has an id that its model cannot read or a
                layer that it does not have.
        """
        rows = [replace(row, ids=row.ids[: row.positions[-1] + 1]) for row in rows]
        for row in rows:
            self._check_row(row)
        answers = self.pool.map(self._request, self._groups(rows))
        return [tensors for answer in answers for tensors in answer]

    def _check_row(self, row: TokenRow) -> None:
        if len(row.ids) > self.info.context_length:
            raise DistillError(
                f"A row has {len(row.ids)} tokens up to its last target token, and the teacher's server reads at most "
                f"{self.info.context_length}: lower max_length. If the model can read more, start the server with "
                f"--max-batch-tokens {len(row.ids)}."
            )
        if max(row.ids) >= self.info.embeddings:
            raise DistillError(
                f"The data has the token id {max(row.ids)}, and the teacher on the server has an embedding for the ids "
                f"0 to {self.info.embeddings - 1} only. Use a teacher with the student's tokenizer."
            )
        if row.layers and row.layers[-1] >= self.depth:
            raise DistillError(
                f"The output of the layer {row.layers[-1]} of the teacher is needed, and the server returns those of "
                f"{self.depth} layers, counted from 0: map other layers."
            )

    def _groups(self, rows: Sequence[TokenRow]) -> list[list[TokenRow]]:
        """Split rows into requests of similar numbers of tokens."""
        total = sum(len(row.ids) for row in rows)
        limit = min(self.info.max_request_tokens, -(-total // len(self.pool.urls)))
        groups, tokens, answer_bytes = list[list[TokenRow]](), 0, 0
        for row in rows:
            row_bytes = self._answer_bytes(row)
            is_full = tokens + len(row.ids) > limit or answer_bytes + row_bytes > MAX_ANSWER_BYTES
            if not groups or is_full or row.layers != groups[-1][0].layers:
                groups.append([])
                tokens = answer_bytes = 0
            groups[-1].append(row)
            tokens += len(row.ids)
            answer_bytes += row_bytes
        return groups

    def _answer_bytes(self, row: TokenRow) -> int:
        widths = wire.tensor_widths(row.layers, self.info)
        return len(row.positions) * sum(widths.values()) * DTYPES[self.dtype or self.info.dtype].itemsize

    def _request(self, rows: Sequence[TokenRow]) -> list[RowTensors]:
        info, dtype = self.info, self.dtype or self.info.dtype

        def parse(body: bytes) -> list[RowTensors]:
            try:
                return wire.decode_hidden_states(body, rows, dtype, info)
            except WireError as error:
                raise MalformedAnswer(str(error)) from None

        return self.pool.request(wire.HIDDEN_STATES, wire.request_body(rows, dtype), parse, read=_bytes)

    def empty_row(self, layers: Sequence[int] = ()) -> RowTensors:
        """Return tensors without target tokens."""
        dtype = DTYPES[self.dtype or self.info.dtype]
        widths = wire.tensor_widths(layers, self.info)
        return {name: torch.empty(0, width, dtype=dtype) for name, width in widths.items()}

    def to_signals(
        self,
        tensors: RowTensors,
        device: torch.device,
        vocab_size: int,
        feature_requests: Mapping[FeatureKey, FeatureTokens],
    ) -> Signals:
        """Return lazy logits (hidden states and the output head), and features, on the student's device."""
        head = self._head
        assert head is not None, "check downloads the output head"
        hidden = upload(tensors["hidden_states"], device).to(head.weight.dtype)
        logits = self._frozen_head.lazy_logits(hidden, head.weight, head.bias, head.scaling, device)
        dtype = DTYPES[self.info.dtype]
        layers = {key.layer: tensors[wire.layer_name(key.layer)] for key in feature_requests}
        on_device = {layer: upload(tensor, device).to(dtype) for layer, tensor in layers.items()}
        return Signals(logits, {key: on_device[key.layer] for key in feature_requests})

    def keep_ids(self, ids: Tensor) -> None:
        """Return the logits of some ids only, [V']."""
        self._frozen_head.ids = ids

    def incompatible_terms(self, terms: Sequence[Term]) -> list[str]:
        """Return the terms on attention; every divergence, temperature and loss on hidden states is possible."""
        problems = []
        for term in terms:
            if term.loss.feature not in (None, "hidden"):
                problems.append(
                    f"{term.name} compares features of the kind {term.loss.feature}, and `hf-distill serve` returns "
                    "hidden states only: use a loss on them (hidden_cosine, hidden_mse, hidden_relation), or a local "
                    "teacher"
                )
            elif term.loss.feature and not self.depth:
                problems.append(f"{term.name} compares hidden states of layers, and {_NO_LAYERS}")
        return problems

    def layer_stack(self, which: str | None = None) -> LayerStack:
        """Placeholders for the teacher's layers: there are as many as the served model has, without weights.

        Raises:
            DistillError: the server returns no outputs of layers.
        """
        if not self.depth:
            raise DistillError(f"Hidden states of layers are needed, and {_NO_LAYERS}.")
        blocks = nn.ModuleList(nn.Identity() for _ in range(self.depth))
        return LayerStack(which, blocks, self.info.layer_width, causal=True, attention="none")

    def tokenize(self, url: str, text: str) -> list[int] | None:
        """Return the ids of a text; None if the server has no tokenizer."""
        return self._request_list(url, wire.TOKENIZE, {"text": text}, "ids", int)

    def token_texts(self, url: str, ids: Sequence[int]) -> list[str | None]:
        """Return the text of each id; None for all if the server has no tokenizer."""
        answer = self._request_list(url, wire.TOKEN_TEXTS, {"ids": list(ids)}, "texts", str)
        return [None] * len(ids) if answer is None else list(answer)

    def _request_list(self, url: str, path: str, body: dict[str, Any], name: str, kind: type) -> list[Any] | None:
        if self.info.tokenizer is None:
            return None

        def parse(answer: Any) -> list[Any]:
            values = answer.get(name) if isinstance(answer, dict) else None
            if not isinstance(values, list) or not all(type(each) is kind for each in values):
                raise MalformedAnswer(f"{path} returned no list of {name}")
            return values

        return self.pool.request(path, body, parse, url=url, retry_seconds=START_RETRY_SECONDS)

    def summary(self) -> ServerFacts:
        """Return `api`, the dtype of the hidden states, and what identifies the teacher."""
        info = self._info
        if info is None:
            return {"api": self.name}
        facts: ServerFacts = {"api": self.name, "dtype": self.dtype or info.dtype, "weights": info.weights}
        if info.revision:
            facts["revision"] = info.revision
        if info.quantization:
            facts["quantization"] = info.quantization
        return facts


def _bytes(response: Any) -> bytes:
    return response.content


def _parse_info(answer: Any) -> TeacherInfo:
    if not isinstance(answer, dict):
        raise MalformedAnswer("/info returned no JSON object")
    try:
        return wire.parse(TeacherInfo, answer)
    except WireError as error:
        raise MalformedAnswer(f"/info is not that of this version of hf-distill serve: {error}") from None
