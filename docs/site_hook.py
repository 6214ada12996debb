"""Hook of MkDocs: adds the files outside docs/ that pages link to, and the gallery of recipes.

A file outside docs/ keeps its path on the site. README.md of the repository becomes the home page, a recipe a page with
its header and its YAML, a folder a list of its files, a notebook a page of its cells and outputs, and a file of code a
page that shows it. JSON files and pictures are copied. MkDocs then checks the links, so that a link that leads nowhere
ends a strict build.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OTHER_PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md"]
RENAMED = {"README.md": "index.md", "recipes/README.md": "recipes-gallery.md"}
GALLERY_MARK = "<!-- On the site, the gallery replaces the rest of this page. -->"
COPIED = (".json", ".png")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]*`)", flags=re.M | re.S)
FACTS = {"command": "Command", "hardware": "Hardware", "time": "Time", "result": "Measured result"}


def site_path(path: str) -> str:
    """Return where a file of the repository is on the site; both paths are relative to their root."""
    if path in RENAMED:
        return RENAMED[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith(".yaml"):
        return path.removesuffix(".yaml") + ".md"
    return path if path.endswith((".md", *COPIED)) else f"{path}.md"


def repository_path(page: str, target: str) -> str:
    """Return the path in the repository to which a link on a page leads."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def linked_files(page: str, text: str) -> list[str]:
    """Return the files outside docs/ to which a page of the repository links."""
    prose = "".join(CODE.split(text)[::2])
    paths = [repository_path(page, target) for target in LINK.findall(prose)]
    return [path for path in paths if not path.startswith("docs/") and path not in RENAMED]


def rewrite_links(page: str, text: str) -> str:
    """Replace links between files of the repository by links between pages of the site."""
    folder = posixpath.dirname(site_path(page))

    def on_the_site(match: re.Match) -> str:
        return posixpath.relpath(site_path(repository_path(page, match[1])), folder or ".")

    parts = CODE.split(text)
    return "".join(part if i % 2 else LINK.sub(on_the_site, part) for i, part in enumerate(parts))


def read_header(text: str) -> tuple[str, dict[str, str]]:
    """Return the description of a recipe, and its facts (command, hardware, time, result), from its first comment."""
    comment = re.match(r"(?:#.*\n)*", text)[0]
    paragraphs = re.sub(r"^# ?", "", comment, flags=re.M).split("\n\n")
    facts = re.findall(r"^(\w+): +(.*(?:\n {4,}.*)*)", paragraphs[1], flags=re.M)
    return " ".join(paragraphs[0].split()), {name: re.sub(r"\n +", "\n", value.strip()) for name, value in facts}


def recipe_names() -> list[str]:
    """Return the packaged recipes in the order of recipes/README.md."""
    return re.findall(r"^\| \[[^]]+\]\((.+)\.yaml\)", (ROOT / "recipes" / "README.md").read_text(), flags=re.M)


def render_header(name: str, page: str) -> str:
    """Return what the header of a recipe states, as Markdown for a page of the repository."""
    description, facts = read_header((ROOT / "recipes" / f"{name}.yaml").read_text())
    lines = [description, "", "```bash", facts["command"], "```", ""]
    for fact in ("hardware", "time", "result"):
        lines.append(f"- **{FACTS[fact]}:** {_with_links(' '.join(facts[fact].split()), page)}")
    return "\n".join(lines)


def _with_links(text: str, page: str) -> str:
    """Links the result files and pages that a header names."""

    def link(match: re.Match) -> str:
        target = posixpath.relpath(match[0], posixpath.dirname(page))
        return f"[{posixpath.basename(match[0])}]({target})" if (ROOT / match[0]).exists() else match[0]

    return re.sub(r"\b(?:benchmarks/results/\w+\.json|docs/[\w-]+\.md)", link, text)


def content_of(path: str) -> str:
    """Return the Markdown of the page for a file or folder outside docs/."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(child.name for child in file.iterdir() if child.name.endswith(COPIED))
        return "\n".join([f"# {path}", "", *(f"- [{name}]({file.name}/{name})" for name in names), ""])
    text = file.read_text()
    if path.endswith(".md"):
        return text
    if path.startswith("recipes/") and path.endswith(".yaml"):
        header = render_header(file.stem, path)
        return f"# {file.stem}\n\n{header}\n\n## The recipe\n\n```yaml\n{text}```\n"
    if path.endswith(".ipynb"):
        return "\n\n".join(part for cell in json.loads(text)["cells"] for part in render_cell(cell)) + "\n"
    return f"# {path}\n\n```{file.suffix[1:]}\n{text}```\n"


def render_cell(cell: dict) -> list[str]:
    """Return a cell of a notebook as Markdown: its text or code, and the texts and pictures that it printed."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            parts.append(f"```text\n{''.join(output['text'])}```")
        elif picture := output.get("data", {}).get("image/png"):
            parts.append(f"![output](data:image/png;base64,{''.join(picture).strip()})")
    return parts


def gallery() -> str:
    """Return the section of each packaged recipe, as Markdown for docs/recipes-gallery.md."""
    sections = []
    for name in recipe_names():
        header = render_header(name, "docs/recipes-gallery.md")
        sections.append(f"## {name}\n\n{header}\n- **Recipe:** [{name}.yaml](../recipes/{name}.yaml)\n")
    return "\n".join(sections)


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the files outside docs/."""
    from mkdocs.structure.files import File

    pages = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    pages["docs/recipes-gallery.md"] = gallery()
    waiting = [*OTHER_PAGES, *(path for page, text in pages.items() for path in linked_files(page, text))]
    added = set()
    while waiting:
        path = waiting.pop()
        if path in added or not (ROOT / path).exists():  # MkDocs reports a link to a file that does not exist
            continue
        added.add(path)
        source = site_path(path)
        if path.endswith(COPIED):
            files.append(File.generated(config, source, abs_src_path=str(ROOT / path)))
            continue
        content = content_of(path)
        files.append(File.generated(config, source, content=content))
        if (ROOT / path).is_dir():
            waiting += [f"{path}/{child.name}" for child in (ROOT / path).iterdir() if child.name.endswith(COPIED)]
        elif path.endswith((".md", ".yaml", ".ipynb")):
            waiting += linked_files(path, content)
    config["extra"]["repository_paths"] = {site_path(path): path for path in added}
    return files


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Point the links of a page to the site, and write the gallery."""
    path = config["extra"]["repository_paths"].get(page.file.src_uri, f"docs/{page.file.src_uri}")
    if GALLERY_MARK in markdown:
        markdown = markdown.partition(GALLERY_MARK)[0] + gallery()
    return rewrite_links(path, markdown)
