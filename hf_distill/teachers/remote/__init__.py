"""Remote teachers: a teacher that runs on a server."""

from .teacher import RemoteTeacher

__all__ = ["RemoteTeacher"]
