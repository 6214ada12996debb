"""A recipe with anything in the place of anything is answered in words: it is valid, or its problems are told."""

from collections.abc import Sequence
from copy import deepcopy

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_distill import DistillError
from hf_distill.recipe import Recipe, list_recipes, load_recipe
from hf_distill.recipe.references import find_recipe

RECIPES = [yaml.safe_load(find_recipe(name).text) for name in list_recipes()]
WORDS = [
    "auto",
    "forward_kl",
    "package:x",
    "hf://a",
    "smoke:x/y",
    "2",
    "1e-4",
    "no",
    "~",
    "{{ x }}",
    "../x",
    "\x00",
    "=",
    "",
]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=20),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.sampled_from(WORDS), inner, max_size=4)
    ),
    max_leaves=12,
)


def places(value, here=()):
    """Paths of all values inside a value."""
    yield here
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*here, key))


@st.composite
def mutated(draw):
    """A packaged recipe in which up to three values are others, are gone, or have a stranger beside them."""
    recipe = deepcopy(draw(st.sampled_from(RECIPES)))
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from([place for place in places(recipe) if place] or [("student",)]))
        owner = recipe
        for key in above:
            owner = owner[key]
        match draw(st.sampled_from(["other", "gone", "beside", "deep"])):
            case "other":
                owner[last] = draw(values)
            case "gone":
                del owner[last]
            case "beside" if isinstance(owner, dict):
                owner[
                    draw(st.text(max_size=8) | st.sampled_from(["model", "path", "train", "losses", "seed", "layers"]))
                ] = draw(values)
            case _:
                owner[last] = {"a": [{"b": [deepcopy(owner[last])] * 3}] * 3}
    return recipe


def answered(path: str, overrides: Sequence[str] = ()) -> str:
    """The problems that are told; empty for a valid recipe."""
    try:
        assert isinstance(load_recipe(path, overrides), Recipe)
    except DistillError as error:
        return str(error)
    return ""


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_a_file_of_anything_is_answered(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "anything.yaml"
    path.write_bytes(content)
    assert answered(str(path)), "noise is no recipe"


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(key=st.text(max_size=30), value=st.text(max_size=30))
def test_overrides_of_anything_are_answered(key, value):
    assert "Traceback" not in answered("quickstart", [f"{key}={value}"])


@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(recipe=mutated())
def test_a_mutated_recipe_is_valid_or_told_what_is_wrong(recipe, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    told = answered(str(path))
    assert "Traceback" not in told
    if told:
        first, *problems = told.splitlines()
        assert problems or first.strip()
        assert all(len(line) < 2000 for line in told.splitlines())
