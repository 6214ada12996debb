"""All file types give the same examples, and errors of damaged files name the line or row."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from mutated_files import mutated_file, read_error

from hf_distill import DistillError
from hf_distill.data import load_examples, split_held_out, tokenize_dataset

ROWS = [{"body": f"document {i}", "n": i} for i in range(5)]


@pytest.fixture
def files(tmp_path):
    data = Dataset.from_list(ROWS)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "x.json").write_text(json.dumps(ROWS))
    (tmp_path / "x.tsv").write_text("body\nx\n")
    (tmp_path / "semicolon.csv").write_text("a;b\n1;2\n")
    data.to_csv(tmp_path / "x.csv")
    data.to_parquet(tmp_path / "x.parquet")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    (tmp_path / "x.arrow").write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet", "x.arrow", "saved", "splits"])
@pytest.mark.parametrize("streaming", [False, True])
def test_all_file_types_give_the_same_text(files, name, streaming):
    data = load_examples(str(files / name), column="body", streaming=streaming)
    assert list(data) == [{"text": row["body"]} for row in ROWS]
    assert isinstance(data, Dataset) != streaming


def test_paragraphs_of_a_text_file_are_documents(tmp_path):
    (tmp_path / "x.txt").write_text("one\nline\n\ntwo\n")
    assert [row["text"].strip() for row in load_examples(str(tmp_path / "x.txt"))] == ["one\nline", "two"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("none.jsonl", {}, "There is no file .*none.jsonl"),
        ("x.jsonl", {}, r"has the columns \['body', 'n'\], which are none of the four formats"),
        ("x.jsonl", {"column": "txt"}, r"has no column 'txt'; it has \['body', 'n'\]"),
        ("x.tsv", {}, r"x.tsv has no supported suffix; supported are \.txt, \.jsonl"),
        ("semicolon.csv", {}, "has one column, 'a;b': fields of a CSV file must be separated by commas"),
        ("splits", {"split": "trian"}, "has no split 'trian'; did you mean 'train'"),
    ],
)
def test_invalid_sources_are_refused(files, name, options, message):
    with pytest.raises(DistillError, match=message):
        load_examples(str(files / name), **options)


def parquet(table) -> bytes:
    pq.write_table(table, sink := io.BytesIO())
    return sink.getvalue()


TEXTS = pa.table({"text": ["a", "b"]})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"text\na,b,c\nd,e,f,g,h\n", "cannot be read as .csv: .*line 3"),
        ("x.csv", b'text\n"a\nb\n', "cannot be read as .csv: .*EOF inside string"),
        ("x.csv", b"text\n", "has no documents"),
        ("x.csv", b"", "has no documents"),
        ("x.jsonl", b"", "has no documents"),
        ("x.jsonl", b"\n\n", "has no documents"),
        ("x.jsonl", b"{}\n{}\n", "has no documents"),
        ("x.json", b"[]", "has no documents"),
        ("x.parquet", parquet(TEXTS.slice(0, 0)), "has no documents"),
        ("x.parquet", parquet(TEXTS)[:-9], "cannot be read as .parquet: .*not found in footer"),
        ("x.arrow", b"ARROW1", "cannot be read as .arrow"),
        ("x.txt", b"\xff\xfe", "cannot be read as .txt: .*invalid start byte"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8"),
        ("x.jsonl", '{"text": "\u2028"}\n{"text": b}\n'.encode(), "cannot be read as .jsonl: line 2 is not JSON: "),
        ("x.jsonl", b'{"text": "a"}\n5\n', "line 2 holds int, but each line must be an object"),
        ("x.jsonl", b'null\n{"text": "a"}\n', "line 1 holds null, but each line must be an object"),
        ("x.json", b'["a", {"text": "b"}]', r"row 0 \(counted from 0\) holds str, but each row must be an object"),
        ("x.jsonl", b"[1, 2]\n", r"row 0 \(counted from 0\) holds int, but each row must be an object"),
        ("x.json", b'[{"text": "a"}, 5]', r"row 1 \(counted from 0\) holds int"),
        ("x.json", b'[{"text": "a"},\n{"text": }]', "line 2 is not JSON"),
        (
            "x.json",
            b'{\n"text": "a"\n}',
            "line 1 is not JSON: .* A JSON file must hold a list of objects, or an object on",
        ),
        ("x.json", b"5", "line 1 holds int"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2 holds half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_an_error_of_a_damaged_file_names_the_line_or_row(tmp_path, name, content, message, streaming):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DistillError, match=f"{name}.*{message}"):
        list(load_examples(str(tmp_path / name), streaming=streaming))


ODD_TEXTS = ["1", "null", '"quoted"', " true", '{"a": 1}', "\u2028 \x00 \\ é \U0001f600", "", "2020-01-01", None]
ODD_MESSAGES = [
    [{"role": "user", "content": text}, {"role": "tool", "content": [{"text": text}]}] for text in ODD_TEXTS
]
CALLS = [{"arguments": {"a": 1}}, {"arguments": {"a": "1"}}, {"arguments": '{"a": 1}'}, {"arguments": {"b": [None]}}]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("late", [0, 1_500])
@pytest.mark.parametrize(
    "values",
    [
        ODD_TEXTS,
        ODD_MESSAGES,
        [*ODD_TEXTS, 5],
        [*ODD_TEXTS, {"a": 1}],
        [*ODD_TEXTS, ["a"]],
        [*CALLS],
        [1, 2.5, 10**25],
        [True, 1],
        [[1, 2], [None, 3], [10**25]],
        [{}, {"a": {}}, []],
    ],
)
def test_values_of_a_json_file_are_not_changed(tmp_path, name, streaming, late, values):
    """Values may have several types, also if the second type first occurs after many rows."""
    rows = [{"text": "a", "messages": "b"}] * late + [{"text": "a", "messages": value} for value in values]
    lines = [json.dumps(row) for row in rows]
    content = "\n".join(lines) if name == "x.jsonl" else f"[{','.join(lines)}]"
    (tmp_path / name).write_text(content, encoding="utf-8")
    read = list(load_examples(str(tmp_path / name), streaming=streaming))
    expected = [json.loads(line) for line in lines]
    assert [row["text"] for row in read] == [row["text"] for row in expected]
    for row, expected_row in zip(read, expected, strict=True):
        assert without_null(row["messages"]) == without_null(expected_row["messages"])
        assert type(row["messages"]) is type(expected_row["messages"]) or isinstance(expected_row["messages"], int)


def without_null(value):
    """Remove the nulls that Arrow adds where an object lacks a key of another object."""
    if isinstance(value, dict):
        return {key: without_null(inner) for key, inner in value.items() if inner is not None}
    return [without_null(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("value", [5, {"a": 1}, ["a"], None])
def test_an_error_of_a_late_value_names_the_row(tmp_path, smollm2_tokenizer, streaming, value):
    rows = [{"text": f"text {i}"} for i in range(1_500)] + [{"text": value}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_examples(str(tmp_path / "x.jsonl"), streaming=streaming)
    with pytest.raises(DistillError, match=r"^x.jsonl, row 1500 \(counted from 0\), column text: found .*needs a text"):
        list(tokenize_dataset(data, smollm2_tokenizer, 16, where="x.jsonl"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"messages": [{"role": "user", "content": "Hello?"}]},
            "examples has a target token among its first max_length=16",
        ),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "examples has a target token"),
        ({"text": "too short"}, "documents hold fewer than max_length=16 tokens"),
    ],
)
def test_data_without_rows_is_refused_before_training(tmp_path, smollm2_tokenizer, streaming, row, problem):
    (tmp_path / "x.jsonl").write_text((json.dumps(row) + "\n") * 2)
    with pytest.raises(DistillError, match=f"^data.x: .*{problem}"):
        tokenize_dataset(
            load_examples(str(tmp_path / "x.jsonl"), streaming=streaming), smollm2_tokenizer, 16, where="data.x"
        )


def test_a_changed_file_is_read_again(tmp_path):
    for text in ("a", "b"):
        (tmp_path / "x.jsonl").write_text(json.dumps({"text": text}))
        assert list(load_examples(str(tmp_path / "x.jsonl"))) == [{"text": text}]


def test_a_column_that_first_occurs_late_in_a_stream_is_refused(tmp_path):
    lines = [json.dumps({"text": "a"})] * 1_000 + [json.dumps({"text": "b", "extra": 1, "tools": "[]"})]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    assert len(load_examples(str(tmp_path / "x.jsonl"))) == 1_001
    with pytest.raises(DistillError, match=r"x.jsonl, row 1000 \(counted from 0\), has the column tools"):
        list(load_examples(str(tmp_path / "x.jsonl"), streaming=True))


def late_damage(suffix: str) -> bytes:
    """Return a file whose first rows are valid and whose last row is damaged."""
    texts = [f"text {i}" for i in range(12_000)]
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), sink := io.BytesIO(), row_group_size=1_000)
        content = bytearray(sink.getvalue())
        content[len(content) // 2 : len(content) // 2 + 2_000] = bytes(2_000)
        return bytes(content)
    if suffix == ".txt":
        return "\n\n".join(text * 1_000 for text in texts[:1_500]).encode() + b"\xff"
    return ("text\n" + "\n".join(texts)).encode() + b"\na,b,c\n"


@pytest.mark.parametrize("suffix", [".csv", ".txt", ".parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_an_error_late_in_a_file_is_raised_once_and_not_logged(tmp_path, suffix, streaming, caplog):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(late_damage(suffix))
    with pytest.raises(DistillError, match=f"x{suffix} cannot be read as {suffix}: "):
        list(load_examples(str(path), streaming=streaming))
    assert not [record for record in caplog.records if record.getMessage().startswith("Failed to")]


def test_other_log_lines_of_datasets_are_not_suppressed(tmp_path, caplog):
    (tmp_path / "x.csv").write_bytes(late_damage(".csv"))
    with pytest.raises(DistillError):
        load_examples(str(tmp_path / "x.csv"))
    with pytest.raises(DatasetGenerationError):
        load_dataset("csv", data_files=str(tmp_path / "x.csv"))
    assert len([record for record in caplog.records if record.getMessage().startswith("Failed to read file")]) == 1


def test_a_damaged_folder_is_refused(files):
    for file in (files / "saved").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DistillError, match="saved cannot be read as a folder of save_to_disk"):
        load_examples(str(files / "saved"), column="body")


def test_fields_of_a_csv_file_are_texts(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,completion\n1+1,2\n6+1,007\nCode of Namibia?,NA\nEmpty?,\nShort?\n")
    rows = list(load_examples(str(tmp_path / "x.csv")))
    assert [row["completion"] for row in rows] == ["2", "007", "NA", None, None]


@pytest.mark.parametrize("seed", range(30))
def test_a_randomly_damaged_file_is_read_or_refused(seed, tmp_path, smollm2_tokenizer):
    name, content, _ = mutated_file(seed)
    (tmp_path / name).write_bytes(content)
    error = read_error(tmp_path / name, smollm2_tokenizer, streaming=seed % 2 == 1)  # propagates other exceptions
    assert error is None or name in error


def test_packaged_texts_are_loaded_and_unknown_ones_refused():
    modules = load_examples("package:stdlib")
    assert len(modules) > 100
    assert any("class JSONDecodeError" in text or "import" in text for text in modules["text"])
    with pytest.raises(DistillError, match="not a packaged text; did you mean 'package:stdlib'"):
        load_examples("package:stdlb")


def test_the_same_seed_gives_the_same_split_of_documents():
    data = Dataset.from_list([{"text": str(i)} for i in range(20)])
    (train, test), again = split_held_out(data, 0.2, seed=3), split_held_out(data, 0.2, seed=3)
    assert (train["text"], test["text"]) == (again[0]["text"], again[1]["text"])
    assert len(test) == 4
    assert sorted([*train["text"], *test["text"]], key=int) == data["text"]
