"""Teachers: what the student learns from."""

from .base import Teacher
from .cached import CachedTeacher
from .frozen import FrozenTeacher
from .mtp import MTPTeacher
from .multi_view import MultiViewTeacher
from .own_base import OwnBaseTeacher
from .past_self import EMATeacher, SnapshotTeacher
from .peer import PeerTeacher
from .several import MultiTeacher

__all__ = [
    "CachedTeacher",
    "EMATeacher",
    "FrozenTeacher",
    "MTPTeacher",
    "MultiTeacher",
    "MultiViewTeacher",
    "OwnBaseTeacher",
    "PeerTeacher",
    "SnapshotTeacher",
    "Teacher",
]
