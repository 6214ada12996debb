"""External text is expected literally in a terminal, in Markdown, in YAML and in HTML."""

from html.parser import HTMLParser

import pytest
import yaml
from markdown_it import MarkdownIt

from hf_distill.core.escape import code_block, code_span, html_text, markdown, printable, yaml_text

ATTACKS = [
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "[click](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "<https://evil.example>",
    "`code` **bold** _it_ ~~gone~~ $x^2$ a|b",
    "```\n</code></pre><script>alert(1)</script>\n```",
    "a\n\n# heading\n\n- item\n1. one\n---\n| a |\n|---|",
    "--- \nlicense: mit\n---",
    "# heading",
    "- item",
    "12. item",
    "&lt;b&gt; &#60;i&#62;",
    "\\<b\\> back\\slash\\",
    "{{ 7 * 7 }} {% raw %}",
    "]: x\n[a]: https://evil.example",
    "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202egnp.exe",
    "key: value # comment",
    "!!python/object/apply:os.system ['true']",
    "*alias &anchor",
]
_READER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


class Text(HTMLParser):
    """The text and the tags of an HTML page."""

    def __init__(self, page: str):
        super().__init__()
        self.text, self.tags = "", []
        self.feed(page)

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)


@pytest.mark.parametrize("text", ATTACKS)
@pytest.mark.parametrize("template", ["{}\n", "- a line: {}\n", "- {}\n", "| a | b |\n| --- | --- |\n| {} | 1 |\n"])
def test_markdown_renders_text_literally(text, template):
    expected = " ".join(printable(text).split())
    page, plain = Text(_READER.render(template.format(markdown(text)))), Text(_READER.render(template.format("word")))
    assert page.tags == plain.tags
    assert page.text == plain.text.replace("word", expected)


@pytest.mark.parametrize("text", ATTACKS)
def test_code_spans_and_blocks_contain_only_the_text(text):
    page = Text(_READER.render(code_span(text)))
    assert (page.tags, page.text.strip()) == (["p", "code"], " ".join(printable(text).split()))
    page = Text(_READER.render(f"before\n\n{code_block(text, 'python')}\n\nafter"))
    assert page.tags == ["p", "pre", "code", "p"]
    assert printable(text) in page.text


@pytest.mark.parametrize("text", ATTACKS)
def test_yaml_round_trips_text(text):
    values = {"name": text, text: [text, {"a": text}]}
    assert yaml.safe_load(yaml_text(values)) == values
    assert "\n---" not in yaml_text(values)


@pytest.mark.parametrize("text", ATTACKS)
def test_html_renders_text_literally(text):
    assert Text(f'<p title="{html_text(text)}">{html_text(text)}</p>').tags == ["p"]
    assert Text(html_text(text)).text == printable(text)


def test_printable_removes_control_characters_only():
    assert printable("\x1b[31mred\x07\x9b \u202eevil") == "[31mred evil"
    assert printable("tab\tand\r\nline\n\tcafé 日本 👍") == "tab\tand\nline\n\tcafé 日本 👍"
