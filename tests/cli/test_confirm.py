"""What the Hub is asked for, and what its refusals become."""

import pytest
from hub_server import Fault
from huggingface_hub import HfApi

from hf_distill import DistillError
from hf_distill.data import load_examples
from hf_distill.hub import fetch, format_uri, parse_uri, sibling_uri, translate_hub_errors
from hf_distill.recipe import load_recipe
from hf_distill.recipe.downloads import downloads
from hf_distill.runner.provenance import provenance


@pytest.fixture(autouse=True)
def somewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("text", ["hf://o/n@v/a/b.yaml", "hf://datasets/o/n", "hf://o/n@refs/pr/3/x.yaml"])
def test_an_address_is_written_as_it_was_read(text):
    assert format_uri(parse_uri(text)) == text


@pytest.mark.parametrize("name", ["/etc/x", "~/x", "../../x", "a/../../../x", "..\\x"])
def test_no_name_leads_out_of_a_repository(name):
    with pytest.raises(DistillError, match="leads out"):
        sibling_uri(parse_uri("hf://o/n@c/a/r.yaml"), name)


def test_names_beside_are_those_of_the_same_folder_and_commit():
    at = parse_uri("hf://o/n@c/a/r.yaml")
    assert format_uri(sibling_uri(at, "../b/x.json")) == "hf://o/n@c/b/x.json"
    assert format_uri(sibling_uri(at, "./x.json")) == "hf://o/n@c/a/x.json"


def test_what_is_fetched_knows_its_commit(hub):
    commit = hub.put("datasets", "o/n", {"a/b/x.txt": b"x"})
    found = fetch(parse_uri("hf://datasets/o/n/a/b/x.txt"))
    assert found.path.read_bytes() == b"x"
    assert format_uri(found.uri) == f"hf://datasets/o/n@{commit}/a/b/x.txt"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 500}, "answered 500"),
        ({"status": 412}, "Someone else wrote"),
        ({"status": 409}, "Someone else wrote"),
        ({"status": 403}, "write access"),
        ({"cut": True}, "cannot be reached"),
    ],
)
def test_each_failure_is_told_in_words(hub, fault, words):
    hub.put("models", "o/n", {})
    hub.faults.append(Fault("api/models", times=99, **fault))
    with pytest.raises(DistillError, match=words), translate_hub_errors("o/n"):
        HfApi().model_info("o/n")


def test_a_slow_answer_is_waited_for(hub):
    hub.put("models", "o/n", {"x.txt": b"x"})
    hub.faults.append(Fault("resolve", slow=0.3, times=2))
    assert fetch(parse_uri("hf://o/n/x.txt")).path.read_bytes() == b"x"


def test_a_token_that_may_only_read_is_told_so(hub, monkeypatch):
    hub.put("models", "o/n", {})
    monkeypatch.setenv("HF_TOKEN", hub.reader)
    with pytest.raises(DistillError, match="write access"), translate_hub_errors("o/n"):
        HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="o/n")


def test_data_sets_at_a_revision_and_files_of_repositories(hub):
    old = hub.put("datasets", "o/rows", {"data/train.jsonl": b'{"text": "old"}\n'})
    hub.put("datasets", "o/rows", {"data/train.jsonl": b'{"text": "new"}\n'})
    assert load_examples("o/rows")[0]["text"] == "new"
    assert load_examples(f"hf://datasets/o/rows@{old}")[0]["text"] == "old"
    assert load_examples(f"hf://datasets/o/rows@{old}/data/train.jsonl")[0]["text"] == "old"
    with pytest.raises(DistillError, match="no data set"):
        load_examples("o/gone")


@pytest.fixture
def recipe(hub, tmp_path):
    hub.put(
        "models", "o/teacher", {"config.json": b"{}", "model.safetensors": b"x" * 10, "pytorch_model.bin": b"x" * 99}
    )
    hub.put("datasets", "o/rows", {"train.jsonl": b'{"text": "a"}\n'})
    (tmp_path / "r.yaml").write_text(
        "extends: quickstart\nteacher: {model: o/teacher}\n"
        "data: {task: {path: o/rows}, same: {path: hf://datasets/o/rows}, own: {path: package:stdlib}}\n"
    )
    return load_recipe("r.yaml")


def test_downloads_are_what_is_read_once_each_with_sizes(recipe, hub):
    teacher, rows = downloads(recipe)
    assert (teacher.repo, teacher.what, teacher.size, teacher.pickled) == ("o/teacher", ("teacher",), 12, False)
    assert (rows.repo, rows.what, rows.kind) == ("o/rows", ("data task", "data same"), "dataset")
    fetch(parse_uri("hf://o/teacher/model.safetensors"))
    assert downloads(recipe)[0].missing == 2
    assert teacher.revision == hub.repos["models", "o/teacher"].at("main")


def test_runs_know_the_commits_that_they_read(recipe, hub):
    fetch(parse_uri("hf://o/teacher/config.json"))
    found = provenance(recipe)
    assert found["teacher"] == {"model": "o/teacher", "revision": hub.repos["models", "o/teacher"].at("main")}
    assert found["data task"] == {"dataset": "o/rows", "revision": hub.repos["datasets", "o/rows"].at("main")}
    assert found["data own"] == {"dataset": "package:stdlib"}


def test_a_hub_out_of_reach_stops_no_run(recipe, hub):
    hub.faults.append(Fault(".*", cut=True, times=99))
    assert provenance(recipe)["data task"] == {"dataset": "o/rows"}
