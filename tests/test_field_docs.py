"""`docs/field_docs.py`: the texts of fields on the pages of the reference."""

import importlib.util
from pathlib import Path

import pytest

griffe = pytest.importorskip("griffe")
FILE = Path(__file__).parents[1] / "docs" / "field_docs.py"
SOURCE = '''
from dataclasses import dataclass, field
from pydantic import BaseModel, Field


@dataclass
class Options:
    """Options.

    steps: number of steps
    rate:  learning rate
    """

    steps: int = field(default=1, metadata={"help": "Number of steps."})
    rate: float = 0.1
    seen: int = field(default=0)
    names: list = field(default_factory=list, metadata={"help": "Names."})
    """Names that are documented in the source."""


class Section(BaseModel):
    """A section: one line with a colon is no list."""

    path: str = Field("x", description="Path of the data.")
'''


@pytest.fixture
def members(tmp_path, monkeypatch):
    """The classes of SOURCE as the reference reads them."""
    (tmp_path / "documented_fields.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = importlib.util.spec_from_file_location("field_docs", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    extensions = griffe.load_extensions(module.FieldDocs())
    return griffe.load("documented_fields", search_paths=[tmp_path], extensions=extensions).members


def test_fields_have_the_help_text_or_the_description_in_place_of_their_value(members):
    for owner, name, text in (("Options", "steps", "Number of steps."), ("Section", "path", "Path of the data.")):
        attribute = members[owner].members[name]
        assert attribute.docstring.value == text
        assert attribute.value is None


def test_other_attributes_keep_their_value_and_docstring(members):
    options = members["Options"].members
    assert options["rate"].docstring is None
    assert str(options["rate"].value) == "0.1"
    assert options["seen"].docstring is None
    assert options["names"].docstring.value == "Names that are documented in the source."
    assert options["names"].value is not None


def test_paragraphs_that_describe_attributes_are_lists(members):
    assert members["Options"].docstring.value == "Options.\n\n- **steps**: number of steps\n- **rate**: learning rate"
    assert members["Section"].docstring.value == "A section: one line with a colon is no list."
