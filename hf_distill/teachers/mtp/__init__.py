"""Multi-token prediction: heads that predict tokens after the next one, their training, and generation with them."""

from .teacher import MTPTeacher

__all__ = ["MTPTeacher"]
