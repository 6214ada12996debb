"""Every kind of file gives the same examples."""

import json

import pytest
from datasets import Dataset, DatasetDict

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
        ("broken.csv", {}, "broken.csv cannot be read as .csv"),
        ("blank.jsonl", {}, "has no documents"),
        ("blank.csv", {}, "has no documents"),
    ],
)
def test_bad_sources_are_told(files, name, options, message):
    for blank in ("blank.jsonl", "blank.csv"):
        (files / blank).write_text("")
    (files / "broken.csv").write_text("text\na,b,c\nd,e,f,g,h\n")
    with pytest.raises(DistillError, match=message):
        load_documents(str(files / name), **options)


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
