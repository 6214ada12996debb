"""Published text contains no folder of the machine that published it."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_distill.core.local_paths import reduced, without_local_paths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/al/rows.jsonl", "rows.jsonl"),
        ("~/models/teacher", "teacher"),
        ("../../other project/x.yaml", "x.yaml"),
        ("file:///srv/x/y", "y"),
        (r"C:\Users\al\x.txt", "x.txt"),
        ("see /srv/a/b.csv, and `C:/Users/al/y`", "see b.csv, and `y`"),
        ("'hf-distill report /srv/runs/x/' PATH=/a/b:/c/d", "'hf-distill report x' PATH=b:d"),
        ("<code>/srv/runs/x</code>", "<code>x</code>"),
    ],
)
def test_a_path_is_reduced_to_the_last_component(text, expected, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "other project").mkdir()
    (tmp_path / "other project" / "x.yaml").touch()
    (tmp_path / "here" / "in").mkdir()
    monkeypatch.chdir(tmp_path / "here" / "in")
    assert without_local_paths(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "https://www.w3.org/2000/svg",
        "hf://org/name@main/a/b.yaml",
        "hf://datasets/org/name",
        "org/name",
        "package:llm/x.gguf",
        "3 tokens/s, nats/token, 1/2, and/or, /s",
        '<path d="M 0 0"/></a><br/>',
        r"\frac{a}{b}",
        "font: 16px/1.55",
    ],
)
def test_text_that_is_no_path_is_not_changed(text):
    assert without_local_paths(text) == text


def test_the_working_folder_may_have_spaces_in_the_name(tmp_path, monkeypatch):
    (folder := tmp_path / "my secret project").mkdir()
    monkeypatch.chdir(folder)
    assert without_local_paths(f"rows of {folder}/a/b.jsonl") == "rows of b.jsonl"


def test_values_are_reduced_at_any_depth_and_relative_paths_under_path_keys(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Inner:
        line: str

    monkeypatch.chdir(tmp_path)
    Path("rows").mkdir()
    Path("rows/a").touch()
    values = {"path": "rows/a", "model": "org/name", "x": [{"file": "../y/z.json", "n": 1}], "/srv/key": Inner("/a/b")}
    assert reduced(values) == {"path": "a", "model": "org/name", "x": [{"file": "z.json", "n": 1}], "key": Inner("b")}
