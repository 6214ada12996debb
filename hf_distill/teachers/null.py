"""`NullTeacher`: no teacher, for training and evaluation on the labels alone with this package's loss."""

from collections.abc import Mapping

from ..core.signals import FeatureKey, Signals
from ..core.targets import FeatureTokens, Targets
from .base import Teacher


class NullTeacher(Teacher):
    """A teacher without outputs: the loss is (1 - alpha) * cross entropy, and alpha must be 0.

    Trainers use it if they train on the labels alone and the rows have weights, which the Trainer's loss does not read.
    """

    provides_soft_labels = False

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Return no signals."""
        return Signals(None)
