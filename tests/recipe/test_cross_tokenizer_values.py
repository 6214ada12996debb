"""Recipes whose teacher has another tokenizer: what is possible, and what each error says."""

import json
import subprocess
import sys

import pytest

from hf_distill import DistillConfig, DistillError
from hf_distill.recipe.downloads import referenced_repos
from hf_distill.recipe.hub_policy import policy_violations
from hf_distill.recipe.load import validate
from hf_distill.recipe.local_files import missing_files
from hf_distill.recipe.smoke import smoke_values

REMOTE = {"kind": "remote", "url": "http://127.0.0.1:8000", "tokenizer": "org/teacher"}
CACHED = {"kind": "cached", "path": "caches/x", "tokenizer": "org/teacher"}
NAMED = [{"name": "one", "model": "org/one"}, {"name": "two", "model": "org/two", "tokenizer": "org/two-chat"}]


def values_of(**changes) -> dict:
    values = {
        "student": {"model": "org/student", "revision": "v2"},
        "teacher": {"model": "org/teacher"},
        "data": {"task": {"path": "org/data"}, "eval": {"holdout": 0.1}},
        "distill": {"cross_tokenizer": "alm"},
        "train": {"output_dir": "runs/x"},
    } | changes
    return json.loads(json.dumps({key: value for key, value in values.items() if value is not None}))


def problems_of(**changes) -> list[str]:
    with pytest.raises(DistillError) as error:
        validate(values_of(**changes))
    return [line.strip() for line in str(error.value).splitlines()[1:]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"distill": {"cross_tokenizer": {"name": "alm", "tau": 10.0}}},
        {"distill": {"cross_tokenizer": {"name": "projected_kl", "temperature": 1.5}, "alpha": 0.9}},
        {"teacher": REMOTE},  # alm has no temperature, so that of the recipe does not matter
        {"teacher": REMOTE, "distill": {"cross_tokenizer": "projected_kl"}},
        {"teacher": REMOTE, "distill": {"cross_tokenizer": {"name": "uld", "temperature": 1}, "temperature": 2}},
        {"teacher": CACHED},
        {"teacher": {"kind": "cached", "path": "caches/x", "source": {"model": "org/teacher"}}},
        {"teacher": None, "teachers": NAMED},
        {"losses": [{"name": "uld", "weight": 0.1}]},
    ],
)
def test_possible(changes):
    recipe = validate(values_of(**changes))
    assert (recipe.tokenizer_model, recipe.tokenizer_revision) == ("org/student", "v2")
    assert validate(recipe.model_dump(exclude_none=True)) == recipe


