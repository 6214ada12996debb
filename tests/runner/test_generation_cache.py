"""The teacher cache that a generation writes, against the cache that `hf-distill cache write` writes afterwards."""

import json

import numpy as np
import pytest
import torch
import yaml
from servers.teacher_servers import VLLMCompletionServer
from transformers import PhiConfig, PhiForCausalLM, set_seed

from hf_distill.cache import api as cache_api
from hf_distill.cache import codec, open_cache
from hf_distill.core.files import file_entry
from hf_distill.data import load_examples
from hf_distill.errors import DistillError
from hf_distill.recipe.load import load_recipe
from hf_distill.recipe.smoke import byte_tokenizer
from hf_distill.runner import generation_cache
from hf_distill.runner.cache_writer import write_recipe_cache
from hf_distill.runner.generate import generate_data
from hf_distill.runner.run import run_recipe

# Tokens of two letters: where these are generated one by one, the training has another token.
TOKENIZER = byte_tokenizer([("t", "h"), ("s", "a"), ("y", "e"), ("a", "h")])
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)  # a target token, the line break, follows the end-of-text token
CONVERSATIONS = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(6)]
TEXTS = [{"prompt": f"text {i}: ", "completion": f" reference {i}"} for i in range(6)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a teacher that writes letters, which are the same text in every tokenization, and of a student."""
    folder = tmp_path_factory.mktemp("models")
    letters = [i for i, token in enumerate(TOKENIZER.convert_ids_to_tokens(range(len(TOKENIZER)))) if token in "theasy"]
    letters = [i for i in letters if len(TOKENIZER.convert_ids_to_tokens(i)) == 1]
    for name, width in (("teacher", 32), ("student", 16)):
        set_seed(1)
        config = PhiConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            initializer_range=0.4,
            eos_token_id=TOKENIZER.eos_token_id,
            bos_token_id=TOKENIZER.eos_token_id,
            pad_token_id=TOKENIZER.pad_token_id,
        )
        model = PhiForCausalLM(config)
        with torch.no_grad():
            model.lm_head.bias.fill_(-25.0)
            model.lm_head.weight.mul_(0.3)
            model.lm_head.bias[[*letters, TOKENIZER.eos_token_id]] = 0.0
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    return folder


@pytest.fixture
def recipe_of(tmp_path, models):
    """`recipe_of(rows, cache="top_k")`: a recipe with a section `generate`."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)

    def make(rows, changes=(), **generate):
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "student": {"model": str(models / "student")},
            "teacher": {"model": str(models / "teacher")},
            "data": {"task": {"path": str(file)}, "eval": {"holdout": 0.2}, "max_length": 64},
            "generate": {
                **{"max_new_tokens": 12, "prompts_per_part": 4, "batching": "padded", "samples": 2},
                **{"temperature": 0.9, "top_p": 0.9, "seed": 3, **generate},
            },
            "train": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "use_cpu": True},
        }
        values["data"]["chat_template"] = str(template) if rows is CONVERSATIONS else None
        values["generate"] = {key: value for key, value in values["generate"].items() if value is not None}
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(values))
        return load_recipe(str(recipe), list(changes))

    return make


def examples_of(folder):
    """Key of an example -> what the cache stores of it."""
    reader = open_cache(str(folder))
    keys = np.fromfile(folder / "index.bin", dtype="V16")
    return reader.manifest, {key.tobytes(): reader.get([key.tobytes()])[0] for key in keys}


def write_afterwards(recipe_of, data, tmp_path, rows, **options):
    recipe = recipe_of(rows, changes=[f"data.task.path={data.folder}"], cache=options["kind"])
    return write_recipe_cache(recipe, str(tmp_path / "afterwards"), **options)[0]


