"""The scripts in examples/ run with tiny models, improve on held-out rows, and save a student that loads."""

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from example_scripts import WORDS, bert, sentence
from example_scripts import tokenizer as word_tokenizer
from PIL import Image
from servers.hidden_server import HiddenServer
from servers.teacher_servers import VLLMServer
from tiny import build, conversation
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from hf_distill.recipe.smoke import byte_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMON = ("--max_steps", "12", "--batch_size", "4", "--learning_rate", "1e-2", "--held_out_share", "0.2")


@pytest.fixture
def run_example(monkeypatch, tmp_path, hub):
    """`run_example("reranker.py", "--teacher", ...)`: run a script; return its variables."""

    def run(name: str, *options: str) -> dict:
        set_seed(0)
        out = ("--output_dir", str(tmp_path / "out"))
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *COMMON, *out, *options])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def save_model(folder: Path, seed: int, layers: int, merges=(), **sizes) -> str:
    """Save a tiny language model with a tokenizer of bytes."""
    tokenizer = byte_tokenizer(merges)
    model = build("llama", seed, layers=layers, vocab=len(tokenizer), **sizes)
    model.config.max_position_embeddings = 256
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def chats(tmp_path) -> str:
    """A file of conversations."""
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": conversation(i)}) + "\n" for i in range(20)))
    return str(file)


def improved(variables: dict, metric: str) -> None:
    """Check that a held-out metric fell, and that it is the one that the script saved."""
    before, after = variables["before"][metric], variables["after"][metric]
    assert 0 <= after < before
    saved = json.loads(Path(variables["arguments"].output_dir, "eval_results.json").read_text())
    assert saved[metric] == after


def test_the_lora_script_trains_an_adapter(run_example, chats, tmp_path):
    student = save_model(tmp_path / "student", 0, 2)
    teacher = save_model(tmp_path / "teacher", 1, 3, width=48)
    options = ("--student", student, "--teacher", teacher, "--dataset", chats, "--max_length", "128")
    improved(run_example("lora_one_gpu.py", *options), "eval_kl")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").peft_config


def test_the_remote_script_trains_from_two_servers(run_example, chats, tmp_path):
    student = save_model(tmp_path / "student", 0, 2)
    folder = save_model(tmp_path / "teacher", 1, 3, width=48)
    settings = {"tokenizer": byte_tokenizer(), "context": 256}
    model = AutoModelForCausalLM.from_pretrained(folder)
    with VLLMServer(model, **settings) as one, VLLMServer(model, **settings) as two:
        options = ("--student", student, "--teacher_url", one.url, two.url, "--dataset", chats, "--top_k", "8")
        improved(run_example("remote_teacher.py", *options, "--max_length", "128"), "eval_loss")
        assert all(server.bodies("/v1/completions") for server in (one, two))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_remote_script_trains_from_a_server_of_hidden_states(run_example, chats, tmp_path):
    student = save_model(tmp_path / "student", 0, 2)
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "teacher", 1, 3, width=48))
    with HiddenServer(model, tmp_path / "served", tokenizer=byte_tokenizer()) as server:
        options = ("--student", student, "--teacher_url", server.url, "--teacher_api", "hidden", "--dataset", chats)
        improved(run_example("remote_teacher.py", *options, "--max_length", "128"), "eval_kl")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_cross_tokenizer_script_compares_two_tokenizers(run_example, chats, tmp_path):
    student = save_model(tmp_path / "student", 0, 2)
    teacher = save_model(tmp_path / "teacher", 1, 3, merges=[("v", "e"), ("r", "y"), ("ve", "ry")])
    options = ("--student", student, "--teacher", teacher, "--dataset", chats, "--max_length", "128")
    improved(run_example("cross_tokenizer.py", *options), "eval_bits_per_byte")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_sequence_level_script_trains_on_the_answers_of_the_teacher(run_example, chats, tmp_path):
    student = save_model(tmp_path / "student", 0, 2)
    teacher = save_model(tmp_path / "teacher", 1, 3, width=48)
    config = json.loads(Path(teacher, "generation_config.json").read_text())
    config["eos_token_id"] = [config["eos_token_id"], *range(0, 256, 16)]  # some answers end within a few tokens
    Path(teacher, "generation_config.json").write_text(json.dumps(config))
    options = ("--student", student, "--teacher", teacher, "--dataset", chats, "--max_new_tokens", "24")
    variables = run_example("sequence_level.py", *options, "--max_length", "128")
    improved(variables, "eval_kl")
    answers, rows = variables["answers"], variables["train_rows"].to_list() + variables["eval_rows"].to_list()
    assert answers.completions == 20
    assert 1 < len(rows) == answers.rows == 20 - sum(count.removed for count in answers.counts)
    assert {row["finish_reason"] for row in rows} == {"stop"}
    assert all(row["completion"] != row["reference"] for row in rows)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_draft_script_decodes_as_the_teacher_does(run_example, chats, tmp_path):
    teacher = save_model(tmp_path / "teacher", 1, 4)
    options = ("--teacher", teacher, "--dataset", chats, "--max_length", "128", "--max_new_tokens", "16")
    variables = run_example("draft_model.py", *options)
    improved(variables, "eval_kl")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2
    alone = variables["teacher"].generate(**variables["inputs"], do_sample=False, max_new_tokens=16)
    assert variables["output"].equal(alone)
    assert 0 < variables["teacher_forwards"] <= variables["new_tokens"] + 1


def test_the_image_script_reads_two_image_sizes(run_example, tmp_path):
    names, draw = ("cat", "dog", "owl"), np.random.default_rng(0)
    for i in range(30):
        folder = tmp_path / "images" / names[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 80, (24, 24, 3)) + [80 * (i % 3), 0, 0]
        Image.fromarray(pixels.astype("uint8")).save(folder / f"{i}.png")
    size = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, patch_size=8, initializer_range=0.3)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    for who, layers, pixels in (("student", 1, 16), ("teacher", 2, 32)):
        set_seed(layers)
        config = ViTConfig(num_hidden_layers=layers, image_size=pixels, **size, **labels)
        ViTForImageClassification(config).save_pretrained(tmp_path / who)
        ViTImageProcessor(size={"height": pixels, "width": pixels}).save_pretrained(tmp_path / who)
    models = ("--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"))
    improved(run_example("image_classifier.py", *models, "--dataset", str(tmp_path / "images")), "eval_kl")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label[2] == "owl"


def test_the_reranker_script_learns_differences_of_scores(run_example, tmp_path):
    for who, seed, layers in (("student", 0, 1), ("teacher", 1, 2)):
        bert(BertForSequenceClassification, seed, layers, num_labels=1).save_pretrained(tmp_path / who)
        word_tokenizer().save_pretrained(tmp_path / who)
    row = [{"query": WORDS[i % 9], "positive": sentence(i), "negative": sentence(i + 99)} for i in range(40)]
    (tmp_path / "triples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in row))
    models = ("--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"))
    options = ("--dataset", str(tmp_path / "triples.jsonl"), "--max_length", "32", "--max_steps", "40")
    improved(run_example("reranker.py", *models, *options), "eval_loss")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def test_the_table_lists_every_example():
    files = {name for name in os.listdir(EXAMPLES) if Path(name).suffix in (".py", ".slurm", ".ipynb")}
    table = (EXAMPLES / "README.md").read_text()
    assert files == {name for name in files if f"[{name}]({name})" in table}
