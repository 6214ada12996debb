"""Layer pruning: `block_influence` and `cut_student` make a student from the blocks of a teacher."""

from .models.pruning import block_influence, cut_student

__all__ = ["block_influence", "cut_student"]
