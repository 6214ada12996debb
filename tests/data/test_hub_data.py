"""Data sets on the Hub with a malformed card or file, or with a card that names other files, raise a one-line error."""

import pytest

from hf_distill import DistillError
from hf_distill.data.load import load_examples

CARDS = {
    "absolute file": "configs:\n- config_name: default\n  data_files: {path}\n",
    "absolute file of a split": "configs:\n- config_name: default\n  data_files: [{{split: train, path: {path}}}]\n",
    "file above": "configs:\n- config_name: default\n  data_files: ../../../../../../../../..{path}\n",
    "file address": "configs:\n- config_name: default\n  data_files: file://{path}\n",
    "file of another repository": "configs:\n- config_name: default\n  data_files: hf://datasets/org/other/a.jsonl\n",
    "no list of configurations": "configs: 5\n",
    "numbers for names": "configs:\n- config_name: 5\n  data_files: [1]\n",
    "no features": "dataset_info:\n  features: 7\n",
    "no YAML": "configs: [\n",
    "no such file": "configs:\n- config_name: default\n  data_files: nothing.csv\n",
}


@pytest.mark.parametrize("what", CARDS)
def test_a_malformed_card_raises_a_one_line_error(hub, tmp_path, what):
    (tmp_path / "secret.jsonl").write_text('{"text": "SECRET"}\n')
    card = CARDS[what].format(path=tmp_path / "secret.jsonl")
    hub.put("datasets", "org/other", {"a.jsonl": b'{"text": "other"}\n'})
    hub.put("datasets", "org/rows", {"README.md": f"---\n{card}---\n".encode(), "a.jsonl": b'{"text": "good"}\n'})
    with pytest.raises(DistillError, match="org/rows") as caught:
        load_examples("org/rows")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "files",
    [
        {"a.jsonl": b'{"text": "a"}\n{"text": '},
        {"a.parquet": b"PAR1 cut"},
        {"a.arrow": b"none"},
        {"a.csv": b"text\n\xff\xfe\n"},
        {"a.jsonl": b""},
        {"notes.bin": b"x"},
    ],
    ids=lambda files: next(iter(files)),
)
def test_a_malformed_file_of_a_data_set_raises_a_one_line_error(hub, files):
    hub.put("datasets", "org/rows", files)
    with pytest.raises(DistillError, match="org/rows") as caught:
        load_examples("org/rows")
    assert "\n" not in str(caught.value)
