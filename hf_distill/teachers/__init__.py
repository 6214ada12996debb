"""Teachers: what the student learns from."""

from .base import Teacher
from .frozen import FrozenTeacher
from .own_base import OwnBaseTeacher

__all__ = ["FrozenTeacher", "OwnBaseTeacher", "Teacher"]
