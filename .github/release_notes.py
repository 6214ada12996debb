"""Checks that a tag can be released, and prints its section of CHANGELOG.md."""

import re
import sys
from pathlib import Path


def release_notes(tag: str, root: Path) -> str:
    """Return the section of a version in CHANGELOG.md.

    Args:
        tag: the tag, such as "v0.1.0".
        root: the repository.

    Raises:
        SystemExit: tag, `version.py`, CITATION.cff and CHANGELOG.md differ in version or date, or no date is set.
    """
    version = _find(root / "hf_distill" / "version.py", r'__version__ = "(.+)"')
    cited = _find(root / "CITATION.cff", r'^version: "?([^"\n]+)"?$')
    if tag != f"v{version}" or cited != version:
        sys.exit(
            f"The tag is {tag}, hf_distill/version.py has {version}, CITATION.cff has {cited}. "
            "Set the same version in both files, and tag that commit with v and the version."
        )
    changelog = root / "CHANGELOG.md"
    date = _find(changelog, rf"^## {re.escape(version)} \((.+)\)$")
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date):
        sys.exit(f"The section of {version} in CHANGELOG.md has the date {date!r}: set it, as YYYY-MM-DD.")
    cited_date = _find(root / "CITATION.cff", r'^date-released: "?([^"\n]+)"?$')
    if cited_date != date:
        sys.exit(f"CITATION.cff has the date {cited_date}, and CHANGELOG.md {date}: set the same.")
    return _find(changelog, rf"(?s)^## {re.escape(version)} \([^\n]+\)\n(.*?)(?=^## |\Z)").strip()


def _find(path: Path, pattern: str) -> str:
    found = re.search(pattern, path.read_text(), re.MULTILINE)
    if found is None:
        sys.exit(f"{path.name} has no line that matches {pattern!r}: add it.")
    return found[1]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Give one argument, the tag: python .github/release_notes.py v0.1.0")
    sys.stdout.write(release_notes(sys.argv[1], Path(__file__).parents[1]) + "\n")
