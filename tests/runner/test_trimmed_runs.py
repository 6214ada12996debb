"""Runs whose student has some of its teacher's tokens: in this process, from caches, resumed, in chains, analysed."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from test_run import StopAt, metrics, weights
from tiny import build
from trained_tokenizers import CORPUS, trained
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import DistillError, cut_student, trim_vocabulary
from hf_distill.analysis import ModelPair, open_run
from hf_distill.analysis.run_models import RunModels
from hf_distill.models.vocabulary import TokenizerContent, kept_ids_of
from hf_distill.planning.planner import plan
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.runner.cache_writer import write_recipe_cache
from hf_distill.runner.datasets import prepare_data
from hf_distill.runner.prune import prune_recipe

TEXT = "".join(CORPUS[:3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a teacher whose vocabulary is padded, and its data as text and as tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("trimmed"), trained("groups")
    teacher = build("llama", seed=1, layers=3, vocab=len(tokenizer) + 12)
    teacher.config.max_position_embeddings = 256
    for name in ("bos", "eos", "pad"):
        setattr(teacher.config, f"{name}_token_id", tokenizer.eos_token_id)
        setattr(teacher.generation_config, f"{name}_token_id", tokenizer.eos_token_id)
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    lines = [TEXT[start : start + 150] for start in range(0, 9000, 150)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    rows = [{"input_ids": tokenizer(line)["input_ids"], "weight": 1.0} for line in lines]
    (folder / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def recipe_of(name, keep="used", **changes):
    values = {
        "student": {"from_teacher": {"layers": [0, 2], "vocab": {"keep": keep}}},
        "teacher": {"model": "teacher"},
        "data": {"task": {"path": "data.jsonl"}, "eval": {"holdout": 0.2, "max_rows": 6}, "max_length": 64},
        "train": {"output_dir": f"runs/{name}", "max_steps": 4, "logging_steps": 1, "use_cpu": True, "save_steps": 2}
        | {"per_device_train_batch_size": 2, "learning_rate": 1e-2},
    } | changes
    Path(f"{name}.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(values))))
    return load_recipe(f"{name}.yaml")


@pytest.fixture(scope="module")
def straight(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run_recipe(recipe_of("straight", control="sft"))
    return folder / result.folder


def losses(run):
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [log["loss"] for log in logs if "loss" in log and log["run"] == "student"]


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_student_and_control_have_fewer_tokens(straight):
    full = trained("groups")
    for name in ("student", "control"):
        student, tokenizer = loaded(straight / name)
        assert student.config.vocab_size == len(tokenizer) < len(full)
        assert {full.convert_tokens_to_ids(token) for token in tokenizer.get_vocab()} >= TokenizerContent(
            full
        ).mandatory
        assert student.config.eos_token_id == student.generation_config.eos_token_id == tokenizer.eos_token_id
    results = json.loads((straight / "results.json").read_text())
    assert results["student"]["widths"] == {"vocab_size": len(tokenizer)}
    assert results["student"]["parameters"] == student.num_parameters()
    for metrics_of in results["models"].values():
        factor = metrics_of["bits_per_byte"] / math.log(metrics_of["perplexity"])
        assert 0 < factor < 1 / math.log(2)  # tokens of a byte or more


def test_the_rows_have_the_tokens_of_the_full_vocabulary(straight):
    recipe, full = load_recipe("straight.yaml"), trained("groups")
    kept_ids = kept_ids_of(AutoTokenizer.from_pretrained(straight / "student"), full)
    expected = prepare_data(recipe, full, 42, 8).held_out
    rows = ModelPair.of_run(open_run(str(straight))).rows
    assert [[kept_ids[index] for index in row["input_ids"]] for row in rows] == [*expected["input_ids"]]


def test_metrics_are_those_of_a_plain_reference(straight):
    full, own = trained("groups"), AutoTokenizer.from_pretrained(straight / "student")
    teacher = AutoModelForCausalLM.from_pretrained("teacher")
    student, tokenizer, kept_ids = trim_vocabulary(cut_student(teacher, [0, 2]), full, kept_ids_of(own, full))
    assert tokenizer.get_vocab() == own.get_vocab()
    pair = ModelPair.of_run(open_run(str(straight)))
    before = json.loads((straight / "results.json").read_text())["models"]["before"]
    nll = kl = count = 0.0
    for row in pair.rows:
        ids = torch.tensor([row["input_ids"]])
        p = torch.log_softmax(student.eval()(ids).logits[0, :-1], -1)
        q = torch.log_softmax(teacher(torch.tensor(kept_ids)[ids]).logits[0, :-1, kept_ids], -1)
        nll -= p.gather(1, ids[0, 1:, None]).sum().item()
        kl += (q.exp() * (q - p)).sum().item()
        count += len(p)
    assert before["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert before["kl"] == pytest.approx(kl / count, rel=1e-3)


def test_a_run_resumes_with_the_same_vocabulary(straight):
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe_of("cut", control="sft"), callbacks=[StopAt(3)])
    run_recipe(recipe_of("cut", control="sft"), resume=True)
    for name in ("student", "control"):
        ours, resumed = weights(straight / name), weights(Path("runs/cut") / name)
        assert all(torch.equal(ours[key], resumed[key]) for key in ours)
    assert metrics(Path("runs/cut")) == metrics(straight)


def test_the_most_frequent_tokens_with_a_smaller_width(straight):
    cut = {"keep_layers": 2, "hidden_size": 16, "vocab": {"keep": 500}}
    run = run_recipe(recipe_of("narrow", student={"from_teacher": cut})).folder
    student, tokenizer = loaded(run / "student")
    assert student.get_input_embeddings().weight.shape == student.lm_head.weight.shape == (500, 16)
    assert len(tokenizer) == 500
    models = json.loads((run / "results.json").read_text())["models"]
    assert models["student"]["bits_per_byte"] < models["before"]["bits_per_byte"]


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_a_cache_that_the_recipe_wrote_teaches_as_the_teacher(straight, kind):
    source = {"model": "teacher"}
    teacher = {"kind": "cached", "path": f"cache-{kind}", "source": source}
    recipe = recipe_of(f"cached-{kind}", teacher=teacher)
    options = {"k": 64} if kind == "top_k" else {"dtype": "float32"}
    _, manifest = write_recipe_cache(recipe, kind=kind, **options)
    assert manifest.vocab_size == len(AutoTokenizer.from_pretrained(straight / "student"))
    run = run_recipe(recipe).folder
    assert losses(run) == pytest.approx(losses(straight), rel=0.1 if kind == "top_k" else 1e-5)
    queried = {**teacher, "on_miss": "query_teacher", "path": f"cache-{kind}"}
    run = run_recipe(recipe_of(f"queried-{kind}", teacher=queried)).folder
    assert losses(run) == pytest.approx(losses(straight), rel=0.1 if kind == "top_k" else 1e-5)


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_a_cache_over_all_ids_is_exact_or_refused(straight, kind):
    teacher = {"kind": "cached", "path": f"full-{kind}", "source": {"model": "teacher"}}
    full = recipe_of(f"full-{kind}", teacher=teacher, student={"from_teacher": {"layers": [0, 2]}})
    write_recipe_cache(full, kind=kind, **({"k": 8} if kind == "top_k" else {"dtype": "float32"}))
    recipe = recipe_of(f"of-full-{kind}", teacher=teacher)
    if kind == "top_k":
        with pytest.raises(DistillError, match="share of the removed"):
            run_recipe(recipe)
    else:
        assert losses(run_recipe(recipe).folder) == pytest.approx(losses(straight), rel=1e-5)


def test_tokens_get_their_new_ids_and_removed_ones_are_refused():
    data = {"task": {"path": "tokens.jsonl"}, "eval": {"holdout": 0.2, "max_rows": 6}, "max_length": 64}
    run = run_recipe(recipe_of("tokens", data=data)).folder
    kept_ids = kept_ids_of(AutoTokenizer.from_pretrained(run / "student"), trained("groups"))
    given = [json.loads(line)["input_ids"][:64] for line in Path("tokens.jsonl").read_text().splitlines()]
    for row in ModelPair.of_run(open_run(str(run))).rows:
        assert [kept_ids[index] for index in row["input_ids"]] in given
    with pytest.raises(DistillError, match=r"tokens of the training data are given as ids"):
        run_recipe(recipe_of("removed", 400, data=data))


def test_a_trimmed_student_is_trained_further_with_the_full_teacher(straight):
    run = run_recipe(recipe_of("further", student={"model": str(straight / "student")})).folder
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert len(AutoTokenizer.from_pretrained(run / "student")) == student.config.vocab_size
    further = json.loads((run / "results.json").read_text())["models"]["before"]
    assert further["perplexity"] == pytest.approx(
        json.loads((straight / "results.json").read_text())["models"]["student"]["perplexity"], rel=1e-5
    )


def test_a_chain_compares_students_of_several_vocabularies():
    stages = [
        {"student": {"from_teacher": {"layers": [0, 2], "vocab": {"keep": 900}}}},
        {"student": {"from_teacher": {"keep_layers": 1, "vocab": {"keep": 600}}}},
    ]
    recipe = recipe_of("chain", student=stages[-1]["student"], stages=stages)
    models = run_recipe(recipe).models
    for name, size in (("stage-1", 900), ("student", 600)):
        folder = "stage-1/student" if name == "stage-1" else "student"
        assert AutoModelForCausalLM.from_pretrained(f"runs/chain/{folder}").config.vocab_size == size
        assert models[name]["bits_per_byte"] > 0
    assert models["stage-1"]["vocabulary"] != models["student"]["vocabulary"]


def test_analyses_give_each_model_its_ids(straight, folder):
    run = open_run(str(straight))
    models = RunModels.of_run(run)
    own, full = models.tokenizer("student"), models.tokenizer("teacher")
    assert len(own) < len(full) == len(trained("groups"))
    row = models.pair.rows[0]
    assert full.decode(models.prompt_ids("teacher", row, 20)) == own.decode(models.prompt_ids("student", row, 20))
    before = models.load("before")
    assert before.config.vocab_size == len(own)
    measured = json.loads((straight / "results.json").read_text())["models"]["student"]["kl"]
    kl = count = 0.0
    for batch in models.pair.batches(None):
        p, q = (torch.log_softmax(each.project(), -1) for each in (batch.student, batch.teacher))
        kl, count = kl + (q.exp() * (q - p)).sum().item(), count + len(p)
    assert kl / count == pytest.approx(measured, rel=1e-4)


def test_a_plan_knows_the_smaller_vocabulary(straight):
    size = json.loads((straight / "results.json").read_text())["student"]
    for keep, parameters in (("used", size["parameters"]), (700, None)):
        planned = plan(recipe_of("planned", keep), gpus=1, gpu_memory=80)
        per_token = 2 * 32
        expected = parameters or size["parameters"] + (keep - size["widths"]["vocab_size"]) * per_token
        assert planned.student.parameters == expected


@pytest.mark.parametrize(
    ("keep", "changes", "message"),
    [
        (100, {}, "are always kept"),
        (99_999, {}, "has 1500 tokens"),
        ("most", {}, "keep"),
        ("used", {"teacher": {"kind": "online", "model": "teacher"}}, "reads the student's tokens"),
        ("used", {"teacher": {"kind": "remote", "url": "http://127.0.0.1:1"}}, "hidden"),
        (
            "used",
            {"data": {"task": {"path": "data.jsonl", "streaming": True}, "eval": {"path": "data.jsonl"}}},
            "streaming",
        ),
    ],
)
def test_what_is_not_possible_is_refused(keep, changes, message):
    with pytest.raises(DistillError, match=message):
        run_recipe(recipe_of("refused", keep, **changes))
    assert not Path("runs/refused/student").exists()


def test_the_student_alone_is_written_with_its_tokenizer(tmp_path):
    written = prune_recipe(recipe_of("alone", 700), str(tmp_path / "student"))
    student, tokenizer = loaded(written.folder)
    assert student.config.vocab_size == len(tokenizer) == 700
    assert written.metrics["bits_per_byte"] > 0
    assert written.student["widths"] == {"vocab_size": 700}


def test_an_on_policy_student_generates_its_own_tokens():
    rows = [{"prompt": TEXT[i : i + 40], "completion": TEXT[i + 40 : i + 90]} for i in range(0, 3000, 150)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"task": {"path": "prompts.jsonl"}, "eval": {"holdout": 0.2, "max_rows": 4}, "max_length": 64}
    on_policy = {"fraction": 0.5, "max_completion_length": 8}
    run = run_recipe(recipe_of("on-policy", data=data, on_policy=on_policy)).folder
    student, tokenizer = loaded(run / "student")
    assert student.config.vocab_size == len(tokenizer) < len(trained("groups"))
    assert all(0 < loss < 10 for loss in losses(run))
