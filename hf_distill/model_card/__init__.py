"""Model cards with the evidence of a distillation."""

from .build import TAGS, Picture, card_of
from .data import FILE, Facts, missing

__all__ = ["FILE", "TAGS", "Facts", "Picture", "card_of", "missing"]
