"""Checks that the ids of rows belong to a tokenizer, and that the models have embeddings for them."""

from collections import Counter
from dataclasses import dataclass
from itertools import islice

from ..errors import DistillError
from .model_pair import ModelPair


@dataclass(frozen=True)
class TokenizerCheck:
    """Result of decoding rows with a tokenizer and encoding them again.

    rows:    number of rows that were checked
    kept:    share of the ids that are the same after the round trip; 1 if the rows were made with this tokenizer
    unknown: share of the ids that are the tokenizer's unknown token
    outside: number of ids that the tokenizer does not have
    """

    rows: int
    kept: float
    unknown: float
    outside: int


def roundtrip(pair: ModelPair, count: int = 8) -> TokenizerCheck | None:
    """Decode the first `count` rows and encode them again; None if the pair has no tokenizer."""
    tokenizer = pair.tokenizer
    if tokenizer is None:
        return None
    rows = [[int(i) for i in row["input_ids"]] for row in islice(pair.rows, count)]
    # Some tokenizers use the end-of-text token as the unknown token; its occurrences do not mean unknown text.
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    unknown = None if tokenizer.unk_token_id in ends else tokenizer.unk_token_id
    size = len(tokenizer)
    num_equal = 0
    for row in rows:
        valid_ids = [i for i in row if i < size]
        encoded = tokenizer(tokenizer.decode(valid_ids), add_special_tokens=False)["input_ids"]
        num_equal += (Counter(encoded) & Counter(row)).total()
    total = max(sum(map(len, rows)), 1)
    return TokenizerCheck(
        len(rows),
        num_equal / total,
        sum(row.count(unknown) for row in rows) / total if unknown is not None else 0.0,
        sum(i >= size for row in rows for i in row),
    )


def check_ids(pair: ModelPair) -> None:
    """Check that both models have an embedding for every id of the held-out rows.

    Raises:
        DistillError: a row has an id that a model lacks; names the id and the model.
    """
    sizes = {}
    for name in ("teacher", "student"):
        model = getattr(pair, name)
        sizes[name] = model.get_input_embeddings().num_embeddings
    name, size = min(sizes.items(), key=lambda item: item[1])
    for row in pair.rows:
        largest = max(map(int, row["input_ids"]), default=0)
        if largest >= size:
            raise DistillError(
                f"The held-out rows have the id {largest}, but the {name} has only {size} ids: the rows were made with "
                "another tokenizer. Tokenize them with the tokenizer of the models."
            )
