"""docs/evidence.md from the template and the results: python report.py."""

import re
from pathlib import Path
from typing import Any

from tables import TABLES

from hf_distill.evidence import read_json, write_whole

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "evidence"
DOCUMENT = HERE.parent.parent / "docs" / "evidence.md"


def results() -> dict[tuple[str, int], dict[str, Any]]:
    """What was run, by cell and seed."""
    found = [read_json(file) for file in sorted(RESULTS.glob("*.json"))]
    return {(result["cell"], result["seed"]): result for result in found}


def render() -> str:
    """The template with its tables."""
    found = results()
    made = {name: table(found) for name, table in TABLES.items()}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: made[match[1]], (HERE / "template.md").read_text())


if __name__ == "__main__":
    write_whole(DOCUMENT, render())
