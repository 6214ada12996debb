"""Output types: what the outputs of a model are, and the losses, targets and metrics that follow from it.

A `ModelType` names its output type. Everything that depends on the type of the outputs is a method or an attribute of
the classes of this package.
"""

from .base import OUTPUT_NAMES, OutputType
from .distributions import Classes, Distribution, Pixels, RowClasses
from .frames import Frames
from .rows import Bernoullis, Embeddings, RealValues, RowOutputs
from .spans import Spans

__all__ = [
    "BERNOULLI_OUTPUTS",
    "CLASS_OUTPUTS",
    "DISTRIBUTION_OUTPUTS",
    "EMBEDDING_OUTPUTS",
    "FRAME_OUTPUTS",
    "OUTPUT_NAMES",
    "PIXEL_OUTPUTS",
    "REAL_VALUE_OUTPUTS",
    "ROW_CLASS_OUTPUTS",
    "SPAN_OUTPUTS",
    "Bernoullis",
    "Classes",
    "Distribution",
    "Embeddings",
    "Frames",
    "OutputType",
    "Pixels",
    "RealValues",
    "RowClasses",
    "RowOutputs",
    "Spans",
]

DISTRIBUTION_OUTPUTS, BERNOULLI_OUTPUTS = Distribution(), Bernoullis()
CLASS_OUTPUTS, ROW_CLASS_OUTPUTS = Classes(), RowClasses()
REAL_VALUE_OUTPUTS, SPAN_OUTPUTS = RealValues(), Spans()
FRAME_OUTPUTS, PIXEL_OUTPUTS = Frames(), Pixels()
EMBEDDING_OUTPUTS = Embeddings()
