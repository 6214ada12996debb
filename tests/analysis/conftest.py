"""A completed smoke run of the quickstart, which the analyses read."""

import shutil

import pytest

from hf_distill.analysis import open_run
from hf_distill.recipe import load_recipe, run_recipe


@pytest.fixture(scope="session")
def completed_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    run_recipe(load_recipe("quickstart", [f"train.output_dir={folder}"], smoke=True))
    return folder


@pytest.fixture
def run(completed_run, tmp_path):
    """A copy of the run, which the test may change."""
    shutil.copytree(completed_run, tmp_path / "run")
    return open_run(tmp_path / "run")
