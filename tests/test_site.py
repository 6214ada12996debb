"""The documentation site: navigation, gallery and reference leave nothing out, and links keep their target."""

import importlib.util
import inspect
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import hf_distill
from hf_distill.recipe import list_recipes

ROOT = Path(hf_distill.__file__).parent.parent
PUBLIC_MODULES = [
    "hf_distill",
    *(
        f"hf_distill.{name}"
        for name in [
            "analysis",
            "cache",
            "data",
            "filters",
            "losses",
            "model_types",
            "recipe",
            "student",
            "teachers",
            "trainer",
            "trl",
        ]
    ),
    "hf_distill.teachers.multi_view",
]


def load_file(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hook():
    return load_file("site_hook")


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without the Python objects that MkDocs makes of it."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def nav_pages(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry if isinstance(entry, list) else entry.values()) for page in nav_pages(part)]


def test_no_page_is_missing_from_the_navigation(hook):
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    docs = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    pages = docs + [hook.site_path(path) for path in hook.OTHER_PAGES]
    assert sorted(nav_pages(config["nav"])) == sorted(pages)


def test_no_recipe_is_missing_from_the_gallery(hook):
    assert sorted(hook.recipe_names()) == sorted(list_recipes())
    assert re.findall(r"^## (\S+)$", hook.gallery(), flags=re.M) == hook.recipe_names()


@pytest.mark.parametrize("name", list_recipes())
def test_the_gallery_leaves_out_no_words_of_a_header(hook, name):
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    description, facts = hook.read_header(text)
    assert list(facts) == ["command", "hardware", "time", "result"]
    stated = re.sub(r"^# ?", "", re.match(r"(?:#.*\n)*", text)[0], flags=re.M).split("\n\n")[:2]
    assert description == " ".join(stated[0].split())
    rest = " ".join(f"{fact}: {' '.join(value.split())}" for fact, value in facts.items())
    assert rest == " ".join(stated[1].split())


def test_a_result_file_of_a_header_is_a_link(hook):
    assert "[quickstart.json](../benchmarks/results/quickstart.json)" in hook.gallery()
    assert "](../../docs" not in hook.render_header("prune-width", "recipes/prune-width.yaml")


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("docs/hub.md", "recipes.md#tasks", "recipes.md#tasks"),
        ("docs/hub.md", "../recipes/quickstart.yaml", "recipes/quickstart.md"),
        ("docs/hub.md", "../recipes/README.md", "recipes-gallery.md"),
        ("docs/hub.md", "../hf_distill/teachers/base.py", "hf_distill/teachers/base.py.md"),
        ("docs/hub.md", "../benchmarks/results/evidence", "benchmarks/results/evidence.md"),
        ("docs/how-to/api.md", "../../benchmarks/results/hub.json", "../benchmarks/results/hub.json"),
        ("docs/how-to/api.md", "../hub.md", "../hub.md"),
        ("README.md", "docs/hub.md#publish", "hub.md#publish"),
        ("benchmarks/README.md", "../docs/evidence.md", "../evidence.md"),
        ("model_cards/quickstart/README.md", "figures/curve.png", "figures/curve.png"),
        ("docs/hub.md", "https://arxiv.org/abs/1503.02531", "https://arxiv.org/abs/1503.02531"),
        ("docs/hub.md", "#chains", "#chains"),
    ],
)
def test_a_link_keeps_its_target_on_the_site(hook, page, link, expected):
    assert hook.rewrite_links(page, f"See [x]({link}).") == f"See [x]({expected})."


def test_a_notebook_becomes_a_page_with_its_text_code_outputs_and_pictures(hook):
    page = hook.content_of("examples/quickstart.ipynb")
    assert page.startswith("# Knowledge distillation")
    assert "```python\nfrom hf_distill import DistillConfig, DistillTrainer\n" in page
    assert "```text\nPython 3" in page
    assert "](data:image/png;base64," in page
    assert "examples/README.md" in hook.linked_files("examples/quickstart.ipynb", page)


def test_links_in_code_stay_as_they_are(hook):
    text = "`[x](../recipes/ema.yaml)`\n\n```python\ny = [x](../recipes/ema.yaml)\n```\n"
    assert hook.rewrite_links("docs/hub.md", text) == text
    assert hook.linked_files("docs/hub.md", text) == []
    assert hook.linked_files("docs/hub.md", "[x](../recipes/ema.yaml)") == ["recipes/ema.yaml"]


@pytest.fixture(scope="module")
def documented():
    """The objects that the reference documents, by their path."""
    pages = (ROOT / "docs" / "reference").glob("*.md")
    paths = [path for page in pages for path in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.M)]
    assert len(paths) == len({*paths})
    parts = [path.rpartition(".") for path in paths]
    return {path: getattr(import_module(module), name) for path, (module, _, name) in zip(paths, parts, strict=True)}


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_no_public_name_is_missing_from_the_reference(module, documented):
    objects = [id(value) for value in documented.values()]
    public = import_module(module)
    assert [name for name in public.__all__ if id(getattr(public, name)) not in objects] == []


def test_no_entry_of_the_reference_is_read_as_a_module(documented):
    modules = [path for path in documented if (ROOT / f"{path.replace('.', '/')}.py").exists()]
    assert modules == []
    assert not any(inspect.ismodule(value) for value in documented.values())


def test_no_key_of_a_recipe_is_missing_from_the_tables():
    text = load_file("recipe_keys_hook").all_keys()
    schema = json.loads((ROOT / "hf_distill" / "recipe" / "schema.json").read_text())
    assert re.findall(r"^### (\w+)$", text, flags=re.M) == list(schema["$defs"])
    sections = re.split(r"^##+ .*$", text, flags=re.M)[1:]
    for section, keys in zip([schema, *schema["$defs"].values()], sections, strict=True):
        assert sorted(re.findall(r"^\| `(\w+)`", keys, flags=re.M)) == sorted(section["properties"])
    assert "| `student` (required) | [Student](#student) | " in text
