"""A run's student on the Hub: one commit, with a card that carries the evidence."""

from .pushing import Published, check_ready, publish

__all__ = ["Published", "check_ready", "publish"]
