"""Cards: their code runs, their words follow from the facts, and nothing private is in them."""

import re
from dataclasses import replace

import pytest
import yaml
from hub_server import Hub, pointed
from tiny import build
from transformers import PreTrainedTokenizerFast

from hf_distill.card import Facts, card_of, missing
from hf_distill.hub.licences import Judged
from hf_distill.names import public
from hf_distill.recipe.smoke import byte_tokenizer

FACTS = Facts(
    repo="org/small",
    task="text-generation",
    student={"model": "org/base", "parameters": 1_500_000},
    teachers={"teacher": {"kind": "frozen", "model": "org/large", "revision": "c" * 40, "licence": "mit"}},
    objective={"temperature": 2.0, "alpha": 0.5, "divergence": {"name": "js", "beta": 0.1}, "losses": None},
    data={"sources": {"task": {"dataset": "org/rows", "revision": "d" * 40}}, "train_rows": 10},
    training={"steps": 3},
    held_out={"student": {"perplexity": 9.0, "kl": 0.5, "agreement": 0.25, "teacher_perplexity": 8.0}},
    environment={"device": "cpu", "hf_distill": "0.1.0"},
    licence=Judged("mit", ["teacher: wants its name"], ["teacher: forbids it"]),
)


def metadata(facts: Facts) -> dict:
    return yaml.safe_load(card_of(facts).content.split("---\n")[1])


def test_metadata_name_base_data_relation_and_results():
    found = metadata(FACTS)
    assert (found["base_model"], found["base_model_relation"]) == (["org/base"], "finetune")
    assert (found["datasets"], found["license"], found["library_name"]) == (["org/rows"], "mit", "transformers")
    results = {m["type"]: m["value"] for r in found["model-index"][0]["results"] for m in r["metrics"]}
    assert results == {"perplexity": 9.0, "kl": 0.5, "agreement": 0.25}
    adapters = metadata(replace(FACTS, student=FACTS.student | {"adapters": True}))
    assert (adapters["base_model_relation"], adapters["library_name"]) == ("adapter", "peft")


@pytest.mark.parametrize("name", ["/home/me/secret/model", "runs/stage-1/student", "package:x/y.gguf", None])
def test_what_is_no_id_is_no_base_and_paths_stay_private(name):
    card = card_of(replace(FACTS, student={"model": public(name)}))
    assert "base_model" not in card.data.to_dict()
    assert "/home/me" not in card.content


def test_words_follow_from_the_facts():
    text = card_of(FACTS).text
    assert "A model of 1.5M parameters that began as [org/base]" in text
    assert "js(beta=0.1)" in text
    assert "commit `cccccccccccc`" in text
    assert "wants its name" in text
    assert "Accepted by the author: teacher: forbids it." in text


def test_a_card_says_what_was_not_measured():
    lines = " ".join(missing({}, (), None))
    for word in ("nothing was evaluated", "no control", "retention", "diagnose", "seeds", "safety"):
        assert word in lines
    told = {"student": {}, "control": {}}
    assert len(missing(told, [{"task": "x"}], {})) == 2


def test_verdicts_of_a_diagnosis_are_not_left_out():
    assert (
        "`under_trained`: it still fell" in card_of(replace(FACTS, diagnosis={"under_trained": "it still fell"})).text
    )


def test_a_table_does_not_break_at_a_bar():
    task = {"task": "a|b", "metric": "acc", "examples": 3, "scores": {"student": {"value": 0.5, "stderr": 0.1}}}
    assert "| a\\|b | acc | 3 | 0.500 ± 0.100 | - |" in card_of(replace(FACTS, retention=[task | {"kept": {}}])).text


@pytest.mark.parametrize(
    ("task", "kind", "prompt"),
    [
        ("text-generation", "llama", 'A "quoted"\nline of café'),
        ("text-generation", "llama", [{"role": "user", "content": "Hello! What can you do?"}]),
        ("text-generation", "llama", None),
        ("fill-mask", "bert", None),
        ("text-classification", "sequence", None),
        ("token-classification", "token", None),
    ],
)
def test_the_snippet_of_each_task_runs_as_it_stands(task, kind, prompt, monkeypatch, tmp_path, capsys):
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    build(kind, 0, vocab=len(tokenizer)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with Hub() as hub:
        pointed(hub, monkeypatch, tmp_path / "hf")
        hub.put("models", "org/small", {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()})
        card = card_of(replace(FACTS, task=task, prompt=prompt))
        (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.S)
        exec(code, {})
    assert capsys.readouterr().out.strip()
    if prompt:
        assert card.data.widget[0] == {"text" if isinstance(prompt, str) else "messages": prompt}
