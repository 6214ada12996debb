"""Wheel and source distribution contain every file of the repository that they need."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_IN_SDIST = {".ci/run", ".gitignore"}  # files of the hosting


def built(kind: str, folder: Path) -> set[str]:
    """Build a wheel or sdist of the tracked files, in a copy without earlier builds; return the paths of its files."""
    copy, out = folder / "copy", folder / "out"
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    out.mkdir()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=copy)
    (path,) = out.iterdir()
    if kind == "wheel":
        return set(zipfile.ZipFile(path).namelist())
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def tracked() -> set[str]:
    """Paths of the files under version control."""
    listing = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listing.returncode:
        pytest.skip("this is no git checkout, so the files to expect are not known")
    return {name for name in listing.stdout.splitlines() if (ROOT / name).exists()}


def test_the_wheel_contains_every_file_of_the_packages_and_nothing_else(tmp_path):
    files = tracked()
    expected = {name for name in files if name.startswith("hf_distill/")}
    expected |= {f"hf_distill/{name}" for name in files if name.startswith("recipes/")}
    expected |= {f"hf_distill/model_cards/{name}" for name in ("__init__.py", "template.md")}
    assert {name for name in built("wheel", tmp_path) if ".dist-info/" not in name} == expected


def test_the_source_distribution_contains_every_file_of_the_repository(tmp_path):
    assert tracked() - NOT_IN_SDIST - built("sdist", tmp_path) == set()
