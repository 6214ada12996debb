"""On-policy recipes."""

import json

import pytest

from hf_distill import DistillError
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.recipe.smoke import byte_tokenizer
from hf_distill.runner.datasets import prepare_data
from hf_distill.runner.on_policy import prepare_prompts


def test_an_on_policy_recipe_generates_trains_and_is_evaluated_on_held_out_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changed = ["on_policy.fraction=[[0, 0], [0.5, 1]]", "train.output_dir=run"]
    result = run_recipe(load_recipe("on-policy", changed, smoke=True))
    assert set(result.models) == {"before", "student", "control"}
    assert {len(metrics) > 5 for metrics in result.models.values()} == {True}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lengths = [line["completions/mean_length"] for line in lines if line["run"] == "student" and "soft_loss" in line]
    assert len(lengths) == 4
    assert lengths[-1] <= 8
    assert result.models["student"]["perplexity"] != result.models["before"]["perplexity"]


def test_losses_of_each_source_are_logged_separately(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changed = ["data.more={path: 'package:builtins'}", "on_policy.fraction=0.5", "train.output_dir=run", "control=null"]
    models = run_recipe(load_recipe("on-policy", changed, smoke=True)).models
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "soft_loss" in line and "loss" in line]
    assert {"task", "more"} == {name for name in ("task", "more") if any(f"soft_loss_{name}" in log for log in logged)}
    for metrics in (models["student"], *(log for log in logged if "soft_loss_task" in log and "soft_loss_more" in log)):
        low, high = sorted((metrics["soft_loss_task"], metrics["soft_loss_more"]))
        assert low - 1e-6 <= metrics["soft_loss"] <= high + 1e-6


def test_prompts_of_two_kinds_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n' * 20)
    recipe = load_recipe("on-policy", ["data.sums={path: sums.jsonl}"], smoke=True)
    with pytest.raises(DistillError, match=r"must have the same format, texts or messages; got .*'sums': 'texts'"):
        prepare_prompts(recipe, byte_tokenizer(), 0, 8)


def test_a_prompt_with_an_unknown_role_is_refused(tmp_path, smollm2_tokenizer):
    turns = [[{"role": "human", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns * 20))
    recipe = load_recipe("on-policy", [f"data.task={{path: {tmp_path}/chats.jsonl}}"], smoke=True)
    message = r"data.task, row \d+ \(counted from 0\), column prompt\[0\].role: found 'human'.* 'human' -> 'user'"
    with pytest.raises(DistillError, match=message):
        prepare_prompts(recipe, smollm2_tokenizer, 0, 8)


def test_student_and_control_are_evaluated_on_the_same_rows(tmp_path, monkeypatch):
    """Before any step the student and the control are the same model, so their metrics must be."""
    monkeypatch.chdir(tmp_path)
    changed = ["train.output_dir=run", "train.learning_rate=0.0", "train.max_steps=1"]
    models = run_recipe(load_recipe("on-policy", changed, smoke=True)).models
    names = ("loss", "perplexity", "kl", "agreement", "hard_loss", "soft_loss", "teacher_perplexity")
    for name in names:
        assert models["control"][name] == pytest.approx(models["student"][name], rel=1e-5), name


def test_prompts_do_not_include_held_out_rows():
    recipe, tokenizer = load_recipe("on-policy", ["data.max_length=512"], smoke=True), byte_tokenizer()
    rows = prepare_data(recipe, tokenizer, 0, 8)
    prompts = prepare_prompts(recipe, tokenizer, 0, 8)
    held_out = {tokenizer.decode(ids) for ids in rows.held_out["input_ids"]}
    trained = {tokenizer.decode(ids) for ids in rows.train["input_ids"]}
    for row in prompts:
        start = tokenizer.apply_chat_template(row["prompt"], tokenize=False)
        assert not any(text.startswith(start) for text in held_out)
    assert len(prompts) == len(trained)


def test_only_answers_are_target_tokens_in_on_policy_recipes(smollm2_tokenizer):
    """Whatever the chat template: SmolLM2's marks no turns, and puts a system prompt before each conversation."""
    data = prepare_data(load_recipe("on-policy"), smollm2_tokenizer, 0, 8)
    for rows in (data.held_out, data.train):
        for row in rows.select(range(8)):
            target_text = smollm2_tokenizer.decode([label for label in row["labels"] if label != -100])
            text = smollm2_tokenizer.decode(row["input_ids"])
            assert text.endswith("assistant\n" + target_text)


def test_prompts_with_text_parts_equal_plain_text_prompts(tmp_path, monkeypatch, smollm2_tokenizer):
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "It is 2."}]
    parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    prompts = []
    for name, messages in (("text", turns), ("parts", parts)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 20)
        recipe = load_recipe("on-policy", [f"data.task.path={name}.jsonl"])
        prompts.append(list(prepare_prompts(recipe, smollm2_tokenizer, 0, 8)))
    assert prompts[0] == prompts[1]
    assert prompts[0][0]["prompt"] == turns[:1]


def test_prompts_that_leave_no_room_for_a_completion_are_not_used():
    tokenizer = byte_tokenizer()
    every = prepare_prompts(load_recipe("on-policy", smoke=True), tokenizer, 0, 8)
    short = prepare_prompts(load_recipe("on-policy", ["data.max_length=56"], smoke=True), tokenizer, 0, 8)
    assert 0 < len(short) < len(every)
    with pytest.raises(DistillError, match=r"data\.task: all .* prompts have more than the 2 tokens"):
        prepare_prompts(load_recipe("on-policy", ["data.max_length=10"], smoke=True), tokenizer, 0, 8)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ("on_policy.max_completion_length=200", "to leave room for the prompt: raise data.max_length"),
        ("data.packing=true", "set data.packing to false"),
        ("train.fsdp=full_shard", "remove train.deepspeed and train.fsdp"),
        ("on_policy={fraction: 1, max_completion_length: 8}", None),
        ("on_policy.fraction=[[0, 2]]", r"it must lie in \[0, 1\]"),
        ("on_policy.fractoin=1", "did you mean 'fraction'"),
    ],
)
def test_contradictions_with_on_policy_are_reported(changed, problem):
    if problem is None:
        assert load_recipe("on-policy", [changed]).on_policy.fraction == 1
        with pytest.raises(DistillError, match=r"no row has hard labels: set distill\.alpha to 1"):
            load_recipe("on-policy", [changed, "distill.alpha=0.5"])
        return
    with pytest.raises(DistillError, match=problem):
        load_recipe("on-policy", [changed])
