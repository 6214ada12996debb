"""Filters on texts against naive references: length, repetition, language, duplicates, n-grams, code."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hf_distill import DistillError
from hf_distill.filters import apply_filters
from hf_distill.filters.code_blocks import PythonParses, split_code
from hf_distill.filters.contamination import Decontaminate, EvaluationTexts
from hf_distill.filters.duplicates import ExactDuplicates, NearDuplicates
from hf_distill.filters.language import Language
from hf_distill.filters.text_filters import BannedNgrams, Length, Repetition, repeated_share
from hf_distill.filters.words import ngrams, words, words_and_marks

ENGLISH = "The train leaves the station in the morning and arrives at noon."
GERMAN = "Der Zug verlässt den Bahnhof am Morgen und kommt am Mittag an."
CHINESE = "火车早上离开车站，中午到达目的地，晚上又从那里返回，一天往返一次，乘客很多，所以需要提前买票。"
TOKENS = st.lists(st.sampled_from("abc"), max_size=12)


def row(completion="", prompt="A question?", **columns):
    return {"prompt": prompt, "completion": completion, "source": "task"} | columns


def kept(filters, *completions, prompt="A question?"):
    """The positions of the completions that a filter keeps."""
    judge = filters.start()
    return [i for i, text in enumerate(completions) if judge(row(text, prompt))]


def test_words_ignore_case_and_punctuation_and_split_chinese_by_characters():
    assert words("Don't STOP，the 2nd ﬁle!") == ["don", "t", "stop", "the", "2nd", "file"]
    assert words("我爱AI模型") == ["我", "爱", "ai", "模", "型"]
    assert words_and_marks("No! No...") == ["no", "!", "no", ".", ".", "."]


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 5), st.integers(5, 9))
@settings(deadline=None)
def test_length_is_a_range_of_tokens_and_of_characters(characters, tokens, low, high):
    text = "x" * characters
    for limits, value in (("characters", characters), ("tokens", tokens)):
        filters = Length(**{f"min_{limits}": low, f"max_{limits}": high})
        assert filters.keep(row(text, tokens=tokens)) is (low <= value <= high)


@given(TOKENS, st.integers(1, 4))
@settings(deadline=None)
def test_repeated_share_equals_a_naive_count(tokens, n):
    grams, seen, repeated = ngrams(tokens, n), [], 0
    for gram in grams:
        repeated += gram in seen
        seen.append(gram)
    assert repeated_share(" ".join(tokens), n) == pytest.approx(repeated / len(grams) if grams else 0)


def test_loops_of_words_marks_or_characters_are_repetition():
    loops = ["and so on " * 20, "! " * 50, "。" * 50, "好的好的" * 20]
    assert kept(Repetition(), ENGLISH, CHINESE, "", *loops) == [0, 1, 2]


@pytest.mark.parametrize(
    ("prompt", "completion", "is_kept"),
    [
        (ENGLISH, ENGLISH, True),
        (ENGLISH, GERMAN, False),
        (GERMAN, GERMAN, True),
        (GERMAN, ENGLISH, False),
        (ENGLISH, CHINESE, False),
        (CHINESE, CHINESE, True),
        (ENGLISH, "Ja, genau.", True),  # too short to tell
        ("Why?", GERMAN, True),
        (ENGLISH, "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22", True),
        (ENGLISH, f"```\n{GERMAN}\n```", True),  # code
        (ENGLISH, f"```\n{ENGLISH}\n```\n{GERMAN}", False),
    ],
)
def test_the_language_of_the_prompt_is_kept(prompt, completion, is_kept):
    assert kept(Language(), completion, prompt=prompt) == [0] * is_kept


def test_languages_can_be_given_and_unknown_ones_are_an_error():
    assert kept(Language(languages=["de", "zh"]), ENGLISH, GERMAN, CHINESE) == [1, 2]
    with pytest.raises(DistillError, match="unknown code 'german'"):
        Language(languages=["german"]).start()


def test_exact_duplicates_are_those_of_one_prompt_unless_all_prompts_are_compared():
    rows = [row("42"), row(" 42\n"), row("42", "Other?"), row("43"), row("42 "), row("\ud800"), row("\ud800")]
    assert apply_filters(rows, [ExactDuplicates()]).positions == [0, 2, 3, 5]
    assert apply_filters(rows, [ExactDuplicates(across_prompts=True)]).positions == [0, 3, 5]


def jaccard(a, b, n):
    a, b = ({*ngrams(words(text), n)} for text in (a, b))
    return len(a & b) / len(a | b)


def test_near_duplicates_agree_with_the_exact_jaccard_similarity_away_from_the_threshold():
    generator = random.Random(0)
    vocabulary = [f"w{i}" for i in range(500)]
    originals = [generator.choices(vocabulary, k=60) for _ in range(30)]
    texts = [*originals]
    for original in originals:  # 0 to 29 words are replaced
        changed = [*original]
        for i in generator.sample(range(60), len(texts) - 30):
            changed[i] = generator.choice(vocabulary)
        texts.append(changed)
    texts = [" ".join(tokens) for tokens in texts]
    positions = kept(NearDuplicates(threshold=0.5, n=1, permutations=512), *texts)
    compared = 0
    for i, text in enumerate(texts):
        similarity = max((jaccard(text, texts[j], 1) for j in range(i) if j in positions), default=0)
        if abs(similarity - 0.5) > 0.12:
            compared += 1
            assert (i in positions) is (similarity < 0.5), similarity
    assert compared > 45
    assert 30 < len(positions) < 60


def test_near_duplicates_across_prompts_and_texts_shorter_than_an_ngram():
    rows = [row(ENGLISH), row(ENGLISH.upper(), "Other?"), row("Yes."), row("yes"), row("No."), row(""), row("")]
    assert apply_filters(rows, [NearDuplicates()]).positions == [0, 1, 2, 4, 5, 6]
    assert apply_filters(rows, [NearDuplicates(across_prompts=True)]).positions == [0, 2, 4, 5, 6]


def contains(tokens, phrase):
    return any(tokens[i : i + len(phrase)] == phrase for i in range(len(tokens) - len(phrase) + 1))


@given(TOKENS, st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3), min_size=1, max_size=3))
@settings(deadline=None)
def test_banned_ngrams_equal_a_naive_search(tokens, phrases):
    filters = BannedNgrams(phrases=[" ".join(phrase) for phrase in phrases])
    expected = not any(contains(tokens, phrase) for phrase in phrases)
    assert bool(kept(filters, " ".join(tokens))) is expected


def test_banned_ngrams_are_whole_words():
    assert kept(BannedNgrams(phrases=["an AI"]), "I'm AN, ai.", "an aim", "Japan AI") == [1, 2]
    with pytest.raises(ValidationError, match="has no words"):
        BannedNgrams(phrases=["..."])


@given(TOKENS, TOKENS, st.lists(TOKENS, min_size=1, max_size=3), st.integers(1, 4), st.data())
@settings(max_examples=200, deadline=None)
def test_decontamination_equals_a_naive_search(prompt, completion, texts, n, data):
    min_words = data.draw(st.integers(1, n))
    filters = Decontaminate(data=[{"path": "x"}], n=n, min_words=min_words)
    texts = [text for text in texts if len(text) >= min_words] or [["a"] * n]
    grams = [list(gram) for text in texts for gram in ngrams(text, min(n, len(text)))]
    expected = not any(contains(tokens, gram) for tokens in (prompt, completion) for gram in grams)
    judge = filters.compare_with(" ".join(text) for text in [*texts, []])
    assert judge(row(" ".join(completion), " ".join(prompt))) is expected


def test_evaluation_texts_are_read_from_files_with_nested_columns(tmp_path):
    path = tmp_path / "test.jsonl"
    task = {"question": ENGLISH, "choices": ["one", GERMAN], "label": 2, "chat": [{"role": "user", "content": CHINESE}]}
    path.write_text(json.dumps(task) + "\n")
    rows = [row(f"I say: {text.upper()}!") for text in (ENGLISH, GERMAN, CHINESE, "one")] + [row("", ENGLISH)]
    data = {"path": str(path)}
    assert apply_filters(rows, [Decontaminate(data=[data], n=8)]).positions == [3]
    data["columns"] = ["choices", "label"]
    assert apply_filters(rows, [Decontaminate(data=[EvaluationTexts(**data)])]).positions == [0, 2, 3, 4]
    with pytest.raises(DistillError, match="no column 'qestion'; did you mean 'question'"):
        apply_filters(rows, [Decontaminate(data=[data | {"columns": ["qestion"]}])])
    with pytest.raises(DistillError, match=r"none of 0 texts .* has 8 words"):
        apply_filters(rows, [Decontaminate(data=[data | {"columns": ["label"]}])])


CODE = "```python\nprint(1)\n```\n"


@pytest.mark.parametrize(
    ("completion", "is_kept"),
    [
        (CODE, True),
        ("```python\nprint 1\n```", False),
        (f"{CODE}and\n~~~Py title=x\nif:\n~~~", False),
        ("```bash\nls | \n```", True),
        ("```\nprint 1\n```", True),
        ("Text: print 1", True),
        ("```python\ndef f(:", False),  # cut off
        ("> ```python\n> x = 1\n> ```", True),
        ("````python\nx = '''\n```\n'''\n````", True),
        ("1. Run:\n   ```python\n   x = 1\n   ```", True),
        ("```python\nx = 1\0\n```", False),
        (f"```python\n{'(' * 10_000}\n```", False),
        (f"```python\n{'-' * 100_000}1\n```", False),
        ("```python\nprint('\\d')\n```", True),  # a SyntaxWarning
    ],
)
def test_python_code_blocks_parse(completion, is_kept):
    assert PythonParses().keep(row(completion)) is is_kept


def test_code_is_not_executed_and_completions_without_code_can_be_removed(tmp_path):
    path = tmp_path / "executed"
    code = f"```python\nopen({str(path)!r}, 'w')\n```"
    assert kept(PythonParses(without_code="remove"), code, "No code.", "```js\n1\n```") == [0]
    assert not path.exists()


def test_prose_and_code_are_split():
    prose, blocks = split_code(f"Be\u2028f\x0core.\r\n{CODE}Between.\n```Rust\nfn\n```\nAfter.")
    assert (prose, blocks) == ("Be\u2028f\x0core.\nBetween.\nAfter.", [("python", "print(1)\n"), ("rust", "fn\n")])
