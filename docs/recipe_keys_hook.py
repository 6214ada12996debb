"""Hook of MkDocs: writes the tables of all keys of a recipe from the packaged schema into reference/recipe-keys.md."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

SCHEMA = Path(__file__).parent.parent / "hf_distill" / "recipe" / "schema.json"
KEYS_MARK = "<!-- On the site, the tables of all keys follow. -->"


def type_of(spec: dict) -> str:
    """Return the type of a key as Markdown: names of types, possible values, and links to the keys of a section."""
    if "$ref" in spec:
        name = spec["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in spec:
        return f"`{spec['const']}`"
    if "enum" in spec:
        return ", ".join(f"`{value}`" for value in spec["enum"] if value is not None)
    if choices := spec.get("anyOf") or spec.get("oneOf"):
        return " or ".join(dict.fromkeys(type_of(choice) for choice in choices))
    kinds = spec.get("type", "any value")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    items = f" of {type_of(spec['items'])}" if kinds == ["array"] and spec.get("items") else ""
    return " or ".join(kind for kind in kinds) + items


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def description_of(spec: dict, sections: dict) -> str:
    """Return the description of a key: its own, or that of its section."""
    section = sections.get(spec.get("$ref", "").rpartition("/")[2], {})
    return spec.get("description") or section.get("description", "")


def key_table(section: dict, sections: dict) -> str:
    """Return the table of the keys of a section."""
    lines = ["| key | type | description |", "|---|---|---|"]
    for key, spec in section["properties"].items():
        is_required = " (required)" if key in section.get("required", ()) else ""
        lines.append(f"| `{key}`{is_required} | {_cell(type_of(spec))} | {_cell(description_of(spec, sections))} |")
    return "\n".join(lines)


def all_keys() -> str:
    """Return the tables of a recipe and of its sections."""
    schema = json.loads(SCHEMA.read_text())
    training = schema["properties"].pop("train")
    schema["properties"]["train"] = {"description": training["description"], "type": "object"}
    parts = ["## Keys of a recipe", "", key_table(schema, schema["$defs"]), ""]
    for name, section in schema["$defs"].items():
        if "properties" in section:
            parts += [f"### {name}", "", section.get("description", ""), "", key_table(section, schema["$defs"]), ""]
    return "\n".join(parts)


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Write the tables into the page that has the mark."""
    before, mark, _ = markdown.partition(KEYS_MARK)
    return before + all_keys() if mark else markdown
