"""URIs of the Hub, requests to it, and the errors that its answers become."""

import pytest
from hub_server import Fault
from huggingface_hub import HfApi

from hf_distill import DistillError
from hf_distill.cli.app import out
from hf_distill.cli.confirm import confirm_downloads
from hf_distill.data import load_examples
from hf_distill.hub import fetch, format_uri, parse_uri, sibling_uri, translate_hub_errors
from hf_distill.recipe import load_recipe
from hf_distill.recipe.downloads import downloads
from hf_distill.runner.provenance import provenance


@pytest.fixture(autouse=True)
def empty_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("text", ["hf://o/n@v/a/b.yaml", "hf://datasets/o/n", "hf://o/n@refs/pr/3/x.yaml"])
def test_formatting_a_parsed_uri_returns_the_uri(text):
    assert format_uri(parse_uri(text)) == text


@pytest.mark.parametrize("name", ["/etc/x", "~/x", "../../x", "a/../../../x", "..\\x"])
def test_a_relative_path_cannot_leave_the_repository(name):
    with pytest.raises(DistillError, match="leads out"):
        sibling_uri(parse_uri("hf://o/n@c/a/r.yaml"), name)


def test_sibling_uris_keep_the_folder_and_the_commit():
    uri = parse_uri("hf://o/n@c/a/r.yaml")
    assert format_uri(sibling_uri(uri, "../b/x.json")) == "hf://o/n@c/b/x.json"
    assert format_uri(sibling_uri(uri, "./x.json")) == "hf://o/n@c/a/x.json"


def test_a_fetched_file_has_the_uri_of_the_commit(hub):
    commit = hub.put("datasets", "o/n", {"a/b/x.txt": b"x"})
    fetched = fetch(parse_uri("hf://datasets/o/n/a/b/x.txt"))
    assert fetched.path.read_bytes() == b"x"
    assert format_uri(fetched.uri) == f"hf://datasets/o/n@{commit}/a/b/x.txt"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 500}, "answered 500"),
        ({"status": 412}, "Someone else wrote"),
        ({"status": 409}, "Someone else wrote"),
        ({"status": 403}, "write access"),
        ({"cut": True}, "cannot be reached"),
    ],
)
def test_each_failed_request_raises_a_readable_error(hub, fault, message):
    hub.put("models", "o/n", {})
    hub.faults.append(Fault("api/models", times=99, **fault))
    with pytest.raises(DistillError, match=message), translate_hub_errors("o/n"):
        HfApi().model_info("o/n")


def test_a_slow_answer_does_not_fail_the_request(hub):
    hub.put("models", "o/n", {"x.txt": b"x"})
    hub.faults.append(Fault("resolve", slow=0.3, times=2))
    assert fetch(parse_uri("hf://o/n/x.txt")).path.read_bytes() == b"x"


def test_the_error_for_a_read_only_token_asks_for_write_access(hub, monkeypatch):
    hub.put("models", "o/n", {})
    monkeypatch.setenv("HF_TOKEN", hub.reader)
    with pytest.raises(DistillError, match="write access"), translate_hub_errors("o/n"):
        HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="o/n")


def test_datasets_are_loaded_at_a_revision_and_from_files_of_a_repository(hub):
    old = hub.put("datasets", "o/rows", {"data/train.jsonl": b'{"text": "old"}\n'})
    hub.put("datasets", "o/rows", {"data/train.jsonl": b'{"text": "new"}\n'})
    assert load_examples("o/rows")[0]["text"] == "new"
    assert load_examples(f"hf://datasets/o/rows@{old}")[0]["text"] == "old"
    assert load_examples(f"hf://datasets/o/rows@{old}/data/train.jsonl")[0]["text"] == "old"
    with pytest.raises(DistillError, match="no data set"):
        load_examples("o/gone")


@pytest.mark.parametrize(("access", "reason"), [("gated", "is a gated dataset"), ("private", "cannot be accessed")])
def test_the_error_for_a_data_set_without_access_says_how_to_log_in(hub, monkeypatch, access, reason):
    hub.put("datasets", "o/rows", {"train.jsonl": b'{"text": "a"}\n'}, **{access: True})
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(DistillError, match=f"your token cannot read one on the Hub.*{reason}"):
        load_examples("o/rows")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DistillError, match=f"a request without a token cannot read.*{reason}.*run `hf auth login`"):
        load_examples("o/rows")


@pytest.fixture
def recipe(hub, tmp_path):
    hub.put(
        "models", "o/teacher", {"config.json": b"{}", "model.safetensors": b"x" * 10, "pytorch_model.bin": b"x" * 99}
    )
    hub.put("datasets", "o/rows", {"train.jsonl": b'{"text": "a"}\n'})
    (tmp_path / "r.yaml").write_text(
        "extends: quickstart\nteacher: {model: o/teacher}\n"
        "data: {task: {path: o/rows}, same: {path: hf://datasets/o/rows}, local: {path: package:stdlib}}\n"
    )
    return load_recipe("r.yaml")


def test_downloads_lists_each_repository_once_with_the_size(recipe, hub):
    teacher, rows = downloads(recipe)
    assert (teacher.repo, teacher.used_for, teacher.size, teacher.pickled) == ("o/teacher", ("teacher",), 12, False)
    assert (rows.repo, rows.used_for, rows.kind) == ("o/rows", ("data task", "data same"), "dataset")
    fetch(parse_uri("hf://o/teacher/model.safetensors"))
    assert downloads(recipe)[0].missing == 2
    assert teacher.revision == hub.repos["models", "o/teacher"].at("main")


def test_a_run_without_a_connection_lists_its_repositories_without_sizes(recipe, hub):
    """Models and data may be in the cache; on many clusters only the login node has a connection."""
    hub.faults.append(Fault("/api/", cut=True, times=99))
    assert [(one.repo, one.size, one.missing) for one in downloads(recipe)] == [
        ("o/teacher", None, None),
        ("o/rows", None, None),
    ]


@pytest.mark.parametrize("is_first", [True, False])
def test_one_process_of_a_launch_asks_the_hub_for_the_sizes_of_repositories(recipe, hub, monkeypatch, is_first):
    monkeypatch.setattr(out, "quiet", not is_first)  # as all processes but the first one are
    confirm_downloads("r.yaml", recipe, yes=False, show=True)
    assert bool(hub.requests) == is_first


def test_provenance_has_the_commits_that_a_run_read(recipe, hub):
    fetch(parse_uri("hf://o/teacher/config.json"))
    entries = provenance(recipe)
    assert entries["teacher"] == {"model": "o/teacher", "revision": hub.repos["models", "o/teacher"].at("main")}
    assert entries["data task"] == {"dataset": "o/rows", "revision": hub.repos["datasets", "o/rows"].at("main")}
    assert entries["data local"] == {"dataset": "package:stdlib"}


def test_provenance_does_not_fail_without_a_connection(recipe, hub):
    hub.faults.append(Fault(".*", cut=True, times=99))
    assert provenance(recipe)["data task"] == {"dataset": "o/rows"}
