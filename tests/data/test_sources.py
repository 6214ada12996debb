"""Every kind of file gives the same examples."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from mutated_files import answer, mutated

from hf_distill import DistillError
from hf_distill.data import hold_out, load_documents

ROWS = [{"body": f"document {i}", "n": i} for i in range(5)]


@pytest.fixture
def files(tmp_path):
    data = Dataset.from_list(ROWS)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "x.json").write_text(json.dumps(ROWS))
    data.to_csv(tmp_path / "x.csv")
    data.to_parquet(tmp_path / "x.parquet")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    (tmp_path / "x.arrow").write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet", "x.arrow", "saved", "splits"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files_and_folders_give_the_same_text(files, name, streaming):
    data = load_documents(str(files / name), column="body", streaming=streaming)
    assert list(data) == [{"text": row["body"]} for row in ROWS]
    assert isinstance(data, Dataset) != streaming


def test_paragraphs_of_a_text_file_are_documents(tmp_path):
    (tmp_path / "x.txt").write_text("one\nline\n\ntwo\n")
    assert [row["text"].strip() for row in load_documents(str(tmp_path / "x.txt"))] == ["one\nline", "two"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("none.jsonl", {}, "There is no file .*none.jsonl"),
        ("x.jsonl", {}, r"has the columns \['body', 'n'\], which are none of the four formats"),
        ("x.jsonl", {"column": "txt"}, r"has no column 'txt'; it has \['body', 'n'\]"),
        ("splits", {"split": "trian"}, "has no split 'trian'; did you mean 'train'"),
    ],
)
def test_bad_sources_are_told(files, name, options, message):
    with pytest.raises(DistillError, match=message):
        load_documents(str(files / name), **options)


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
        ("x.jsonl", b'{"text": "a"}\n5\n', "line 2 holds int, and each line is an object"),
        ("x.jsonl", b'null\n{"text": "a"}\n', "row 1: found 'null.*each row is an object"),
        ("x.json", b'["a", {"text": "b"}]', "row 1: found .*each row is an object"),
        ("x.jsonl", b"[1, 2]\n", "row 1: found .*each row is an object"),
        ("x.json", b'[{"text": "a"}, 5]', "row 2 is no object"),
        ("x.json", b"5", "row 1: found '5'"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_files_are_told_with_their_place(tmp_path, name, content, message, streaming):
    (tmp_path / name).write_bytes(content)
    if streaming and message.endswith("UTF-8"):
        return  # its first row is right, and the others are read while training
    with pytest.raises(DistillError, match=f"{name}.*{message}"):
        load_documents(str(tmp_path / name), streaming=streaming)


def test_a_damaged_folder_is_told(files):
    for file in (files / "saved").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DistillError, match="saved cannot be read as a folder of save_to_disk"):
        load_documents(str(files / "saved"), column="body")


def test_fields_of_a_csv_file_are_texts(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,completion\n1+1,2\n6+1,007\nCode of Namibia?,NA\nEmpty?,\nShort?\n")
    rows = list(load_documents(str(tmp_path / "x.csv")))
    assert [row["completion"] for row in rows] == ["2", "007", "NA", None, None]


@pytest.mark.parametrize("seed", range(30))
def test_a_file_damaged_anywhere_is_read_or_told(seed, tmp_path, smollm2_tokenizer):
    name, content, _ = mutated(seed)
    (tmp_path / name).write_bytes(content)
    answer(tmp_path / name, smollm2_tokenizer, streaming=seed % 2 == 1)


def test_packaged_texts_are_there_and_others_are_told():
    modules = load_documents("package:stdlib")
    assert len(modules) > 100
    assert any("class JSONDecodeError" in text or "import" in text for text in modules["text"])
    with pytest.raises(DistillError, match="no packaged text; did you mean 'package:stdlib'"):
        load_documents("package:stdlb")


def test_whole_documents_are_held_out_the_same_way_each_time():
    data = Dataset.from_list([{"text": str(i)} for i in range(20)])
    (train, test), again = hold_out(data, 0.2, seed=3), hold_out(data, 0.2, seed=3)
    assert (train["text"], test["text"]) == (again[0]["text"], again[1]["text"])
    assert len(test) == 4
    assert sorted([*train["text"], *test["text"]], key=int) == data["text"]
