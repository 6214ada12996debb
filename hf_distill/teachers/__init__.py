"""Teachers: frozen models, teacher caches, teachers that change during training, and several teachers at once."""

from .base import Teacher
from .cached import CachedTeacher
from .cross_tokenizer import CrossTokenizerTeacher
from .ema import EMATeacher, SnapshotTeacher
from .frozen import FrozenTeacher
from .mtp.teacher import MTPTeacher
from .multi_teacher import MultiTeacher
from .multi_view.teacher import MultiViewTeacher
from .null import NullTeacher
from .peer import PeerTeacher
from .remote import RemoteTeacher
from .routed_teacher import RoutedTeacher
from .self_teacher import AdapterBaseTeacher
from .trainable import TrainableTeacher
from .trimmed_vocabulary import TrimmedVocabularyTeacher

__all__ = [
    "AdapterBaseTeacher",
    "CachedTeacher",
    "CrossTokenizerTeacher",
    "EMATeacher",
    "FrozenTeacher",
    "MTPTeacher",
    "MultiTeacher",
    "MultiViewTeacher",
    "NullTeacher",
    "PeerTeacher",
    "RemoteTeacher",
    "RoutedTeacher",
    "SnapshotTeacher",
    "Teacher",
    "TrainableTeacher",
    "TrimmedVocabularyTeacher",
]
