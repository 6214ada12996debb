"""Workflows are valid and have few permissions, and a release checks tag, version and dates."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(path: Path) -> dict:
    workflow = yaml.safe_load(path.read_text())
    return workflow | {"on": workflow.get("on", workflow.get(True))}  # YAML 1.1 reads the key `on` as true


def steps_of(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_every_workflow_exists():
    assert {path.stem for path in WORKFLOWS} == {"checks", "docs", "release", "tests"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_few_permissions_and_limits(path):
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    assert "pull_request_target" not in workflow["on"]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 150
        assert set(job.get("permissions", {}).values()) <= {"read", "write"}
    for step in steps_of(workflow):
        assert ("uses" in step) != ("run" in step)
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step.get("uses", f"a/b@{'0' * 40}"))
        assert "${{" not in step.get("run", ""), "pass values as environment variables"


def test_only_the_jobs_of_a_release_can_write():
    writes = {
        (path.stem, name, permission)
        for path in WORKFLOWS
        for name, job in load(path)["jobs"].items()
        for permission, access in job.get("permissions", {}).items()
        if access == "write"
    }
    assert writes == {("release", "publish", "id-token"), ("release", "release", "contents")}


def test_workflows_run_targets_of_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set()
    for path in WORKFLOWS:
        workflow = load(path)
        runs = [step["run"] for step in steps_of(workflow) if "run" in step]
        named |= {run.removeprefix("make ") for run in runs if run.startswith("make ")} - {'"$TARGET"'}
        for job in workflow["jobs"].values():
            named |= {entry["target"] for entry in job.get("strategy", {}).get("matrix", {}).get("include", [])}
    assert named >= {"lint", "test", "test-minimum-versions", "docs", "dist"}
    assert named <= targets


@pytest.fixture
def released(tmp_path):
    """A repository of which version 1.2.0 can be released, and the function that checks it."""
    (tmp_path / "hf_distill").mkdir()
    (tmp_path / "hf_distill" / "version.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.0\ndate-released: 2030-01-31\n")
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## 1.2.0 (2030-01-31)\n\n### Added\n\n- New.\n\n## 1.1.0 (2029-01-31)\n\n- Old.\n"
    )
    spec = importlib.util.spec_from_file_location("release_notes", ROOT / ".github" / "release_notes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tmp_path, module.release_notes


def test_the_notes_are_the_section_of_the_version(released):
    root, notes = released
    assert notes("v1.2.0", root) == "### Added\n\n- New."


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("hf_distill/version.py", "1.2.0", "1.3.0", "The tag is v1.2.0, hf_distill/version.py has 1.3.0"),
        ("CITATION.cff", "\nversion: 1.2.0", "\nversion: 1.1.0", "CITATION.cff has 1.1.0"),
        ("CITATION.cff", "\ndate-released: 2030-01-31", "", "CITATION.cff has no line"),
        ("CITATION.cff", "2030-01-31", "2030-01-30", "2030-01-30, and CHANGELOG.md 2030-01-31: set the same"),
        ("CHANGELOG.md", "(2030-01-31)", "(unreleased)", "has the date 'unreleased': set it, as YYYY-MM-DD"),
        ("CHANGELOG.md", "## 1.2.0", "## 1.2.1", "CHANGELOG.md has no line"),
    ],
)
def test_versions_and_dates_that_differ_are_refused(released, file, old, new, message):
    root, notes = released
    path = root / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(SystemExit, match=re.escape(message)):
        notes("v1.2.0", root)


def test_this_repository_can_be_released_when_its_dates_are_set(released, tmp_path):
    notes, root = released[1], tmp_path / "dated"
    (root / "hf_distill").mkdir(parents=True)
    for name in ("hf_distill/version.py", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy(ROOT / name, root / name)
    version = re.search(r'__version__ = "(.+)"', (root / "hf_distill" / "version.py").read_text())[1]
    changelog = (root / "CHANGELOG.md").read_text().replace(f"## {version} (unreleased)", f"## {version} (2030-01-31)")
    date = re.search(rf"## {re.escape(version)} \((.+)\)", changelog)[1]
    (root / "CHANGELOG.md").write_text(changelog)
    citation = re.sub(r"\ndate-released: .*", "", (root / "CITATION.cff").read_text())
    (root / "CITATION.cff").write_text(f"{citation}date-released: {date}\n")
    assert len(notes(f"v{version}", root)) > 1000
