"""The store of a generated data set: killed at every write, it resumes to the same rows."""

import os
import signal
import sys
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from forking import fork_context

from hf_distill.errors import DistillError
from hf_distill.generation import store as store_module
from hf_distill.generation.completion import Completion, Part, Prompt, make_parts
from hf_distill.generation.store import CompletionStore, check_folder
from hf_distill.generation.token_signals import TokenSignals

IDENTITY = {"model": "org/teacher", "generate.seed": 0}
_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def parts_of(prompts: int = 5, samples: int = 2) -> list[Part]:
    return make_parts([Prompt(i, "task", i, f"prompt {i}") for i in range(prompts)], samples, 0, prompts_per_part=2)


def completions_of(part: Part) -> list[Completion]:
    """Completions that depend on the requests only, as those of a backend with seeds."""
    return [
        Completion(
            each.prompt.index, each.sample, f"{each.prompt.content}: {each.seed}", "stop", 3, -0.5, signals(each)
        )
        for each in reversed(part.requests)
        for i in [each.prompt.index]
    ]


def signals(request) -> TokenSignals:
    return TokenSignals([request.prompt.index], [request.sample], {"hidden": torch.full((2, 3), float(request.seed))})


def write_all(folder: Path, resume: bool, has_signals: bool = False) -> None:
    check_folder(folder, resume)
    store = CompletionStore(folder, IDENTITY, parts_of(), has_signals)
    for part in store.open():
        store.write(part, completions_of(part))
    store.publish(pa.table({"completion": [each.text for each in store.read()]}), "# card")


def write_until_killed(folder: Path, event: int, cut: int | None, has_signals: bool) -> None:
    """Write a data set in this process, which is killed at a file operation, or in the middle of a file.

    Args:
        folder: the folder.
        event: number of the operation.
        cut: number of the parquet file that is cut; None: none is.
    """
    count, written = 0, 0

    def kill_at(name, arguments):
        nonlocal count
        if name in _EVENTS and str(folder) in str(arguments[0]):
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    def write_half(table, file, *, write=pq.write_table, **options):
        nonlocal written
        write(table, file, **options)
        if written == cut:
            os.truncate(file, Path(file).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        written += 1

    sys.addaudithook(kill_at)
    with mock.patch.object(store_module.pq, "write_table", write_half):
        write_all(folder, (folder / "generation.json").is_file(), has_signals)


def run_and_kill(folder: Path, event: int = -1, cut: int | None = None, has_signals: bool = False) -> int:
    process = fork_context().Process(target=write_until_killed, args=(folder, event, cut, has_signals))
    process.start()
    process.join()
    return process.exitcode


def content(folder: Path) -> list[list[dict]]:
    return [pq.read_table(file).to_pylist() for file in sorted(folder.glob("*.parquet"))]


def signals_in(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.glob(".completions/*.safetensors"))]


@pytest.mark.parametrize("has_signals", [False, True], ids=["", "signals"])
def test_a_data_set_that_was_killed_at_any_write_resumes_to_the_same_rows(has_signals, tmp_path):
    write_all(tmp_path / "whole", False, has_signals)
    expected = {name: content(tmp_path / "whole" / name) for name in ("data", ".completions")}
    kills, exits = 0, [-signal.SIGKILL]
    while exits[-1] == -signal.SIGKILL:
        folder = tmp_path / f"event {kills}"
        exits = [run_and_kill(folder, event=kills, has_signals=has_signals)]
        if folder.is_dir() and (folder / "data").is_dir():
            assert content(folder / "data") == expected["data"]  # never a part of the rows
        write_all(folder, True, has_signals)
        assert {name: content(folder / name) for name in expected} == expected
        assert signals_in(folder) == signals_in(tmp_path / "whole")
        assert not [*folder.rglob("*.half"), *folder.glob(".data*")]
        kills += 1
    assert exits == [0]
    assert kills > 20
    assert len(signals_in(tmp_path / "whole")) == 3 * has_signals


def test_a_part_without_its_distributions_is_missing(tmp_path):
    write_all(tmp_path, False, has_signals=True)
    (tmp_path / ".completions" / "part-000001.safetensors").unlink()
    store = CompletionStore(tmp_path, IDENTITY, parts_of(), has_signals=True)
    assert [part.number for part in store.open()] == [1]


@pytest.mark.parametrize("cut", range(4))  # three parts, and the data set
def test_half_a_file_is_never_read(cut, tmp_path):
    assert run_and_kill(tmp_path / "killed", cut=cut) == -signal.SIGKILL
    write_all(tmp_path / "killed", resume=True)
    write_all(tmp_path / "whole", resume=False)
    for name in ("data", ".completions"):
        assert content(tmp_path / "killed" / name) == content(tmp_path / "whole" / name)


def test_a_part_with_missing_or_repeated_completions_is_not_written(tmp_path):
    store = CompletionStore(tmp_path, IDENTITY, parts_of())
    part = store.open()[0]
    for completions in (completions_of(part)[1:], [completions_of(part)[0], *completions_of(part)[:-1]]):
        with pytest.raises(ValueError, match="part 0 has 3 of 4"):
            store.write(part, completions)
    assert store.missing() == store.parts


def test_a_folder_of_another_recipe_is_refused_and_not_changed(tmp_path):
    write_all(tmp_path, resume=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(DistillError, match=r"of another recipe or data: generate.seed is 1 here and 0 there"):
        CompletionStore(tmp_path, IDENTITY | {"generate.seed": 1}, parts_of()).open()
    with pytest.raises(DistillError, match="holds an unfinished data set with 3 complete parts: pass --resume"):
        check_folder(tmp_path, resume=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DistillError, match="contains other files than a generated data set"):
        CompletionStore(tmp_path, IDENTITY, parts_of()).open()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_every_request_has_its_own_seed_and_the_parts_do_not_depend_on_the_process():
    parts = parts_of()
    seeds = [request.seed for part in parts for request in part.requests] + [part.seed for part in parts]
    assert len({*seeds}) == len(seeds)
    assert parts == parts_of()
    assert [len(part.requests) for part in parts] == [4, 4, 2]
