"""A run's student on the Hub: one commit, with a card that carries the evidence."""

from .publish import DryRun, Published, check_ready, dry_run, publish

__all__ = ["DryRun", "Published", "check_ready", "dry_run", "publish"]
