"""Damaged files of a run: the message names the file and the remedy."""

import json
import shutil

import pytest

from hf_distill import DistillError
from hf_distill.analysis import open_run
from hf_distill.core.io import read_logs, read_results
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.report.analysis_sections import curve, diagnosis, inspection, retention, samples
from hf_distill.trainer.checkpoints import MARK_FILE, checkpoints_of

CHANGES = ["train.max_steps=4", "train.save_steps=2", "train.save_total_limit=2", "train.logging_steps=1"]


def recipe_of(folder):
    return load_recipe("quickstart", [*CHANGES, f"train.output_dir={folder}", "control=null"], smoke=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    run_recipe(recipe_of(folder))
    return folder


@pytest.fixture
def folder(finished):
    """The run's folder, which a test may damage."""
    copy = finished.with_name("copy")
    shutil.copytree(finished, copy)
    yield finished
    shutil.rmtree(finished)
    copy.rename(finished)


WRONG = ["", "[]", "5", "null", '{"models": 5}', '{"models": {"student": 5}}', '{"models": {}', '{"status": 1}', "\0"]


@pytest.mark.parametrize("content", WRONG)
def test_damaged_results_of_a_run_are_reported(folder, content):
    (folder / "results.json").write_text(content)
    with pytest.raises(DistillError, match=r"results\.json is damaged .* Restore it"):
        run_recipe(recipe_of(folder), resume=True)
    with pytest.raises(DistillError, match=r"results\.json is damaged"):
        _ = open_run(folder).results


def test_a_folder_instead_of_results_json_is_reported(folder):
    (folder / "results.json").unlink()
    (folder / "results.json").mkdir()
    with pytest.raises(DistillError, match=r"results\.json is damaged"):
        read_results(folder / "results.json")


SECTIONS = {section.__name__: section for section in (inspection, diagnosis, retention, curve, samples)}
MALFORMED = '{"mass": 5, "tasks": 5, "samples": 5, "agreement": 5, "compute": 1}'


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("content", ["", "[]", MALFORMED])
def test_damaged_results_of_an_analysis_are_reported(folder, name, content):
    (folder / f"{name}.json").write_text(content)
    with pytest.raises(DistillError, match=rf"{name}\.json is damaged"):
        SECTIONS[name](open_run(folder))


def test_a_truncated_line_of_the_logs_is_named(folder):
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for content in ("".join(lines)[:-9], "".join([*lines[:-1], "[]\n"]), "".join([*lines[:-1], '{"run": 5}\n'])):
        file.write_text(content)
        with pytest.raises(DistillError, match=rf"metrics\.jsonl, line {len(lines)}, is damaged"):
            read_logs(file)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(
        DistillError, match=rf"truncated: it holds {len(lines) - 1} lines of student, and had {len(lines)}"
    ):
        open_run(folder).logs()


@pytest.mark.parametrize("damage", ["cut", "a list", "no text"])
def test_a_resumed_run_rewrites_damaged_logs(folder, damage):
    file = folder / "metrics.jsonl"
    original = file.read_bytes()
    lines = original.splitlines(keepends=True)
    lines[2] = {"cut": lines[2][:9] + b"\n", "a list": b"[]\n", "no text": b"\xff\xfe\n"}[damage]
    file.write_bytes(b"".join(lines))
    (folder / "results.json").unlink()
    run_recipe(recipe_of(folder), resume=True)
    steps = [[log["step"] for log in map(json.loads, text.splitlines())] for text in (original, file.read_bytes())]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("content", ["[]", "5", "{}"])
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(folder, content, caplog):
    (folder / "results.json").unlink()
    newest, before = checkpoints_of(folder)[:2]
    expected = (folder / "student" / "model.safetensors").read_bytes()
    (newest / MARK_FILE).write_text(content)
    stages = []
    run_recipe(recipe_of(folder), resume=True, on_stage=stages.append)
    assert f"{newest} is skipped: its {MARK_FILE} cannot be read" in caplog.text
    assert f"student: from step {before.name.rpartition('-')[2]} of 4" in stages
    assert (folder / "student" / "model.safetensors").read_bytes() == expected


def test_a_damaged_record_of_the_recipe_is_not_mistaken_for_another_recipe(folder):
    (folder / "results.json").unlink()
    newest = checkpoints_of(folder)[0]
    file = newest / "trainer_state.json"
    text = file.read_text()
    assert '"train.max_steps": 4' in text
    file.write_text(text.replace('"train.max_steps": 4', '"train.max_steps": 5'))
    stages = []
    run_recipe(recipe_of(folder), resume=True, on_stage=stages.append)
    assert "student: from step 2 of 4" in stages
