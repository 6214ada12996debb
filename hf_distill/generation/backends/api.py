"""What `hf-distill generate` needs from a backend: parts of requests go in, their completions come out."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from ...core.json_types import JSONObject
from ..completion import Completion, Part


class Backend(Protocol):
    """A model that completes prompts.

    name:                    value of `generate.backend`
    log_prob_distribution:   the distribution whose log-probabilities it returns: "model" (temperature 1, all tokens) or
                             "sampling" (after temperature and top_p)
    """

    name: str
    log_prob_distribution: str

    def identity(self) -> JSONObject:
        """Return the model and what else determines the completions; the same values mean the same distribution."""
        ...

    def complete(
        self, parts: Iterable[Part], on_tokens: Callable[[int], None]
    ) -> Iterator[tuple[Part, list[Completion]]]:
        """Complete the requests of parts, and yield each part when all of its completions are there.

        Args:
            parts: the parts, in order.
            on_tokens: called with the number of new tokens when completions are there.

        Raises:
            DistillError: a prompt or a setting is not possible with this backend.
            RunError: a server failed.
        """
        ...

    def close(self) -> None:
        """Release the model or the connections."""
        ...
