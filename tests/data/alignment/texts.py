"""Random texts of many scripts."""

from hypothesis import strategies as st

_WORDS = [
    *(
        "Hello",
        " world",
        "import",
        " x",
        "tion",
        "the",
        " The",
        "naïve",
        " café",
        "cafe\u0301",
        "A\u030a",
        "e\u0301\u0323",
    ),
    *(
        "Всё",
        " мир",
        "Ελληνικά",
        "हिन्दी",
        " में",
        "สวัสดี",
        "你好",
        "世界。",
        "日本語",
        "한국어",
        "\u1112\u1161\u11ab",
        "עברית",
        "العربية",
    ),
    *("🤦🏽‍♂️", "🎉", " 👨‍👩‍👧", "🇩🇪", "\u200b", "\ufeff", "ﬁ", "Ⅷ", "①", "½", "\ufffd", "\u0301"),
    *("1", "12", "123", "2024", " 3.14159", "1,000,000", "٣٤", "7" * 9),
    *(" ", "  ", "    ", "\n", "\r\n", "\t", "\n\n", "\u00a0", "\u3000", " \n "),
    *(
        "def f(x):\n    return x",
        "a[0] += 1;",
        "<div>",
        "</s>",
        "<|im_end|>",
        "<eos>",
        "<0x0A>",
        "▁",
        "Ġ",
        "\\n",
        "\x00",
    ),
]


def texts(min_size: int = 0, max_size: int = 12) -> st.SearchStrategy[str]:
    """Texts of words, numbers, white space and code of many scripts, and of any other characters."""
    characters = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
    return st.lists(st.sampled_from(_WORDS) | characters, min_size=min_size, max_size=max_size).map("".join)
