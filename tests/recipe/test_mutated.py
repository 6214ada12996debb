"""A mutated recipe is valid, or is refused with a readable message."""

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import fault, mutated

from hf_distill import DistillError
from hf_distill.recipe import Recipe, load_recipe


def answered(path: str, overrides: Sequence[str] = ()) -> str:
    """Return the reported problems; empty for a valid recipe."""
    try:
        assert isinstance(load_recipe(path, overrides), Recipe)
    except DistillError as error:
        return str(error)
    return ""


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_a_file_with_arbitrary_bytes_is_refused_without_a_traceback(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "anything.yaml"
    path.write_bytes(content)
    assert answered(str(path)), "noise is no recipe"


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(key=st.text(max_size=30), value=st.text(max_size=30))
def test_arbitrary_overrides_are_refused_without_a_traceback(key, value):
    assert "Traceback" not in answered("quickstart", [f"{key}={value}"])


@pytest.mark.parametrize("first", [0, 100])
def test_a_mutated_recipe_is_valid_or_refused_with_readable_lines(first, tmp_path):
    """A sample of `make fuzz`."""
    seeds = range(first, first + 100)
    faults = {seed: problem for seed in seeds if (problem := fault(mutated(seed), tmp_path / "mutated.yaml"))}
    assert not faults
