"""Multi-view distillation: student and teacher see different views of a batch."""

from .augmentation import View, fill_token
from .teacher import MultiViewTeacher

__all__ = ["MultiViewTeacher", "View", "fill_token"]
