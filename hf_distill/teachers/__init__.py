"""Teachers: what the student learns from."""

from .base import Teacher
from .frozen import FrozenTeacher

__all__ = ["FrozenTeacher", "Teacher"]
