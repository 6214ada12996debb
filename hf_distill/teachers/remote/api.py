"""What `RemoteTeacher` needs from a server, whatever its protocol: rows of token ids go in, tensors come out.

Shape letters are those of `hf_distill.core.targets`: S tokens and T target tokens of a row,
V vocabulary, H width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ...core.results import ServerFacts
from ...core.signals import FeatureKey, Signals
from ...core.targets import FeatureTokens
from ...errors import DistillError
from ...losses.objective import Term
from ...models.blocks import LayerStack

RowTensors: TypeAlias = dict[str, Tensor]  # name -> CPU tensor whose first dimension is T


@dataclass(frozen=True)
class TokenRow:
    """A row to request: the tokens of one document without padding.

    ids:       [S] token ids
    positions: [T] ascending indices into `ids`, at least one; the distribution of the token after ids[: position + 1]
               is requested for each
    layers:    ascending indices of the layers whose outputs at `positions` are requested too
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class ServerInfo:
    """The answers of a server about itself; None where it does not answer.

    url:            its URL, without credentials
    model:          the id under which it serves the model
    context_length: largest number of tokens of a request, including one generated token if the protocol needs one
    vocab_size:     V of the model
    tokenizer:      fingerprint of its tokenizer; see `cache.fingerprints.tokenizer_fingerprint`
    digest:         digest of its weights or of its output head
    """

    url: str
    model: str
    context_length: int | None = None
    vocab_size: int | None = None
    tokenizer: str | None = None
    digest: str | None = None


class RemoteProtocol(ABC):
    """One API of a server. Every method but `to_signals` may be called from any thread and any process.

    An object is picklable, also after it was used: connections are opened when a process first needs them.
    Errors: `DistillError` if the input or the server's configuration is wrong, `RunError` if a server fails; the
    message names the URL and the response.

    name:           the value of `api` that selects this protocol
    has_full_logits: whether signals are logits of all ids; False: `SparseLogProbs`
    row_tokens:     number of tokens that a request needs in addition to those of its row
    context_option: the option that sets the context length when a server is started
    """

    name: str = ""
    has_full_logits: bool = False
    row_tokens: int = 0
    context_option: str = "--max-model-len"

    @abstractmethod
    def check(self) -> list[ServerInfo]:
        """Ask every server what it is, and check that it can answer requests; called once, before training.

        Returns:
            one entry for each URL.

        Raises:
            DistillError: a server does not answer, is of another kind, serves another model, or has too low limits.
        """

    @abstractmethod
    def request_rows(self, rows: Sequence[TokenRow]) -> list[RowTensors]:
        """Request the teacher's signals for rows, concurrently.

        Returns:
            for each row, in their order, tensors whose first dimension is the row's T target tokens. The names, dtypes
            and the other dimensions are the same for all rows with the same `layers`, also of other calls, so tensors
            of such rows can be concatenated.

        Raises:
            RunError: a server does not answer, or answers wrongly, after all retries.
            DistillError: the server refuses a row for a reason that a retry does not change.
        """

    @abstractmethod
    def empty_row(self, layers: Sequence[int] = ()) -> RowTensors:
        """Return the tensors of a row without target tokens: their first dimension is 0.

        Args:
            layers: see `TokenRow`.
        """

    @abstractmethod
    def to_signals(
        self,
        tensors: RowTensors,
        device: torch.device,
        vocab_size: int,
        feature_requests: Mapping[FeatureKey, FeatureTokens],
    ) -> Signals:
        """Convert the concatenated tensors of all rows of a batch to signals on the student's device.

        Args:
            tensors: those of `request_rows`, concatenated; their first dimension is the batch's T target tokens. They
                include those of the layers of `feature_requests`.
            device: the student's device.
            vocab_size: V of the student.
            feature_requests: the features to return; see `Teacher.forward`.
        """

    @abstractmethod
    def incompatible_terms(self, terms: Sequence[Term]) -> list[str]:
        """Return why terms of this teacher do not work with what the server answers, and what to do instead."""

    @property
    def depth(self) -> int:
        """Number of layers whose outputs the servers return; known after `check`."""
        return 0

    def layer_stack(self, which: str | None = None) -> LayerStack:
        """The layers whose features the server can return; see `Teacher.layer_stack`.

        Raises:
            DistillError: it returns none, which is the default.
        """
        raise DistillError(
            f"A remote teacher with api={self.name!r} returns no features: remove the losses on hidden states and "
            "attention from `losses`, or use a FrozenTeacher."
        )

    def tokenize(self, url: str, text: str) -> list[int] | None:
        """Return the ids of a text without special tokens, from one server; None if it cannot tokenize."""
        return None

    def token_texts(self, url: str, ids: Sequence[int]) -> list[str | None]:
        """Return the text of each id, from one server; None for an id whose text is not known."""
        return [None] * len(ids)

    @abstractmethod
    def summary(self) -> ServerFacts:
        """Return what results and cards record of the protocol, without URLs: `api`, and options such as `top_k`."""
