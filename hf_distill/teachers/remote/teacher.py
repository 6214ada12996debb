"""`RemoteTeacher`: a teacher that runs on a server."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from ...core.defaults import CONCURRENT_REQUESTS, REQUEST_TIMEOUT_SECONDS, RETRY_SECONDS
from ...core.results import ServerFacts
from ...core.server_urls import public_host
from ...core.signals import FeatureKey, Signals
from ...core.targets import FeatureTokens, Targets
from ...core.teacher_inputs import TEACHER_IDS
from ...errors import DistillError, RunError, did_you_mean
from ...losses.objective import Term
from ...models.blocks import LayerStack
from ...models.model_types import model_type_of, unwrap_model
from ..base import Teacher
from .api import RemoteProtocol, RowTensors, ServerInfo, TokenRow
from .hidden import HiddenProtocol
from .identity import check_tokenizer
from .pool import ServerPool
from .rows import token_rows
from .sglang import SGLangProtocol
from .vllm import VLLMProtocol

DEFAULT_TOP_K = 64
_TOP_K_PROTOCOLS: dict[str, Callable[[ServerPool, str | None, int, int | None], RemoteProtocol]] = {
    "vllm": VLLMProtocol,
    "sglang": SGLangProtocol,
}
_APIS = (*_TOP_K_PROTOCOLS, HiddenProtocol.name)


class RemoteTeacher(Teacher):
    """A causal language model on a server, which must have the student's tokenizer.

    A vLLM or SGLang server returns the log-probabilities of the `top_k` most probable ids of each target token at
    temperature 1; the student's loss is that of a `top_k` cache of the same teacher. Each document with target tokens
    is one request.

    `hf-distill serve` (api="hidden") returns the last hidden states of the target tokens, and once its output head, so
    the student's loss is that of the local teacher, for every divergence and temperature. It also returns the outputs
    of the layers that losses on hidden states compare.

    A request that fails is repeated on another server, see `ServerPool`. If none answers in time, training stops with a
    checkpoint of the last complete step.

    Args:
        url: URL of a server, with or without /v1, or several of servers of the same model.
        model: id of the served model; None: the only one that is served.
        api: "vllm", "sglang" or "hidden" (`hf-distill serve`).
        top_k: number of ids for each target token; None: 64. Not with api="hidden".
        vocab_size: V of the teacher; None: that of the student. Not with api="hidden", whose server knows it.
        dtype: with api="hidden": dtype of the hidden states, "bfloat16", "float16" or "float32"; None: that of the
            served model, which rounds nothing.
        timeout: seconds without a byte of the answer until a request counts as failed.
        retry_seconds: time after its first failure for which a request is repeated.
        concurrency: largest number of requests in flight in each process.
        prefetch: number of batches after the current step that are requested while the student trains; 0 requests each
            batch when it is needed.
        api_key_env: name of the environment variable that holds the API key; None: HF_DISTILL_TEACHER_API_KEY, if it
            is set. The key is sent as a bearer token, and is neither logged nor saved.

    Raises:
        DistillError: an argument is wrong.
    """

    kind = "remote"
    any_output_type = False
    reads_text_only = True
    can_fail = True

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        model: str | None = None,
        api: str = "vllm",
        top_k: int | None = None,
        vocab_size: int | None = None,
        dtype: str | None = None,
        timeout: float = REQUEST_TIMEOUT_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
        concurrency: int = CONCURRENT_REQUESTS,
        prefetch: int = 2,
        api_key_env: str | None = None,
    ):
        _check_options(api, top_k, vocab_size, dtype)
        if type(prefetch) is not int or prefetch < 0:
            raise DistillError(f"prefetch of a remote teacher is {prefetch!r}; it must be an integer of at least 0")
        if not isinstance(model, str | None):
            raise DistillError(
                f"model of a remote teacher is a {type(model).__name__}; it must be the id under which the server "
                "serves the teacher, a text."
            )
        self.prefetch = prefetch
        self._started: dict[TokenRow, list[tuple[Future[list[RowTensors]], int]]] = {}  # row -> answers, index in them
        self._threads = ThreadPoolExecutor(prefetch + 1, thread_name_prefix="remote-teacher-batch")
        self.pool = ServerPool(
            url, timeout=timeout, retry_seconds=retry_seconds, concurrency=concurrency, api_key_env=api_key_env
        )
        self.max_wait_seconds = retry_seconds + 2 * timeout
        self.protocol: RemoteProtocol
        if api == HiddenProtocol.name:
            self.protocol = HiddenProtocol(self.pool, model, dtype)
        else:
            self.protocol = _TOP_K_PROTOCOLS[api](self.pool, model, top_k or DEFAULT_TOP_K, vocab_size)
        self.has_full_logits = self.protocol.has_full_logits
        self.servers: list[ServerInfo] = []
        self.student_vocab_size = 0  # V of the student
        self._wait_seconds = 0.0

    def readable_inputs(self) -> frozenset[str]:
        """Names of the inputs that are sent to the servers."""
        return frozenset(("input_ids", "attention_mask", "position_ids"))

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Check that the servers serve the model that was named, with the student's tokenizer.

        Raises:
            DistillError: the student is no causal language model; a server does not answer, or serves another model or
                tokenizer.
        """
        model_type = model_type_of(student)
        if not model_type.is_decoder or not model_type.shifts_labels:
            raise DistillError(
                f"A remote teacher predicts the next token, and the student is {model_type.with_article} or predicts "
                "the token itself: use a causal language model as student."
            )
        self.student_vocab_size = model_type.vocabulary_size(unwrap_model(student), "A remote teacher")
        self.servers = self.protocol.check()
        for info in self.servers:
            check_tokenizer(self.protocol, info, getattr(processing_class, "tokenizer", processing_class))
        lengths = [info.context_length for info in self.servers if info.context_length is not None]
        self.context_length = min(lengths) - self.protocol.row_tokens if lengths else None

    def keep_all_ids(self) -> None:
        """Also return the log-probabilities of ids that the student does not have: its tokenizer is another one."""
        self.student_vocab_size = sys.maxsize

    @property
    def keeps_all_ids(self) -> bool:
        """Whether it returns all ids of the teacher, see `keep_all_ids`."""
        return self.student_vocab_size == sys.maxsize

    def keep_ids(self, ids: Tensor) -> None:
        """Return the logits of some ids only, which a server of hidden states can do.

        Args:
            ids: [V'] the ids.
        """
        assert isinstance(self.protocol, HiddenProtocol), "servers of log-probabilities do not return all of them"
        self.protocol.keep_ids(ids)

    def check_data(self, rows: Any, name: str) -> None:
        """Check that every document of a data set fits into the context of the servers; a stream is not checked.

        Raises:
            DistillError: a document is too long.
        """
        limit, extra = self.context_length, self.protocol.row_tokens
        longest = max(_document_lengths(rows), default=0)
        if limit is not None and longest > limit:
            raise DistillError(
                f"{name} has a row of {longest} tokens, and the teacher's server reads at most {limit} "
                f"(context length {limit + extra}, of which a request needs {extra}): lower "
                f"max_length, or start the server with {self.protocol.context_option} "
                f"{longest + extra}, if the model can read as many."
            )

    def incompatible_terms(self, terms: Sequence[Term], name: str | None) -> list[str]:
        """Return the temperatures, divergences and features that the servers do not return."""
        return self.protocol.incompatible_terms([t for t in terms if t.loss.compares and t.teacher == name])

    def layer_stack(self, which: str | None = None) -> LayerStack:
        """The layers whose hidden states the servers return; only those with api="hidden" return them."""
        return self.protocol.layer_stack(which)

    def start_batch(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> None:
        """Request the rows of a batch in the background."""
        rows = token_rows(inputs, targets, _layers(feature_requests))
        answers = self._threads.submit(self.protocol.request_rows, rows)
        for index, row in enumerate(rows):
            self._started.setdefault(row, []).append((answers, index))

    def _take_started(self, row: TokenRow) -> tuple[Future[list[RowTensors]], int] | None:
        """Return the answers that `start_batch` requested for a row, the oldest first; None if there are none."""
        started = self._started.get(row)
        if started is None:
            return None
        oldest = started.pop(0)
        if not started:
            del self._started[row]
        return oldest

    def on_train_begin(self, step: int) -> None:
        """Forget the rows of an earlier training."""
        self._started.clear()

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Request the rows of a batch that have target tokens.

        Raises:
            RunError: no server answered correctly in time.
        """
        start, layers = time.monotonic(), _layers(feature_requests)
        try:
            tensors = self._request(token_rows(inputs, targets, layers), layers)
        except RunError:
            self.close()
            raise
        self._wait_seconds += time.monotonic() - start
        return self.protocol.to_signals(tensors, targets.labels.device, self.student_vocab_size, feature_requests)

    def _request(self, rows: Sequence[TokenRow], layers: Sequence[int]) -> RowTensors:
        """Return the tensors of all target tokens of a batch, in their order; all rows have the same `layers`."""
        started = [self._take_started(row) for row in rows]
        new_rows = [row for row, each in zip(rows, started, strict=True) if each is None]
        new = iter(self.protocol.request_rows(new_rows) if new_rows else ())
        answers = [next(new) if each is None else each[0].result()[each[1]] for each in started]
        answers.insert(0, self.protocol.empty_row(layers))
        return {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}

    def close(self) -> None:
        """Cancel all requests, so that the process can end; a later call opens new connections."""
        self._started.clear()
        self.pool.close()

    def metrics(self) -> dict[str, float]:
        """Return `teacher_wait_seconds`, for which this process waited for the servers since the last log."""
        seconds, self._wait_seconds = self._wait_seconds, 0.0
        return {"teacher_wait_seconds": seconds}

    def summary(self) -> ServerFacts:
        """Return what results and cards record of what answered."""
        return {
            "model": self.servers[0].model if self.servers else None,
            "hosts": [public_host(url) for url in self.pool.urls],
            **self.protocol.summary(),
        }


def _layers(feature_requests: Iterable[FeatureKey]) -> tuple[int, ...]:
    """Return the layers whose outputs are requested; `incompatible_terms` refused losses on other features."""
    return tuple(sorted({key.layer for key in feature_requests}))


def _check_options(api: str, top_k: int | None, vocab_size: int | None, dtype: str | None) -> None:
    """Check the arguments of `RemoteTeacher` that depend on the API.

    Raises:
        DistillError: one is out of range, or has no effect.
    """
    if api not in _APIS:
        raise DistillError(f"api of a remote teacher is {api!r}{did_you_mean(api, _APIS)}")
    if api == HiddenProtocol.name:
        if top_k is not None or vocab_size is not None:
            raise DistillError(
                "top_k and vocab_size are for servers that return log-probabilities, and a server with api='hidden' "
                "returns hidden states: remove them."
            )
        return
    if dtype is not None:
        raise DistillError(f"dtype is for api='hidden', and api of the remote teacher is {api!r}: remove dtype.")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise DistillError(f"top_k of a remote teacher is {top_k!r}; it must be an integer of at least 1")
    if vocab_size is not None and (top_k or DEFAULT_TOP_K) > vocab_size:
        raise DistillError(
            f"top_k of a remote teacher is {top_k or DEFAULT_TOP_K}, and its vocab_size is {vocab_size}: lower top_k"
        )


def _document_lengths(rows: Any) -> Iterator[int]:
    """Yield the largest number of tokens that the teacher reads of a document, for each part of a data set.

    Nothing for other kinds of data. A row with another prompt for the teacher has `teacher_input_ids`.
    """
    if hasattr(rows, "column_names") and hasattr(rows, "data"):
        import pyarrow.compute as pc

        columns = rows.column_names or ()
        name = next((name for name in ("seq_lengths", TEACHER_IDS, "input_ids") if name in columns), None)
        for batch in rows.select_columns([name]).with_format("arrow").iter(batch_size=1000) if name else ():
            lengths = pc.list_flatten(batch[name]) if name == "seq_lengths" else pc.list_value_length(batch[name])
            if (longest := pc.max(lengths).as_py()) is not None:
                yield int(longest)
    elif isinstance(rows, list):
        for row in rows:
            prefix = "teacher_" if TEACHER_IDS in row else ""
            if (ids := row.get(f"{prefix}input_ids")) is not None:
                mask = row.get(f"{prefix}attention_mask")
                yield max(row["seq_lengths"]) if "seq_lengths" in row else len(ids) if mask is None else int(sum(mask))
