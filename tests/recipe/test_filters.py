"""Filters in recipes: names, options and errors, and what untrusted recipes may not name."""

import pytest
import yaml
from pydantic import Field, TypeAdapter, ValidationError

from hf_distill.core.strict_model import StrictModel
from hf_distill.filters import FILTERS, SELECTIONS
from hf_distill.recipe.downloads import referenced_repos
from hf_distill.recipe.filters import FilterSpec, SelectSpec
from hf_distill.recipe.hub_paths import pin_relative_paths
from hf_distill.recipe.hub_policy import filter_violations
from hf_distill.recipe.load import load_recipe
from hf_distill.recipe.local_files import missing_files
from hf_distill.recipe.problems import problem_lines, remove_unknown_keys, remove_wrong_values

FILTER, SELECT = TypeAdapter(FilterSpec), TypeAdapter(SelectSpec)


class Generate(StrictModel):
    filters: list[FilterSpec] = Field(default_factory=list)
    select: SelectSpec | None = None


class Section(StrictModel):
    generate: Generate


@pytest.fixture
def generate_schema(monkeypatch):
    """Messages are made from the schema of `Section`."""
    monkeypatch.setattr("hf_distill.recipe.problems.packaged_schema", Section.model_json_schema)


def test_a_name_is_short_for_a_filter_with_its_defaults():
    assert FILTER.validate_python("unfinished") == FILTER.validate_python({"name": "unfinished"})
    assert SELECT.validate_python("best_of_n").score == "logprob"
    for name, step in (FILTERS | SELECTIONS).items():
        assert step.__doc__
        assert all(field.description for key, field in step.model_fields.items() if key != "name"), name


PROBLEMS = [
    ("unfinishd", "generate.filters.0.name: unknown name 'unfinishd'; did you mean 'unfinished'?"),
    ({"max_tokens": 5}, "generate.filters.0: must be one of "),
    (5, "generate.filters.0: must be one of "),
    ("length", "generate.filters.0.length: length has no limit: set min_tokens, "),
    (
        {"name": "length", "max_tokns": 5},
        "generate.filters.0.length.max_tokns: unknown key; did you mean 'max_tokens'?",
    ),
    ({"name": "length", "max_tokens": -1}, "generate.filters.0.length.max_tokens: "),
    ({"name": "length", "min_tokens": 2, "max_tokens": 1}, "no completion has such a length"),
    ({"name": "function", "function": "os.system"}, "generate.filters.0.function.function: give a function as module:"),
    ("function", "generate.filters.0.function.function: required key is missing"),
    ({"name": "decontaminate", "data": [{"path": "x", "n": 3}]}, "filters.0.decontaminate.data.0.n: unknown key"),
    ({"name": "decontaminate", "data": [{"path": "x"}], "n": 3, "min_words": 4}, "min_words must be at most n"),
]


@pytest.mark.parametrize(("step", "message"), PROBLEMS)
def test_a_wrong_filter_is_an_error_with_its_key(step, message, generate_schema):
    values = {"generate": {"filters": [step]}}
    with pytest.raises(ValidationError) as error:
        Section.model_validate(values)
    assert any(message in line for line in problem_lines(error.value.errors(), values))


def test_wrong_and_unknown_keys_of_filters_are_removed_to_find_further_problems(generate_schema):
    filters = [{"name": "function", "function": "a:b", "min_scor": 1}, {"name": "length", "max_tokens": "x"}]
    values = {"generate": {"filters": filters}}
    with pytest.raises(ValidationError) as error:
        Section.model_validate(values)
    assert remove_unknown_keys(values, error.value.errors())
    assert values["generate"]["filters"][0] == {"name": "function", "function": "a:b", "min_score": 1}
    assert remove_wrong_values(values, error.value.errors()) == {"max_tokens"}
    assert values["generate"]["filters"][1] == {"name": "length"}


def test_the_json_schema_says_which_keys_a_name_has_and_which_names_need_no_options():
    for adapter, steps in ((FILTER, FILTERS), (SELECT, SELECTIONS)):
        schema = adapter.json_schema()
        names, models = schema["anyOf"]
        assert {*models["discriminator"]["mapping"]} == {*steps}
        for name, reference in models["discriminator"]["mapping"].items():
            properties = schema["$defs"][reference.rpartition("/")[2]]["properties"]
            assert properties["name"]["const"] == name
            assert {*properties} == {*steps[name].model_fields}
        for name in names["enum"]:
            assert adapter.validate_python(name).name == name
        for name in {*steps} - {*names["enum"]}:
            with pytest.raises(ValidationError):
                adapter.validate_python(name)


def test_an_untrusted_recipe_may_name_no_functions_and_no_files():
    filters = [
        "unfinished",
        {"name": "function", "function": "os:system"},
        {"name": "decontaminate", "data": [{"path": "org/task"}, {"path": "/etc/passwd", "split": "a b"}]},
    ]
    filters = [FILTER.validate_python(step) for step in filters]
    select = SELECT.validate_python({"name": "best_of_n", "score": "os:system"})
    violations = [*filter_violations(filters, select)]
    assert [violation.partition(": ")[0] for violation in violations] == [
        "generate.filters.1.function",
        "generate.filters.2.data.1.path",
        "generate.filters.2.data.1.split",
        "generate.select.score",
    ]
    assert "untrusted recipe may not name functions" in violations[0]
    assert [*filter_violations(filters[:1], SELECT.validate_python("best_of_n"))] == []
    assert [*filter_violations([], None)] == []


VALUES = {"generate": {"filters": ["unfinished", {"name": "decontaminate", "data": [{"path": "tasks.jsonl"}]}]}}


def test_missing_evaluation_files_are_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [line for line in missing_files(VALUES) if "there is no file 'tasks.jsonl'" in line] == missing_files(VALUES)
    assert missing_files(VALUES)[0].startswith("generate.filters.1.data.0.path: ")
    (tmp_path / "tasks.jsonl").write_text("{}")
    assert missing_files(VALUES) == []


def test_evaluation_files_of_a_recipe_from_the_hub_are_those_of_its_repository(monkeypatch, tmp_path):
    origin = f"hf://org/recipes@{'a' * 40}/folder/recipe.yaml"
    pinned = pin_relative_paths(VALUES, origin)
    (entry,) = pinned["generate"]["filters"][1]["data"]
    assert entry == {"path": f"hf://org/recipes@{'a' * 40}/folder/tasks.jsonl"}
    assert VALUES["generate"]["filters"][1]["data"] == [{"path": "tasks.jsonl"}]
    for values in ({"generate": 1}, {"generate": {"filters": 1}}, {"generate": {"filters": [1, {"data": 1}]}}):
        assert pin_relative_paths(values, origin) == values
        assert missing_files(values) == []


def test_evaluation_data_are_among_the_repositories_that_a_recipe_reads(tmp_path):
    values = {
        "student": {"model": "org/student"},
        "teacher": {"model": "org/teacher"},
        "data": {"task": {"path": "org/prompts"}, "eval": {"holdout": 0.1}},
        "train": {"output_dir": "runs/x"},
        "generate": {
            "filters": [
                {"name": "decontaminate", "data": [{"path": "org/task"}, {"path": "org/other", "name": "main"}]},
                {"name": "decontaminate", "data": [{"path": "org/third"}], "n": 20},
            ]
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    repos = [*referenced_repos(load_recipe(str(tmp_path / "recipe.yaml")))]
    assert repos[-3:] == [
        (f"decontamination data {number}", path, "dataset", None)
        for number, path in enumerate(("org/task", "org/other", "org/third"), 1)
    ]
