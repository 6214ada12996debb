"""The scripts in examples/ run with tiny models, improve on held-out rows, and save a student that loads."""

import json
import os
import runpy
import signal
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

from hf_distill import DistillError
from hf_distill.recipe.smoke import byte_tokenizer
from hf_distill.trl import DistillSFTTrainer

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
    """A file of conversations, with the columns of the default data set."""
    file = tmp_path / "chats.jsonl"
    rows = [{"messages": conversation(i), "source": "everyday-conversations"} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
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


def test_a_script_that_sigterm_stopped_resumes_to_the_same_number_of_steps(run_example, chats, tmp_path, monkeypatch):
    student = save_model(tmp_path / "student", 0, 2)
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "teacher", 1, 3, width=48))
    step = DistillSFTTrainer.training_step

    def stopped(trainer, *inputs):
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *inputs)

    with VLLMServer(model, tokenizer=byte_tokenizer(), context=256) as server:
        options = ("--student", student, "--teacher_url", server.url, "--dataset", chats, "--top_k", "8")
        options = (*options, "--max_length", "128", "--resume")  # without a checkpoint it starts at step 0
        with monkeypatch.context() as patch:
            patch.setattr(DistillSFTTrainer, "training_step", stopped)
            with pytest.raises(SystemExit) as ended:
                run_example("remote_teacher.py", *options)
        assert ended.value.code == 128 + signal.SIGTERM
        assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-5"]
        steps = []
        monkeypatch.setattr(
            DistillSFTTrainer,
            "training_step",
            lambda trainer, *inputs: (steps.append(trainer.state.global_step), step(trainer, *inputs))[1],
        )
        variables = run_example("remote_teacher.py", *options)
    assert steps == [*range(5, 12)]
    assert variables["trainer"].state.global_step == 12
    improved(variables, "eval_loss")


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda script: script.name)
def test_every_script_trains_with_resume_and_has_at_most_80_lines(script):
    text = script.read_text()
    assert "trainer.train(resume_from_checkpoint=trainer.newest_checkpoint() if arguments.resume else None)" in text
    assert "stop_on_signal=True" in text
    assert len(text.splitlines()) <= 80


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


def draft_options(chats: str, teacher: str) -> tuple[str, ...]:
    return ("--teacher", teacher, "--dataset", chats, "--max_length", "128", "--max_new_tokens", "20", "--prompts", "2")


def test_the_draft_script_measures_a_higher_acceptance_rate_after_training(run_example, chats, tmp_path):
    teacher = save_model(tmp_path / "teacher", 1, 4)
    variables = run_example("draft_model.py", *draft_options(chats, teacher), "--max_steps", "40")
    improved(variables, "eval_kl")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2
    measured = variables["measured"]
    before, after = measured.drafts["before training"], measured.drafts["after training"]
    assert after.acceptance_rate > before.acceptance_rate
    assert after.equal_outputs == 1
    assert measured.prompts == 2


def test_the_draft_script_measures_that_all_tokens_of_a_copy_of_the_teacher_are_accepted(run_example, chats, tmp_path):
    teacher = save_model(tmp_path / "teacher", 1, 2)  # the student has both of its layers
    variables = run_example("draft_model.py", *draft_options(chats, teacher), "--learning_rate", "0")
    score = variables["measured"].drafts["after training"]
    assert score.acceptance_rate == pytest.approx(1, abs=1e-5)
    assert score.accepted_tokens == variables["measured"].drafted_tokens
    assert score.equal_outputs == 1


def test_the_image_script_reads_two_image_sizes(run_example, tmp_path):
    names, draw = ("cat", "dog", "owl"), np.random.default_rng(0)
    for i in range(30):
        folder = tmp_path / "images" / names[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 80, (24, 24, 3)) + [80 * (i % 3), 0, 0]
        image = Image.fromarray(pixels.astype("uint8"))
        (image.convert("L") if i == 5 else image).save(folder / f"{i}.png")  # one image is gray
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


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("reranker.py", (), r"The columns are \['messages', 'source'\]; the script reads query, positive and negative"),
        ("lora_one_gpu.py", ("--held_out_share", "0.01"), r"share of 0.01 of 20 documents .* Use another share"),
    ],
)
def test_data_that_a_script_cannot_use_is_an_error_that_says_what_to_change(
    run_example, chats, tmp_path, script, options, message
):
    student = save_model(tmp_path / "student", 0, 1)
    with pytest.raises((SystemExit, DistillError), match=message):
        run_example(script, "--student", student, "--teacher", student, "--dataset", chats, *options)


def test_the_table_lists_every_example_and_no_other_file():
    files = {name for name in os.listdir(EXAMPLES) if Path(name).suffix in (".py", ".slurm", ".ipynb")}
    rows = [row.split("|") for row in (EXAMPLES / "README.md").read_text().splitlines() if row.startswith("| [")]
    assert sorted(cells[1].strip() for cells in rows) == sorted(f"[{name}]({name})" for name in files)
    for _, link, _, command, *_ in rows:
        assert f"examples/{link.strip()[1:].partition(']')[0]}" in command
