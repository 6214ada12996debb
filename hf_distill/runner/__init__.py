"""Runs recipes: loads models and data, trains, evaluates, and writes the run folder."""
