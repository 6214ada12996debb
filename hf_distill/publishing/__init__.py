"""Publish the student of a run on the Hub: one commit with its weights, its model card and its measurements."""

from .publish import DryRun, Published, check_ready, dry_run, publish

__all__ = ["DryRun", "Published", "check_ready", "dry_run", "publish"]
