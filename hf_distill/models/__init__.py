"""Transformers models: their type, layers, features, output head, forward passes and checkpoints."""
