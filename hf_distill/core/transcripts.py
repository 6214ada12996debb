"""`TranscriptLabels`: the labels of rows whose targets are frames, and how their CTC loss is computed."""

from dataclasses import dataclass

from torch import Tensor

SUM, MEAN = "sum", "mean"


@dataclass(frozen=True)
class TranscriptLabels:
    """The transcripts of the rows of a batch, and the settings of the CTC loss that transformers reads from a config.

    labels:        [B, U] ids of the tokens; -100 and the blank mark padding
    blank:         id of the blank
    reduction:     "sum", or "mean" to divide the loss of a row by its number of tokens
    zero_infinity: whether a row whose transcript does not fit into its frames has the loss 0 and no gradient
    """

    labels: Tensor
    blank: int
    reduction: str = SUM
    zero_infinity: bool = False
