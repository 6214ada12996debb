"""Pushing caches to the Hub and reading them, in separate processes because libraries read the endpoint at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub, pointed
from tiny import build, collate, rows
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.cache import verify_cache, write_cache
from hf_distill.cache.hub import push_cache, resolve_cache_dir
from hf_distill.cache.manifest import read_manifest
from hf_distill.cli import app

READ = """
import sys
from hf_distill.cache import open_cache
from hf_distill import DistillError
try:
    print(open_cache(sys.argv[1]).manifest.kind)
except DistillError as error:
    print("refused:", error)
"""


@pytest.fixture(scope="module")
def hub():
    with Hub() as running:
        yield running


@pytest.fixture
def run(hub, tmp_path):
    """Return `run(*command)`, which runs Python with the test Hub and returns exit code and output."""
    environment = os.environ | hub.environment(tmp_path / "home")

    def run_command(*command):
        process = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=120
        )
        return process.returncode, process.stdout + process.stderr

    return run_command


def test_a_pushed_cache_is_read_at_the_pushed_revision(hub, run, tmp_path):
    folder = tmp_path / "cache"
    write_cache(folder, build("llama", 1), rows("llama", 20), collator=collate, shard_rows=8, batch_size=4)
    code, output = run("-m", "hf_distill", "cache", "push", str(folder), "tester/signals")
    assert code == 0, output
    pinned_uri = output.split("Pushed to ")[1].split()[0]
    repo = hub.repos["datasets", "tester/signals"]
    assert pinned_uri == f"hf://datasets/tester/signals@{repo.branches['main']}"
    remote_files = {*repo.commits[repo.branches["main"]]} - {".gitattributes"}
    assert remote_files == {"README.md", *(file.name for file in folder.iterdir() if file.name != ".lock")}
    for uri in (pinned_uri, "hf://datasets/tester/signals"):
        code, output = run("-c", READ, uri)
        assert (code, output.split()[0]) == (0, "hidden")
    assert run("-m", "hf_distill", "cache", "verify", pinned_uri)[0] == 0


def test_a_damaged_cache_is_not_pushed(hub, run, tmp_path):
    folder = tmp_path / "cache"
    write_cache(folder, build("llama", 1), rows("llama", 8), collator=collate)
    shard: Path = folder / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    code, output = run("-m", "hf_distill", "cache", "push", str(folder), "tester/broken")
    assert code == 2
    assert "shard-00000.arrow is damaged" in output
    assert ("datasets", "tester/broken") not in hub.repos


def test_a_data_set_without_a_cache_is_refused(hub, run, tmp_path):
    (tmp_path / "push.py").write_text(
        "from huggingface_hub import HfApi\nHfApi().create_repo('tester/empty', repo_type='dataset')\n"
        "HfApi().upload_file(path_or_fileobj=b'x', path_in_repo='a.txt', repo_id='tester/empty', repo_type='dataset')\n"
    )
    assert run(str(tmp_path / "push.py"))[0] == 0
    code, output = run("-c", READ, "hf://datasets/tester/empty")
    assert code == 0
    assert "refused:" in output
    assert "is not a cache" in output


def test_other_files_are_not_replaced_and_no_local_path_is_published(hub, monkeypatch, tmp_path):
    folder = tmp_path / "cache"
    teacher = {"model": f"{tmp_path}/teacher", "revision": None, "quantization": None}
    model = build("llama", 1)
    write_cache(folder, model, rows("llama", 4), collator=collate, batch_size=4, teacher_name=teacher)
    pointed(hub, monkeypatch, tmp_path / "hf")
    hub.put("datasets", "tester/theirs", {"README.md": b"---\nlicense: mit\n---\n# Mine\n"})
    with pytest.raises(DistillError, match=r"README\.md"):
        push_cache(folder, "tester/theirs")
    push_cache(folder, "tester/theirs", replace=True)
    push_cache(folder, "tester/theirs")
    repo = hub.repos["datasets", "tester/theirs"]
    for name, value in repo.commits[repo.at("main")].items():
        assert tmp_path.name.encode() not in hub.content(value), name
    assert verify_cache(resolve_cache_dir("hf://datasets/tester/theirs")).teacher["model"] == "teacher"


def test_another_cache_is_replaced_only_with_replace_and_leaves_no_shards(hub, monkeypatch, tmp_path):
    pointed(hub, monkeypatch, tmp_path / "hf")
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
