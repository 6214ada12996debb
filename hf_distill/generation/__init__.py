"""Sequence-level distillation: the teacher completes the prompts of a recipe, and the completions become a data set."""
