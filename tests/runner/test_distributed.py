"""Ranks with different recipes, rows or versions are named."""

from hf_distill.runner.distributed import _diff_by_rank


def test_equal_ranks_are_not_reported():
    assert _diff_by_rank("recipe", ["a"] * 8) == ""


def test_ranks_that_differ_are_named_with_their_values():
    assert _diff_by_rank("recipe", ["a", "b", "a"]) == "recipe: a on ranks 0, 2, b on rank 1"
