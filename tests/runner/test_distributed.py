"""Ranks with different recipes, rows or versions are named, and the first one alone logs what is the same on all."""

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from hf_distill.runner.distributed import _diff_by_rank, main_process_first


def test_equal_ranks_are_not_reported():
    assert _diff_by_rank("recipe", ["a"] * 8) == ""


def test_ranks_that_differ_are_named_with_their_values():
    assert _diff_by_rank("recipe", ["a", "b", "a"]) == "recipe: a on ranks 0, 2, b on rank 1"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_logs_how_the_data_was_prepared(rank, caplog):
    args = SimpleNamespace(process_index=rank, main_process_first=nullcontext)
    log = logging.getLogger("hf_distill.data.tokenize")
    with main_process_first(args):
        log.warning("rows are truncated")
    log.warning("of this process")
    assert caplog.messages == [*["rows are truncated"] * (rank == 0), "of this process"]
