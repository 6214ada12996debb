"""Losses. Each returns one number per asked token, [T]; the distiller alone weights, sums and divides."""

from .divergence import forward_kl
from .hard import cross_entropy
from .registry import LOSSES, Loss, get_loss, loss

__all__ = ["LOSSES", "Loss", "cross_entropy", "forward_kl", "get_loss", "loss"]
