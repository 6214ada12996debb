"""Whether the ids of rows are those of a tokenizer, and those that models have."""

from collections import Counter
from dataclasses import dataclass
from itertools import islice

from ..errors import DistillError
from .model_pair import ModelPair


@dataclass(frozen=True)
class TokenizerCheck:
    """What a tokenizer makes of rows that it should have made itself.

    rows:    that were looked at
    kept:    share of their ids that come back when their text is tokenised again; 1: they are this tokenizer's
    unknown: share of ids that stand for what it does not know
    outside: ids that it does not have
    """

    rows: int
    kept: float
    unknown: float
    outside: int


def roundtrip(pair: ModelPair, count: int = 8) -> TokenizerCheck | None:
    """Turn the first rows into text and back; None: the pair has no tokenizer."""
    tokenizer = pair.tokenizer
    if tokenizer is None:
        return None
    rows = [[int(i) for i in row["input_ids"]] for row in islice(pair.rows, count)]
    # A few tokenizers use the end of a text in the place of an unknown token: it says nothing there.
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    unknown = None if tokenizer.unk_token_id in ends else tokenizer.unk_token_id
    size = len(tokenizer)
    kept = 0
    for row in rows:
        known = [i for i in row if i < size]
        again = tokenizer(tokenizer.decode(known), add_special_tokens=False)["input_ids"]
        kept += (Counter(again) & Counter(row)).total()
    total = max(sum(map(len, rows)), 1)
    return TokenizerCheck(
        len(rows),
        kept / total,
        sum(row.count(unknown) for row in rows) / total if unknown is not None else 0.0,
        sum(i >= size for row in rows for i in row),
    )


def check_ids(pair: ModelPair) -> None:
    """Refuse rows with ids that a model has no embedding for.

    Raises:
        DistillError: names the model and the first such id.
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
                f"The held-out rows have the id {largest}, and the {name} has {size}: they were made with another "
                "tokenizer. Tokenise them with the models' own."
            )
