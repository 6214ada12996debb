"""Filters that remove duplicates: the first of equal or similar completions is kept. Imports no torch."""

from collections.abc import Callable, Hashable
from hashlib import blake2b
from typing import Literal

from pydantic import Field

from .base import RowFilter
from .rows import Row, completion_text, prompt_key
from .words import ngrams, words

ACROSS_PROMPTS = (
    "Whether completions of different prompts are compared too. Default: false, so that prompts may have the same "
    "answer."
)


class ExactDuplicates(RowFilter):
    """Removes completions that are equal to an earlier one, apart from whitespace at both ends."""

    name: Literal["exact_duplicates"] = "exact_duplicates"
    across_prompts: bool = Field(False, description=ACROSS_PROMPTS)

    def start(self) -> Callable[[Row], bool]:
        """Return the function that judges the rows of one data set in order."""
        earlier: set[tuple[Hashable, bytes]] = set()

        def keep(row: Row) -> bool:
            text = completion_text(row).strip().encode(errors="surrogatepass")
            key = (None if self.across_prompts else hash(prompt_key(row)), blake2b(text, digest_size=16).digest())
            is_new = key not in earlier
            earlier.add(key)
            return is_new

        return keep


class NearDuplicates(RowFilter):
    """Removes completions that are similar to an earlier kept one.

    The similarity is the Jaccard similarity of the sets of their n-grams of words, estimated by MinHash; candidates are
    found by locality-sensitive hashing, which can miss some pairs near the threshold. Source: Lee et al., 2107.06499.
    """

    name: Literal["near_duplicates"] = "near_duplicates"
    threshold: float = Field(
        0.8, gt=0, lt=1, description="Similarity from which a completion is a duplicate, between 0 and 1. Default: 0.8."
    )
    n: int = Field(5, ge=1, description="Number of words in an n-gram, at least 1. Default: 5.")
    permutations: int = Field(
        128,
        ge=16,
        le=4096,
        description="Number of hash functions, from 16 to 4096; more are more precise and slower. Default: 128.",
    )
    across_prompts: bool = Field(False, description=ACROSS_PROMPTS)

    @property
    def packages(self) -> tuple[str, ...]:
        """Modules of the optional packages that it needs."""
        return ("datasketch",)

    def start(self) -> Callable[[Row], bool]:
        """Return the function that judges the rows of one data set in order."""
        from datasketch import MinHash, MinHashLSH

        index = MinHashLSH(threshold=self.threshold, num_perm=self.permutations)
        kept: list[MinHash] = []

        def keep(row: Row) -> bool:
            tokens = words(completion_text(row))
            if not tokens:
                return True
            # With the prompt in each n-gram, completions of different prompts share none.
            prefix = "" if self.across_prompts else f"{prompt_key(row)!r}\n"
            grams = {f"{prefix}{' '.join(gram)}".encode() for gram in ngrams(tokens, min(self.n, len(tokens)))}
            sketch = MinHash(num_perm=self.permutations)
            sketch.update_batch(grams)
            if any(sketch.jaccard(kept[i]) >= self.threshold for i in index.query(sketch)):
                return False
            index.insert(len(kept), sketch)
            kept.append(sketch)
            return True

        return keep
