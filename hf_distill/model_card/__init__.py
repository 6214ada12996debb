"""Model cards of distilled models, generated from the data of their distillation."""

from .build import TAGS, Figure, build_card
from .data import FILE, CardData, unmeasured

__all__ = ["FILE", "TAGS", "CardData", "Figure", "build_card", "unmeasured"]
