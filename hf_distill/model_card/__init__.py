"""Model cards with the evidence of a distillation."""

from .build import TAGS, Figure, build_card
from .data import FILE, CardData, unmeasured

__all__ = ["FILE", "TAGS", "CardData", "Figure", "build_card", "unmeasured"]
