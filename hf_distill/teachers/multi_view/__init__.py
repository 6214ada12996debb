"""Multi-view distillation: student and teacher read different views of a batch."""

from .augmentation import BatchView, replacement_token_id
from .teacher import MultiViewTeacher

__all__ = ["BatchView", "MultiViewTeacher", "replacement_token_id"]
