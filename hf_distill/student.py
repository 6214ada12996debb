"""Students cut from a teacher: `block_influence` and `cut_student`."""

from .models.pruning import block_influence, cut_student

__all__ = ["block_influence", "cut_student"]
