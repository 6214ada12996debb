"""Ranks that differ are named."""

from hf_distill.runner.distributed import _diff_by_rank


def test_all_that_agree_are_no_problem():
    assert _diff_by_rank("recipe", ["a"] * 8) == ""


def test_ranks_are_named_by_what_they_have():
    assert _diff_by_rank("recipe", ["a", "b", "a"]) == "recipe: a on ranks 0, 2, b on rank 1"
