"""Model cards with the evidence of a distillation."""

from .card import TAGS, Picture, card_of
from .facts import FILE, Facts, missing

__all__ = ["FILE", "TAGS", "Facts", "Picture", "card_of", "missing"]
