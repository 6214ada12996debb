"""Splits a batch into the rows that are requested: documents without padding that have target tokens."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ...core.logits import to_host
from ...core.targets import Targets, token_documents
from ...errors import DistillError
from .api import TokenRow


def token_rows(inputs: dict[str, Any], targets: Targets, layers: Sequence[int] = ()) -> list[TokenRow]:
    """Return the rows of a batch, in the order of their target tokens.

    Args:
        inputs: the collator's batch: `input_ids` [B, S], with `attention_mask` or `position_ids`.
        targets: the target tokens, at the positions of the ids.
        layers: see `TokenRow`.

    Raises:
        DistillError: the batch has no ids, or its target tokens are at other positions.
    """
    if "input_ids" not in inputs or inputs["input_ids"].shape != targets.shape:
        raise DistillError(
            f"A remote teacher reads `input_ids` with one label for each id, and the batch has {sorted(inputs)}. Use a "
            "data collator that returns both."
        )
    if images := sorted(name for name in inputs if name.startswith(("pixel_", "image_", "video_", "input_features"))):
        raise DistillError(f"A remote teacher reads token ids only, and the batch also has {', '.join(images)}.")
    width = targets.shape[1]
    ids, documents, positions = to_host(inputs["input_ids"], token_documents(inputs), targets.positions)
    document_of_target = positions // width * (documents.max(initial=0) + 1) + documents.reshape(-1)[positions]
    bounds = [0, *(np.flatnonzero(np.diff(document_of_target)) + 1).tolist(), len(positions)]
    rows = []
    for start, end in pairwise(bounds):
        if start == end:
            continue
        row = positions[start] // width
        columns = positions[start:end] - row * width
        tokens = np.flatnonzero(documents[row] == documents[row][columns[0]])
        in_row = np.searchsorted(tokens, columns)
        rows.append(TokenRow(tuple(ids[row][tokens].tolist()), tuple(in_row.tolist()), tuple(layers)))
    return rows
