"""Model cards of distilled models, generated from the data of their distillation."""

from .build import TAGS, Figure, build_card
from .data import (
    FILE,
    CardData,
    DatasetFacts,
    ObjectiveFacts,
    SourceFacts,
    StudentFacts,
    TeacherFacts,
    TrainingFacts,
    unmeasured,
)

__all__ = [
    "FILE",
    "TAGS",
    "CardData",
    "DatasetFacts",
    "Figure",
    "ObjectiveFacts",
    "SourceFacts",
    "StudentFacts",
    "TeacherFacts",
    "TrainingFacts",
    "build_card",
    "unmeasured",
]