def check_same(folder, other):
    """Check that two caches hold the same, up to rounding: a step of the codec, or of bfloat16."""
    manifest, examples = examples_of(folder)
    other_manifest, expected = examples_of(other)
    assert manifest.kind == other_manifest.kind
    assert (manifest.options, manifest.temperature) == (other_manifest.options, other_manifest.temperature)
    assert (manifest.tokenizer, manifest.chat_template) == (other_manifest.tokenizer, other_manifest.chat_template)
    assert manifest.data["fingerprint"] == other_manifest.data["fingerprint"]
    assert {*examples} == {*expected}
    for key, stored in examples.items():
        if manifest.kind == "hidden":
            values, others = (
                torch.frombuffer(bytearray(bytes(each.payload)), dtype=torch.bfloat16).float()
                for each in (stored, expected[key])
            )
            torch.testing.assert_close(values, others, rtol=2**-7, atol=1e-4)
            continue
        values, others = (
            codec.decode([each.payload], [each.tokens], [each.ids], manifest.vocab_size)
            for each in (stored, expected[key])
        )
        assert np.array_equal(values.ids, others.ids)
        assert np.array_equal(values.sizes, others.sizes)
        assert np.abs(values.values.astype(int) - others.values.astype(int)).max() <= 1
        tails = [codec.dequantize_nats(each.extra) for each in (values, others)]
        tails = [np.exp(-tail) if manifest.kind == "top_k" else tail for tail in tails]  # small ones are differences
        np.testing.assert_allclose(*tails, rtol=1 / codec.STEPS_PER_NAT, atol=1e-4)
    return manifest, examples


def card_counts(data):
    """The numbers of the section about the cache in the data card."""
    section = (data.folder / "README.md").read_text().split("## Teacher cache")[1]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {line[0]: line[1] for line in lines if len(line) == 2}


@pytest.mark.parametrize("rows", [CONVERSATIONS, TEXTS], ids=["conversations", "texts"])
@pytest.mark.parametrize(
    ("kind", "batching"),
    [("top_k", "padded"), ("top_k", "continuous"), ("hidden", "continuous"), ("sampled", "padded")],
)
def test_the_cache_is_that_of_a_cache_written_afterwards(kind, batching, rows, recipe_of, tmp_path, monkeypatch):
    options = {"top_k": {"k": 6}, "sampled": {"samples_per_token": 8}, "hidden": {}}[kind]
    scored = []
    score = generation_cache.LocalScorer.__call__
    monkeypatch.setattr(
        generation_cache.LocalScorer, "__call__", lambda self, rows: scored.extend(rows) or score(self, rows)
    )
    filters = [{"name": "length", "min_tokens": 4}]
    recipe = recipe_of(rows, batching=batching, cache=kind, filters=filters, **options)
    data = generate_data(recipe, str(tmp_path / "out"))
    assert 0 < data.rows < data.completions
    monkeypatch.undo()
    afterwards = write_afterwards(recipe_of, data, tmp_path, rows, kind=kind, **options)
    manifest, examples = check_same(data.cache, afterwards)
    counts = card_counts(data)
    recomputed = int(counts["target tokens predicted in another forward"])
    assert int(counts["target tokens"]) == manifest.data["tokens"]
    assert int(counts["target tokens predicted during the generation"]) == manifest.data["tokens"] - recomputed
    assert 0 < recomputed < manifest.data["tokens"] / 2  # rows whose text has other tokens from some token on
    assert len({(row.ids, row.positions) for row in scored}) >= int(counts["rows with such tokens"]) > 0
    assert len(examples) > int(counts["rows with such tokens"])


def test_a_run_trains_from_the_cache(recipe_of, tmp_path):
    data = generate_data(recipe_of(CONVERSATIONS, cache="top_k", k=6), str(tmp_path / "out"))
    changes = [f"data.task.path={data.folder}", f"teacher={{kind: cached, path: {data.cache}}}"]
    result = run_recipe(recipe_of(CONVERSATIONS, changes=changes))
    assert result is not None