@pytest.mark.parametrize(
    ("distill", "default", "of_soft_loss"),
    [
        ({"cross_tokenizer": "projected_kl"}, 1.0, 1.0),
        ({"cross_tokenizer": {"name": "uld"}}, 1.0, 1.0),
        ({"cross_tokenizer": "alm"}, 1.0, None),
        ({"cross_tokenizer": "projected_kl", "temperature": 2}, 2.0, 2.0),
        ({"cross_tokenizer": {"name": "projected_kl", "temperature": 1.5}}, 1.0, 1.5),
        ({"divergence": {"name": "js", "temperature": 3}}, 2.0, 3.0),
        ({}, 2.0, 2.0),
    ],
)
def test_the_default_of_the_temperature_is_that_of_the_loss(distill, default, of_soft_loss):
    recipe = validate(values_of(distill=distill))
    assert (recipe.distill.temperature, recipe.distill.soft_temperature) == (default, of_soft_loss)
    soft, _, other = DistillConfig(
        "out", **distill, losses=[{"name": "uld" if "cross_tokenizer" in distill else "reverse_kl"}]
    ).terms()
    assert (other.options["temperature"], soft.options.get("temperature")) == (default, of_soft_loss)


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"distill": {"cross_tokenizer": "alme"}}, ["unknown loss 'alme'; did you mean 'alm'?"]),
        ({"distill": {"cross_tokenizer": {"name": "alm", "tau": 0}}}, ["loss 'alm': tau is 0; it must be above 0"]),
        ({"distill": {"cross_tokenizer": {"name": "alm", "beta": 1}}}, ["loss 'alm' has no option 'beta'"]),
        ({"distill": {"cross_tokenizer": "js"}}, ["loss 'js' compares ids of one tokenizer; use one of alm"]),
        ({"distill": {"cross_tokenizer": "hidden_mse"}}, ["loss 'hidden_mse' does not compare text; use one of alm"]),
        ({"distill": {"divergence": "alm"}}, ["loss 'alm' is for a teacher with another tokenizer: set cross_token"]),
        (
            {"distill": {"cross_tokenizer": "alm", "divergence": "js"}},
            ["divergence is 'js' and cross_tokenizer is 'alm', which takes the place"],
        ),
        (
            {"losses": [{"name": "hidden_mse"}, {"name": "reverse_kl"}]},
            ["losses: hidden_mse compares features of tokens", "losses: reverse_kl compares ids of one tokenizer"],
        ),
        ({"teacher": {"kind": "ema"}}, ["teacher.kind is ema, a teacher that has the student's tokenizer"]),
        ({"teacher": {"kind": "mutual", "model": "org/peer"}}, ["teacher.kind is mutual, a teacher that has the stud"]),
        ({"teacher": REMOTE | {"tokenizer": None}}, ["teacher.tokenizer: the tokenizer of a remote teacher is not kn"]),
        ({"teacher": CACHED | {"tokenizer": None}}, ["teacher.tokenizer: the tokenizer of a cached teacher is not kn"]),
        (
            {"teacher": CACHED | {"source": {"model": "org/teacher", "tokenizer": "org/other"}}},
            ["tokenizer is 'org/teacher' and that of source 'org/other': set it once"],
        ),
        (
            {"teacher": REMOTE, "distill": {"cross_tokenizer": {"name": "uld", "temperature": 2.0}}},
            ["teacher.kind remote: a vLLM or SGLang server returns log-probabilities at temperature 1 only"],
        ),
        (
            {"distill": {}, "losses": [{"name": "alm"}]},
            ["losses: alm compares spans of text with a teacher of another"],
        ),
        (
            {"distill": {}, "teacher": {"model": "org/teacher", "tokenizer": "org/other"}},
            ["teacher.tokenizer is 'org/other', and without distill.cross_tokenizer"],
        ),
        ({"teacher": {"kind": "ema", "tokenizer": "org/other"}}, ["kind ema does not accept tokenizer"]),
        (
            {
                "teacher": {"model": "org/teacher", "prompt": "Note: {prompt}"},
                "distill": {"cross_tokenizer": "alm", "alpha": 1},
                "on_policy": {"fraction": 1.0, "max_completion_length": 8},
            },
            ["teacher.prompt does not work with distill.cross_tokenizer and on_policy"],
        ),
        (
            {"student": {"from_teacher": {"keep_layers": 2}}},
            ["student.from_teacher: a student that is pruned from its teacher has the teacher's tokenizer"],
        ),
        (
            {"student": None, "stages": [{"student": {"model": "org/a"}}, {"student": {"model": "org/b"}}]},
            ["distill.cross_tokenizer: the student of a stage has the tokenizer of its teacher"],
        ),
        (
            {
                "student": None,
                "distill": {},
                "stages": [
                    {"student": {"model": "org/a"}, "distill": {"cross_tokenizer": "alm"}},
                    {"student": {"model": "org/b"}},
                ],
            },
            ["stages: the student of a stage has the tokenizer of its teacher"],
        ),
        (
            {"teacher": None, "teachers": [NAMED[0], {"name": "mean", "kind": "ema"}], "losses": [{"name": "js"}]},
            ["losses: js compares ids", "teachers.mean.kind is ema, a teacher that has the student's tokenizer"],
        ),
    ],
)
def test_not_possible(changes, problems):
    found = problems_of(**changes)
    assert len(found) == len(problems), found
    for problem in problems:
        assert any(problem in line for line in found), (problem, found)


def test_tokenizers_of_teachers_follow_from_their_models():
    recipe = validate(values_of(teacher=None, teachers=NAMED))
    assert [spec.tokenizer_model for spec in recipe.teachers] == ["org/one", "org/two-chat"]
    names = {used_for: (name, kind) for used_for, name, kind, _ in referenced_repos(recipe)}
    assert names["tokenizer of two"] == ("org/two-chat", "tokenizer")
    assert "tokenizer of one" not in names
    source = validate(values_of(teacher=CACHED | {"source": {"model": "org/weights"}})).primary_teacher
    assert (source.loaded_model, source.tokenizer_model) == ("org/weights", "org/teacher")


def test_the_id_of_a_served_model_may_be_a_path_of_the_server():
    """`vllm serve /folder` serves the model under the id /folder, on another machine too."""
    assert missing_files(values_of(teacher=REMOTE | {"model": "/models/teacher"})) == []


def test_a_tokenizer_is_a_folder_or_an_id_as_a_model_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models" / "tokenizer"
    for name, problem in (("models/tokenizer", "there is no file or folder"), (str(folder), "has no tokenizer_config")):
        (line,) = missing_files(values_of(teacher=REMOTE | {"tokenizer": name}))
        assert line.startswith("teacher.tokenizer: ")
        assert problem in line
        folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    values = values_of(teacher=CACHED | {"tokenizer": str(folder)})
    assert missing_files(values) == []
    (violation,) = policy_violations(validate(values))
    assert violation.startswith(f"teacher.tokenizer: '{folder}' is a path on this machine; an untrusted recipe must")
    assert policy_violations(validate(values_of(teacher=CACHED))) == []


def test_a_smoke_run_has_two_tokenizers():
    for teacher in ({"model": "Qwen/Qwen2.5-7B-Instruct", "tokenizer": "org/x"}, REMOTE):
        teacher = smoke_values(validate(values_of(teacher=teacher)))["teacher"]
        assert teacher["model"].endswith("/other-tokenizer-teacher")
        assert "tokenizer" not in teacher


def test_validation_imports_no_torch():
    code = f"""if True:
        import sys
        from hf_distill.recipe.load import validate
        validate({values_of()!r})
        assert "torch" not in sys.modules and "transformers" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)
