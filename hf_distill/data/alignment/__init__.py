"""Aligns the tokens of a student and of a teacher with another tokenizer."""
