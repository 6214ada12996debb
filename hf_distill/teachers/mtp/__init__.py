"""Multi-token prediction: heads that predict tokens further ahead, their training, and generation with them."""

from .teacher import MTPTeacher

__all__ = ["MTPTeacher"]
