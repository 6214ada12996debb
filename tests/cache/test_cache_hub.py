"""Pushing caches to the Hub and reading them."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi
from tiny import build, collate, rows
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.cache import open_cache, verify_cache, write_cache
from hf_distill.cache.hub import push_cache, resolve_cache_dir
from hf_distill.cache.manifest import read_manifest
from hf_distill.cli import app


def test_a_pushed_cache_is_read_at_the_pushed_revision(hub, run_cli, tmp_path):
    folder = tmp_path / "cache"
    write_cache(folder, build("llama", 1), rows("llama", 20), collator=collate, shard_rows=8, batch_size=4)
    done = run_cli("cache", "push", str(folder), "tester/signals")
    assert done.returncode == 0, done.stderr
    pinned_uri = done.stdout.split("Pushed to ")[1].split()[0]
    repo = hub.repos["datasets", "tester/signals"]
    assert pinned_uri == f"hf://datasets/tester/signals@{repo.branches['main']}"
    remote_files = {*repo.commits[repo.branches["main"]]} - {".gitattributes"}
    assert remote_files == {"README.md", *(file.name for file in folder.iterdir() if file.name != ".lock")}
    for uri in (pinned_uri, "hf://datasets/tester/signals"):
        assert open_cache(uri).manifest.kind == "hidden"
    assert run_cli("cache", "verify", pinned_uri).returncode == 0


def test_a_damaged_cache_is_not_pushed(hub, run_cli, tmp_path):
    folder = tmp_path / "cache"
    write_cache(folder, build("llama", 1), rows("llama", 8), collator=collate)
    shard: Path = folder / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = run_cli("cache", "push", str(folder), "tester/broken")
    assert done.returncode == 2
    assert "shard-00000.arrow is damaged" in done.stderr
    assert ("datasets", "tester/broken") not in hub.repos


def test_a_data_set_without_a_cache_is_refused(hub):
    HfApi().create_repo("tester/empty", repo_type="dataset")
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="tester/empty", repo_type="dataset")
    with pytest.raises(DistillError, match="is not a cache"):
        open_cache("hf://datasets/tester/empty")


def test_other_files_are_not_replaced_and_no_local_path_is_published(hub, tmp_path):
    folder = tmp_path / "cache"
    teacher = {"model": f"{tmp_path}/teacher", "revision": None, "quantization": None}
    model = build("llama", 1)
    write_cache(folder, model, rows("llama", 4), collator=collate, batch_size=4, teacher_name=teacher)
    hub.put("datasets", "tester/theirs", {"README.md": b"---\nlicense: mit\n---\n# Mine\n"})
    with pytest.raises(DistillError, match=r"README\.md"):
        push_cache(folder, "tester/theirs")
    push_cache(folder, "tester/theirs", replace=True)
    push_cache(folder, "tester/theirs")
    repo = hub.repos["datasets", "tester/theirs"]
    for name, value in repo.commits[repo.at("main")].items():
        assert tmp_path.name.encode() not in hub.content(value), name
    assert verify_cache(resolve_cache_dir("hf://datasets/tester/theirs")).teacher["model"] == "teacher"


def test_a_private_cache_is_not_pushed_to_a_public_repository(hub, tmp_path):
    write_cache(tmp_path / "cache", build("llama", 1), rows("llama", 4), collator=collate, batch_size=4)
    hub.put("datasets", "tester/public", {})
    with pytest.raises(DistillError, match="datasets/tester/public is a public repository, but --private"):
        push_cache(tmp_path / "cache", "tester/public", private=True)
    push_cache(tmp_path / "cache", "tester/hidden", private=True)
    push_cache(tmp_path / "cache", "tester/hidden", private=True)
    assert hub.repos["datasets", "tester/hidden"].private


def test_another_cache_is_replaced_only_with_replace_and_leaves_no_shards(hub, tmp_path):
    for name, count in (("old", 12), ("new", 4)):
        write_cache(
            tmp_path / name, build("llama", 1), rows("llama", count), collator=collate, shard_rows=4, batch_size=4
        )
    push_cache(tmp_path / "old", "tester/shared")
    repo = hub.repos["datasets", "tester/shared"]
    before = repo.at("main")
    result = CliRunner().invoke(app, ["cache", "push", str(tmp_path / "new"), "tester/shared"])
    assert isinstance(result.exception, DistillError)
    assert "another cache (data is" in str(result.exception)
    assert "--replace" in str(result.exception)
    assert repo.at("main") == before
    result = CliRunner().invoke(app, ["cache", "push", str(tmp_path / "new"), "tester/shared", "--replace"])
    assert result.exit_code == 0, result.exception
    shards = {name for name in repo.commits[repo.at("main")] if name.startswith("shard-")}
    assert shards == {"shard-00000.arrow"}
    assert verify_cache(resolve_cache_dir("hf://datasets/tester/shared")).data["examples"] == 4


@pytest.mark.parametrize("name", ["../../secret.arrow", "/etc/passwd", ".hidden", 5])
def test_a_manifest_that_names_a_file_outside_the_folder_is_refused(tmp_path, name):
    write_cache(tmp_path, build("llama", 1), rows("llama", 4), collator=collate, batch_size=4)
    manifest = read_manifest(tmp_path)
    manifest.shards[0]["file"] = name
    manifest.write(tmp_path / "manifest.json")
    with pytest.raises(DistillError, match="manifest"):
        verify_cache(tmp_path)
