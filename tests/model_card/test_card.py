"""Cards: the code example runs, the text follows from the data, and nothing private is in them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hub_server import Hub, pointed
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from tiny import build
from tiny_vision import picture, vision_processor, vlm
from transformers import PreTrainedTokenizerFast

from hf_distill.core.references import public_name
from hf_distill.hub.licenses import LicenseDecision
from hf_distill.model_card import CardData, Figure, build_card, unmeasured
from hf_distill.recipe.smoke import byte_tokenizer

FACTS = CardData(
    repo="org/small",
    task="text-generation",
    student={"model": "org/base", "parameters": 1_500_000},
    teachers={"teacher": {"kind": "frozen", "model": "org/large", "revision": "c" * 40, "license": "mit"}},
    objective={"temperature": 2.0, "alpha": 0.5, "divergence": {"name": "js", "beta": 0.1}, "losses": None},
    data={"sources": {"task": {"dataset": "org/rows", "revision": "d" * 40}}, "train_rows": 10},
    training={"steps": 3},
    held_out={"student": {"perplexity": 9.0, "kl": 0.5, "agreement": 0.25, "teacher_perplexity": 8.0}},
    environment={"device": "cpu", "hf_distill": "0.1.0"},
    license=LicenseDecision("mit", ["teacher: wants its name"], ["teacher: forbids it"]),
)


def metadata(facts: CardData) -> dict:
    return yaml.safe_load(build_card(facts).content.split("---\n")[1])


def test_metadata_contain_base_model_relation_data_and_results():
    values = metadata(FACTS)
    assert (values["base_model"], values["base_model_relation"]) == (["org/base"], "finetune")
    assert (values["datasets"], values["license"], values["library_name"]) == (["org/rows"], "mit", "transformers")
    results = {m["type"]: m["value"] for r in values["model-index"][0]["results"] for m in r["metrics"]}
    assert results == {"perplexity": 9.0, "kl": 0.5, "agreement": 0.25}
    adapters = metadata(replace(FACTS, student=FACTS.student | {"adapters": True}))
    assert (adapters["base_model_relation"], adapters["library_name"]) == ("adapter", "peft")


@pytest.mark.parametrize("name", ["/home/me/secret/model", "runs/stage-1/student", "package:x/y.gguf", None])
def test_a_path_is_not_published_as_a_base_model(name):
    card = build_card(replace(FACTS, student={"model": public_name(name)}))
    assert "base_model" not in card.data.to_dict()
    assert "/home/me" not in card.content


@pytest.mark.parametrize(
    ("control", "title"),
    [
        ("sft", "control (hard labels only)"),
        ("sft_on_data", "control (hard labels of the data's completions)"),
        ("direct", "control (distilled directly)"),
    ],
)
def test_the_card_says_how_the_control_was_trained(control, title):
    models = FACTS.held_out | {"control": {"perplexity": 9.5}}
    text = build_card(replace(FACTS, held_out=models, recipe={"control": control})).text
    assert f"{title}: 9.50" in text
    assert f"| {title} | 9.50 |" in text


def test_the_installation_has_the_extras_of_the_recipe():
    text = build_card(replace(FACTS, recipe={"student": {"quantize": {"scheme": "int4"}}})).text
    assert 'run `pip install "hf-distill[torchao]"`, then `hf-distill run recipe.yaml`' in text


def test_the_text_follows_from_the_data():
    text = build_card(FACTS).text
    assert "A model with 1.5M parameters, initialized from [org/base]" in text
    assert "js(beta=0.1)" in text
    assert "commit `cccccccccccc`" in text
    assert "wants its name" in text
    assert "Accepted by the author: teacher: forbids it." in text


@pytest.mark.parametrize(
    ("model", "pruned", "text", "origin"),
    [
        (
            "org/large",
            {"layers_kept": [0, 2], "widths": {"hidden_size": 48}},
            "A model with 1.5M parameters, made of 2 of its teacher's layers, pruned to hidden size 48, distilled from",
            "Student: layers 0, 2 of [org/large](https://huggingface.co/org/large), pruned to hidden size 48.",
        ),
        (
            "org/large",
            {"widths": {"intermediate_size": 1024, "num_attention_heads": 6}},
            "A model with 1.5M parameters, its teacher pruned to intermediate size 1,024, 6 attention heads, distilled",
            "[org/large](https://huggingface.co/org/large), pruned to intermediate size 1,024, 6 attention heads.",
        ),
        (
            "org/base",
            {"widths": {"num_experts": 4}},
            "A model with 1.5M parameters, [org/base](https://huggingface.co/org/base) pruned to 4 experts, distilled",
            "Student: [org/base](https://huggingface.co/org/base), pruned to 4 experts.",
        ),
    ],
)
def test_a_card_states_the_shape_of_a_pruned_student(model, pruned, text, origin):
    card = build_card(replace(FACTS, student={"model": model, "parameters": 1_500_000, **pruned})).text
    assert text in card
    assert origin in card


def test_a_card_lists_the_losses_of_each_author():
    by_origin = {"teacher": {"divergence": {"name": "skew_kl", "lam": 0.1}, "alpha": 0.9}, "student": {"alpha": 1}}
    text = build_card(replace(FACTS, objective={**FACTS.objective, "by_origin": by_origin})).text
    assert "For target tokens that the teacher wrote: divergence skew_kl(lam=0.1), alpha 0.9." in text
    assert "For target tokens that the student wrote: alpha 1." in text
    assert "2402.03898" in text


def test_a_card_lists_what_was_not_measured():
    lines = " ".join(unmeasured({}, (), None))
    for word in ("was not evaluated", "no control", "retention", "diagnose", "seeds", "safety"):
        assert word in lines
    held_out = {"student": {}, "control": {}}
    assert len(unmeasured(held_out, [{"task": "x"}], {})) == 2


def test_a_card_contains_the_verdicts_of_the_diagnosis():
    assert (
        "`under_trained`: it still fell"
        in build_card(replace(FACTS, diagnosis={"under_trained": "it still fell"})).text
    )


def test_a_bar_in_a_cell_does_not_break_the_table():
    task = {"task": "a|b", "metric": "acc", "examples": 3, "scores": {"student": {"value": 0.5, "stderr": 0.1}}}
    assert (
        "| a\\|b | acc | 3 | 0.500 ± 0.100 | - |"
        in build_card(replace(FACTS, retention=[task | {"relative_scores": {}}])).text
    )


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
def test_the_code_example_of_each_task_runs(task, kind, prompt, monkeypatch, tmp_path, capsys):
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    build(kind, 0, vocab=len(tokenizer)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with Hub() as hub:
        pointed(hub, monkeypatch, tmp_path / "hf")
        hub.put("models", "org/small", {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()})
        card = build_card(replace(FACTS, task=task, prompt=prompt))
        (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.S)
        exec(code, {})
    assert capsys.readouterr().out.strip()
    if prompt:
        assert card.data.widget[0] == {"text" if isinstance(prompt, str) else "messages": prompt}


ATTACK = '<img src=x onerror=alert(1)>[x](https://evil.example)\n\n```\n# another heading\n---\nlicense: "evil"\n'


def test_external_text_is_not_rendered_as_markup():
    """Names, samples, licenses, tasks and the recipe contain HTML, links, fences, and the end of the metadata."""
    task = {"task": ATTACK, "metric": ATTACK, "examples": 3, "scores": {"student": {"value": 0.5, "stderr": 0.1}}}
    entry = {"kind": "frozen", "model": ATTACK, "license": ATTACK, "version": ATTACK, "quantization": ATTACK}
    facts = replace(
        FACTS,
        student={"model": ATTACK, "revision": ATTACK},
        teachers={ATTACK: entry},
        data={"sources": {ATTACK: {"dataset": ATTACK, "revision": ATTACK}}},
        training={"stages": ATTACK, "arguments": {ATTACK: ATTACK}},
        environment={"device": ATTACK, "platform": ATTACK, "torch": ATTACK},
        license=LicenseDecision(ATTACK, [ATTACK], [ATTACK]),
        retention=[task | {"relative_scores": {}}],
        diagnosis={ATTACK: ATTACK},
        recipe={"train": {"run_name": ATTACK, "long": ATTACK * 3}},
        origin=ATTACK,
        prompt=ATTACK,
    )
    card = build_card(facts, [Figure(f"figures/{ATTACK}.png", ATTACK)])
    parsed = ModelCard(card.content)
    assert parsed.data.to_dict() == card.data.to_dict()
    assert parsed.data.license == ATTACK
    tokens = list(flatten(MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.text)))
    assert not [t.content for t in tokens if t.type in ("html_block", "html_inline")]
    assert {t.attrGet("href") for t in tokens if t.type == "link_open"} == {
        "https://arxiv.org/abs/1503.02531",
        "https://arxiv.org/abs/2306.13649",
    }
    headings = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]
    assert [h for h in headings if "another" in h] == []
    blocks = [t for t in tokens if t.type == "fence"]
    assert [t.info for t in blocks] == ["python", "yaml"]
    assert yaml.safe_load(blocks[1].content)["train"]["run_name"] == ATTACK


def flatten(tokens):
    for token in tokens:
        yield token
        yield from flatten(token.children or ())


@pytest.mark.parametrize("facts", [{"kind": "remote"}, {"kind": "cached", "served": True}], ids=["remote", "cached"])
def test_a_name_that_only_a_server_knows_is_not_linked_to_the_hub(facts):
    card = build_card(replace(FACTS, teachers={"teacher": {**facts, "model": "teacher-7b"}}))
    assert "`teacher-7b`" in card.content
    assert "huggingface.co/teacher-7b" not in card.content
    assert "teacher_model" not in card.data.to_dict()
    known = build_card(replace(FACTS, teachers={"teacher": {**facts, "model": "org/large"}}))
    assert "https://huggingface.co/org/large" in known.content


def test_a_card_contains_no_folder_of_this_machine(tmp_path):
    path = f"{tmp_path}/secret/rows.jsonl"
    facts = replace(
        FACTS,
        student={"model": path},
        teachers={"teacher": {"kind": "frozen", "model": path}},
        data={"sources": {"task": {"dataset": path}}},
        training={"arguments": {"liger": path}},
        license=LicenseDecision("mit", [f"of {path}:"], []),
        diagnosis={"short": f"see {path}, `{path}`"},
        recipe={"data": {"task": {"path": path}}, "train": {"optim_args": f"file={path}"}},
        environment={"device": path},
        prompt=f"open {path}",
    )
    for text in (build_card(facts).content, json.dumps(facts.as_json())):
        assert tmp_path.name not in text
        assert "rows.jsonl" in text


def test_the_code_example_of_a_vision_language_model_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    picture(0).save("picture.png")
    for part in (vlm("llava"), vision_processor("llava")):
        part.save_pretrained("m")
    with Hub() as hub:
        pointed(hub, monkeypatch, tmp_path / "hf")
        hub.put("models", "org/small", {path.name: path.read_bytes() for path in Path("m").iterdir()})
        card = build_card(replace(FACTS, task="image-text-to-text", prompt=None))
        (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.S)
        exec(code, {})
    assert capsys.readouterr().out.strip()
