"""Log-probabilities of the k most probable ids: checks of a server's answer, and conversion to signals."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ...core.logits import SparseLogProbs
from ...core.results import ServerFacts
from ...core.signals import FeatureKey, Signals
from ...core.targets import FeatureTokens
from ...errors import DistillError
from ...losses.objective import Term
from .api import RemoteProtocol, RowTensors, ServerInfo, TokenRow
from .identity import START_RETRY_SECONDS, find_models, start_error
from .pool import MalformedAnswer, RequestRefused, ServerFailure, ServerPool

PROBE_IDS = (0, 1)  # ids that every model has
_MAX_ID = 2**31 - 1
_ROUNDING = 1e-3  # by which a sum of probabilities may exceed 1


def top_k_row(
    positions: Sequence[Mapping[int, float]], labels: Sequence[float], top_k: int, vocab_size: int | None
) -> RowTensors:
    """Return the tensors of a row: `ids` [T, k] int32, ascending, `log_probs` [T, k] and `label_log_probs` [T] float32.

    vLLM adds the actual token to its position. Where it is not one of the k most probable ids, it is no part of `ids`.

    Args:
        positions: id -> log-probability for each of the T target tokens.
        labels: log-probability of the actual token for each of them.
        top_k: k.
        vocab_size: V of the teacher, or None if unknown.

    Raises:
        MalformedAnswer: there are fewer than k ids, an id is out of range, or the values are no log-probabilities.
    """
    ids, log_probs, bound = [], [], _MAX_ID if vocab_size is None else vocab_size
    for number, entries in enumerate(positions):
        where = f"target token {number + 1} of {len(positions)}"
        if len(entries) < top_k:
            raise MalformedAnswer(f"{where} has {len(entries)} ids, and top_k is {top_k}")
        if not all(0 <= token_id < bound for token_id in entries):
            raise MalformedAnswer(f"{where} has an id outside of 0 to {bound - 1}")
        if not all(math.isfinite(value) and value <= _ROUNDING for value in entries.values()):
            raise MalformedAnswer(f"{where} has a log-probability that is not finite or above 0")
        if (total := sum(map(math.exp, entries.values()))) > 1 + _ROUNDING:
            raise MalformedAnswer(f"the probabilities of {where} sum to {total:.4g}, which is above 1")
        if not (math.isfinite(labels[number]) and labels[number] <= _ROUNDING):
            raise MalformedAnswer(f"{where} has a log-probability of its own that is not finite or above 0")
        most_probable = sorted(sorted(entries, key=lambda token_id: -entries[token_id])[:top_k])
        ids.append(most_probable)
        log_probs.append([entries[token_id] for token_id in most_probable])
    return {
        "ids": torch.tensor(ids, dtype=torch.int32),
        "log_probs": torch.tensor(log_probs, dtype=torch.float32),
        "label_log_probs": torch.tensor(labels, dtype=torch.float32),
    }


def empty_top_k_row(top_k: int) -> RowTensors:
    """Return the tensors of `top_k_row` of a row without target tokens."""
    return {
        "ids": torch.empty(0, top_k, dtype=torch.int32),
        "log_probs": torch.empty(0, top_k),
        "label_log_probs": torch.empty(0),
    }


def top_k_signals(tensors: RowTensors, device: torch.device, ids: int, vocab_size: int | None) -> SparseLogProbs:
    """Return the log-probabilities of target tokens, with the log of the probability of all other ids.

    Args:
        tensors: of `top_k_row`, concatenated.
        device: the student's device.
        ids: V of the student; larger ids of the teacher are removed.
        vocab_size: V of the teacher; None if it is that of the student.
    """
    log_probs = tensors["log_probs"].double()
    log_tail = (-torch.expm1(torch.logsumexp(log_probs, -1))).clamp(min=0).log()
    known = SparseLogProbs(
        tensors["ids"].long(), log_probs, log_tail, vocab_size=vocab_size, label_log_probs=tensors["label_log_probs"]
    ).without_ids_from(ids)
    assert known.log_tail is not None
    return replace(known, log_probs=known.log_probs.float(), log_tail=known.log_tail.float()).to(device)


def incompatible_top_k_terms(terms: Sequence[Term], api: str) -> list[str]:
    """Return why terms do not work with log-probabilities of k ids at temperature 1."""
    problems = []
    for term in terms:
        if term.loss.feature:
            problems.append(
                f"{term.name} compares {term.loss.feature} features, and a server with api: {api} returns "
                "log-probabilities only: remove the loss, or use a local teacher"
            )
        elif (temperature := term.options.get("temperature", 1.0)) != 1.0:
            problems.append(
                f"{term.name} has temperature {temperature:g}, and a server with api: {api} returns log-probabilities "
                "at temperature 1 only: set temperature to 1, or use api: hidden (`hf-distill serve`) or a local "
                "teacher, which support every temperature"
            )
    return problems


class TopKProtocol(RemoteProtocol):
    """A protocol that returns the log-probabilities of the k most probable ids, one request for each row.

    Args:
        pool: the servers.
        model: id of the served model; None: the only one that is served.
        top_k: ids for each target token.
        vocab_size: V of the teacher; None: that of the student.
    """

    def __init__(self, pool: ServerPool, model: str | None, top_k: int, vocab_size: int | None = None):
        self.pool, self.model, self.top_k, self.vocab_size = pool, model, top_k, vocab_size

    def check(self) -> list[ServerInfo]:
        """Find the served model of each server, and request two ids from it, which shows its limit of k.

        Raises:
            DistillError: see `RemoteProtocol.check`.
        """
        infos = find_models(self.pool, self.model, self.name)
        self.model = infos[0].model
        for info in infos:
            try:
                self._request(TokenRow(PROBE_IDS, (0,)), url=info.url, retry_seconds=START_RETRY_SECONDS)
            except RequestRefused as error:
                hint = "" if error.is_about_key else f" {self._refusal_hint(error)}"
                raise DistillError(f"The teacher server {error}.{hint}") from None
            except ServerFailure as error:
                raise start_error(error, self.name) from None
        return infos

    @abstractmethod
    def _refusal_hint(self, error: RequestRefused) -> str:
        """Return what to do about a request that a server refused for another reason than the key."""

    def request_rows(self, rows: Sequence[TokenRow]) -> list[RowTensors]:
        """Request rows concurrently, one request for each."""
        return self.pool.map(self._request, rows)

    @abstractmethod
    def _request(self, row: TokenRow, url: str | None = None, retry_seconds: float | None = None) -> RowTensors:
        """Request one row, from one server if its URL is given."""

    def empty_row(self, layers: Sequence[int] = ()) -> RowTensors:
        """Return tensors without target tokens."""
        return empty_top_k_row(self.top_k)

    def to_signals(
        self,
        tensors: RowTensors,
        device: torch.device,
        vocab_size: int,
        feature_requests: Mapping[FeatureKey, FeatureTokens],
    ) -> Signals:
        """Return sparse log-probabilities with a tail."""
        return Signals(top_k_signals(tensors, device, vocab_size, self.vocab_size))

    def incompatible_terms(self, terms: Sequence[Term]) -> list[str]:
        """Return the temperatures and features that the server does not return."""
        return incompatible_top_k_terms(terms, self.name)

    def summary(self) -> ServerFacts:
        """Return `api` and `top_k`."""
        return {"api": self.name, "top_k": self.top_k}