def test_a_server_writes_the_cache_of_a_local_teacher(recipe_of, tmp_path, models):
    model = PhiForCausalLM.from_pretrained(models / "teacher")
    options = {"cache": "top_k", "k": 6, "batching": None}
    with VLLMCompletionServer(model, tokenizer=TOKENIZER, context=128) as server:
        recipe = recipe_of(CONVERSATIONS, ["distill.temperature=1"], backend="server", url=server.url, **options)
        data = generate_data(recipe, str(tmp_path / "out"))
        text = "".join(
            file.read_text() for file in (data.folder / "README.md", data.cache / "manifest.json")
        ) + json.dumps(recipe.model_dump()["data"])
        assert server.url not in text
    changes = [f"data.task.path={data.folder}", "distill.temperature=1"]
    afterwards, _ = write_recipe_cache(
        recipe_of(CONVERSATIONS, changes, cache="top_k"), str(tmp_path / "afterwards"), kind="top_k", k=6
    )
    check_same(data.cache, afterwards)


def test_rows_that_were_not_generated_have_distributions_of_another_forward(recipe_of, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "other ", "completion": "text"}) + "\n")
    changes = [f"data.eval={{path: {held_out}, split: train}}"]
    data = generate_data(recipe_of(TEXTS, changes, cache="top_k", k=6), str(tmp_path / "out"))
    recipe = recipe_of(TEXTS, [*changes, f"data.task.path={data.folder}"], cache="top_k")
    check_same(data.cache, write_recipe_cache(recipe, str(tmp_path / "afterwards"), kind="top_k", k=6)[0])


@pytest.mark.parametrize("moment", ["generation", "cache", "card"])
def test_an_interruption_resumes_to_the_same_cache(moment, recipe_of, tmp_path, monkeypatch):
    recipe = recipe_of(TEXTS, cache="sampled")
    whole = generate_data(recipe, str(tmp_path / "whole"))
    owner, name = {
        "generation": (generation_cache.CompletionStore, "publish"),
        "cache": (cache_api, "write_shards"),
        "card": (generation_cache.CompletionStore, "write_card"),
    }[moment]
    original, calls = getattr(owner, name), []

    def interrupted(*arguments, **options):
        calls.append(name)
        if moment != "card" or len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate_data(recipe, str(tmp_path / "out"))
    data = generate_data(recipe, str(tmp_path / "out"), resume=True)
    for file in ("index.bin", "shard-00000.arrow"):
        assert file_entry(data.cache / file) == file_entry(whole.cache / file)
    assert card_counts(data) == card_counts(whole)


def test_other_filters_write_the_cache_of_the_rows_that_they_keep(recipe_of, tmp_path):
    everything = generate_data(recipe_of(TEXTS, cache="top_k", k=6), str(tmp_path / "out"))
    _, before = examples_of(everything.cache)
    recipe = recipe_of(TEXTS, cache="top_k", k=6, select="best_of_n")
    data = generate_data(recipe, str(tmp_path / "out"), resume=True)
    manifest, examples = examples_of(data.cache)
    assert len(examples) == data.rows == 6 < len(before)
    assert examples == {key: before[key] for key in examples}
    assert manifest.data["examples"] == 6
    assert len(list(load_examples(str(data.folder)))) == 6
    with pytest.raises(DistillError, match=r"generate.k is 7 here and 6 there"):
        generate_data(recipe_of(TEXTS, cache="top_k", k=7), str(tmp_path / "out"), resume=True)


@pytest.mark.parametrize(
    ("generate", "changes", "message"),
    [
        ({}, ["data.task.generate=true", "train.seed=1"], "trains with its teacher, not with a cache"),
        ({}, ["distill.cross_tokenizer=alm"], "distill.cross_tokenizer is set"),
        ({}, ["losses=[{name: forward_kl}, {name: hidden_mse}]"], "hidden_mse compares features of further layers"),
        ({"backend": "server", "url": "http://127.0.0.1:1"}, [], "distill.temperature is 2, .*set distill.temp"),
        ({"cache": "hidden", "backend": "server", "url": "http://127.0.0.1:1"}, [], "set cache to top_k, or use back"),
        ({"cache": "hidden", "k": 5}, [], "k is used with cache top_k only"),
        ({"k": 0}, [], "k"),
    ],
)
def test_a_cache_that_is_not_possible_is_an_error_before_the_generation(
    generate, changes, message, recipe_of, tmp_path
):
    options = {"cache": "top_k", "batching": None, **generate}
    with pytest.raises(DistillError, match=message):
        generate_data(recipe_of(TEXTS, changes, **options), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
