"""Published log-probabilities are imported as the `top_k` cache of a recipe; wrong ones are refused with their line."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.cache import open_cache, verify_cache
from hf_distill.cache.example_keys import batch_examples
from hf_distill.cache.serialization import decode_signals
from hf_distill.cli import app
from hf_distill.core.targets import Targets
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.runner.cache_import import import_cache
from hf_distill.runner.cache_writer import verify_against_teacher, write_recipe_cache
from hf_distill.runner.model_loading import resolve_model
from hf_distill.runner.teacher_only import load_teacher_and_data, static_teacher_spec

K = 8


def recipe(*overrides):
    fixed = ["data.task.path=rows.jsonl", "train.logging_steps=1", "distill.temperature=1", "teacher.path=c"]
    return load_recipe("cached", [*fixed, *overrides], smoke=True)


@pytest.fixture(scope="module")
def teacher():
    path = resolve_model("smoke:llama/teacher")
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


@pytest.fixture
def requests(tmp_path, monkeypatch):
    """The token ids of the rows of the recipe: prompts with completions of different lengths."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {i}?", "completion": " It is " + "very " * (i % 3) + "big."} for i in range(12)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary = import_cache(recipe(), [], missing_file="needed.jsonl")
    assert summary.manifest is None
    assert not Path("c").exists()
    assert summary.missing == summary.rows == 12
    return [json.loads(line)["prompt_token_ids"] for line in Path("needed.jsonl").read_text().splitlines()]


def answer(teacher, ids, k=K):
    """Return what vLLM answers for a prompt: null, then the top k and the actual token of each position."""
    model, tokenizer = teacher
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    entries = [None]
    for position, token in enumerate(ids[1:]):
        values = log_probs[position]
        top = values.topk(k).indices.tolist()
        kept = [(token, int((values >= values[token]).sum())), *((each, rank) for rank, each in enumerate(top, 1))]
        entries.append(
            {
                str(each): {"logprob": values[each].item(), "rank": rank, "decoded_token": tokenizer.decode([each])}
                for each, rank in kept
            }
        )
    return {"prompt_token_ids": ids, "prompt_logprobs": entries}


def as_response(plain):
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "model": "big",
        "choices": [{"index": 0, "text": "a", **plain}],
    }


def as_chat(plain):
    return {"id": "chat-1", "model": "big", "choices": [{"index": 0, "message": {}}], **plain}


def as_batch(plain):
    response = {"status_code": 200, "request_id": "r", "body": as_chat(plain)}
    return {"id": "vllm-1", "custom_id": "a", "response": response, "error": None}


def write_lines(objects, file="answers.jsonl"):
    Path(file).write_text("".join(json.dumps(each) + "\n" for each in objects))
    return file


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["run"] == "student" and "loss" in line]


def decoded(folder, batch):
    """Return the signals of a batch that a cache holds."""
    cache, targets = open_cache(folder), Targets.from_batch(batch, True)
    stored = cache.get([example.key for example in batch_examples(batch, targets)])
    return decode_signals(stored, cache.manifest, {}, torch.device("cpu"), cache.manifest.vocab_size).logits


def rows_of(loaded):
    _, data, _, _ = load_teacher_and_data(loaded, static_teacher_spec(loaded), lambda text: None)
    return [data.collator([row]) for part in (data.train, data.held_out) for row in part]


def test_a_student_trained_from_an_import_equals_one_trained_from_our_own_cache(teacher, requests):
    """The lines are in another order, in all forms, with texts that are longer than the rows, and with duplicates."""
    forms = [as_response, as_chat, as_batch, lambda plain: plain]
    answers = [answer(teacher, [*ids, 7] if i % 2 else ids) for i, ids in enumerate(requests)]
    lines = [forms[i % 4](each) for i, each in enumerate(reversed(answers))]
    first, second = write_lines(lines[:7], "a.jsonl"), write_lines([*lines[7:], lines[0]], "b.jsonl")
    done = CliRunner().invoke(
        app,
        ["cache", "import", first, second, "--recipe", "cached", "--smoke", "--set", "data.task.path=rows.jsonl"]
        + ["--set", "distill.temperature=1", "-o", "c"],
    )
    assert done.exit_code == 0, done.output
    assert "13 records: 0 of other texts, 1 duplicates" in done.output
    verified = CliRunner().invoke(app, ["cache", "verify", "c"])
    assert "Imported from 13 records in a.jsonl, b.jsonl (vllm)." in verified.output
    manifest = verify_cache(Path("c"))
    assert manifest.kind == "top_k"
    assert manifest.options == {"k": K}
    assert manifest.teacher["model"] == "smoke:llama/teacher"
    imported = manifest.teacher["imported"]
    assert imported["formats"] == ["vllm"]
    assert imported["served_models"] == ["big"]
    assert [entry["file"] for entry in imported["files"]] == ["a.jsonl", "b.jsonl"]

    _, own = write_recipe_cache(recipe("teacher.path=own"), kind="top_k", k=K)
    assert manifest.data["fingerprint"] == own.data["fingerprint"]
    for batch in rows_of(recipe()):
        ours, theirs = decoded("own", batch), decoded("c", batch)
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.log_probs, theirs.log_probs)
        assert torch.equal(ours.log_tail, theirs.log_tail)
    runs = [
        run_recipe(recipe(f"teacher.path={path}", f"train.output_dir={path}-run", "control=null"))
        for path in ("c", "own")
    ]
    assert losses(runs[0].folder) == pytest.approx(losses(runs[1].folder), rel=1e-6)
    evidence = json.loads((runs[0].folder / "results.json").read_text())
    assert evidence["caches"]["c"]["teacher"]["imported"]["records"] == 13
    packed = run_recipe(recipe("train.output_dir=packed", "data.packing=true", "control=null"))
    assert losses(packed.folder)


def test_fewer_ids_are_kept_on_request_and_k_is_read_without_ranks(teacher, requests):
    answers = [answer(teacher, ids) for ids in requests]
    for each in answers:
        for entries in each["prompt_logprobs"][1:]:
            for entry in entries.values():
                del entry["rank"]
    assert import_cache(recipe(), [write_lines(answers)]).manifest.options == {"k": K}
    summary = import_cache(recipe(), [write_lines(answers)], "few", k=3)
    write_recipe_cache(recipe("teacher.path=own"), kind="top_k", k=3)
    for batch in rows_of(recipe()):
        assert torch.equal(decoded("own", batch).ids, decoded("few", batch).ids)
    assert summary.manifest.options == {"k": 3}


def test_an_interrupted_import_is_continued_and_a_complete_one_is_kept(teacher, requests):
    file = write_lines([answer(teacher, ids) for ids in requests])

    def stop(progress):
        if progress.bytes_per_token:  # the first shard is written
            raise KeyboardInterrupt

    import_cache(recipe(), [file], "whole", shard_rows=4)
    with pytest.raises(KeyboardInterrupt):
        import_cache(recipe(), [file], "part", shard_rows=4, on_progress=stop)
    with pytest.raises(DistillError, match="unfinished cache"):
        open_cache("part")
    import_cache(recipe(), [file], "part", shard_rows=4)
    assert open_cache("part").manifest.shards == open_cache("whole").manifest.shards
    with pytest.raises(DistillError, match="holds another cache"):
        import_cache(recipe(), [file], "part", shard_rows=4, k=2)


def test_rows_without_a_record_are_counted_and_their_ids_written(teacher, requests):
    file = write_lines([answer(teacher, ids) for ids in requests[:10]])
    with pytest.raises(DistillError, match=r"2 of the 12 different .* have no record.*'What is"):
        import_cache(recipe(), [file])
    assert not Path("c").exists()
    summary = import_cache(recipe(), [file], missing_file="rest.jsonl")
    assert summary.missing == 2
    needed = [json.loads(line)["prompt_token_ids"] for line in Path("rest.jsonl").read_text().splitlines()]
    assert needed == requests[10:]
    rest = write_lines([answer(teacher, ids) for ids in needed], "more.jsonl")
    assert import_cache(recipe(), [file, rest], missing_file="rest.jsonl").folder == Path("c")


def test_records_of_other_texts_are_refused_or_skipped(teacher, requests):
    other = [requests[0][0], *requests[1][1:-3]]
    file = write_lines([answer(teacher, ids) for ids in [*requests, other]])
    with pytest.raises(DistillError, match=r"answers.jsonl, line 13 has a text of \d+ tokens that is no row"):
        import_cache(recipe(), [file])
    assert import_cache(recipe(), [file], allow_unused=True).matches.unused == 1


def test_the_text_of_a_prompt_is_tokenized_and_compared(teacher, requests):
    answers = [answer(teacher, ids) for ids in requests]
    texts = [each | {"prompt": teacher[1].decode(each["prompt_token_ids"])} for each in answers]
    without_ids = [{key: value for key, value in each.items() if key != "prompt_token_ids"} for each in texts]
    assert import_cache(recipe(), [write_lines([*texts[:6], *without_ids[6:]])]).missing == 0
    texts[1]["prompt"] = "Something else"
    with pytest.raises(DistillError, match=r"line 2, has a prompt whose text is not that of its prompt_token_ids"):
        import_cache(recipe(), [write_lines(texts)], "d")


def change(entry, **values):
    next(iter(entry.values())).update(values)


def double(entry):
    for each in entry.values():
        each["logprob"] = each["logprob"] / 8


# What is done to the answer in line 3, and what the error says about it.
DAMAGES = {
    "positive": (lambda a: change(a["prompt_logprobs"][2], logprob=0.5), r"line 3 has the value 0.5 at position 1"),
    "not finite": (lambda a: change(a["prompt_logprobs"][2], logprob=float("nan")), "line 3, .*finite `logprob`"),
    "text as a number": (lambda a: change(a["prompt_logprobs"][2], logprob="-1"), "line 3, .*finite `logprob`"),
    "no probabilities": (lambda a: double(a["prompt_logprobs"][4]), r"line 3 the probabilities of position 3 sum to"),
    "another tokenizer": (
        lambda a: change(a["prompt_logprobs"][2], decoded_token="zebra"),
        r"line 3, prompt_logprobs\[2\] has the text 'zebra'",
    ),
    "an id outside": (
        lambda a: a["prompt_logprobs"][2].update({"999999": {"logprob": -9.0, "rank": None}}),
        r"line 3 has the id 999999 at position 1",
    ),
    "one position less": (lambda a: a["prompt_logprobs"].pop(), r"line 3, has prompt_logprobs of \d+ tokens, and"),
    "a position without values": (lambda a: a["prompt_logprobs"].__setitem__(2, None), "line 3, .*prefix cache"),
    "a shifted list": (lambda a: a["prompt_logprobs"].__setitem__(0, {"1": {"logprob": -1.0}}), "must be null"),
    "another text": (lambda a: a["prompt_token_ids"].__setitem__(2, a["prompt_token_ids"][2] + 1), r"lacks the id"),
    "fewer ids": (
        lambda a: [entries.popitem() for entries in a["prompt_logprobs"][1:]],
        f"Pass -k {K - 1} to keep {K - 1} of each position",
    ),
    "no ids": (lambda a: a.pop("prompt_token_ids"), "line 3, has no token ids of its prompt"),
    "no values": (lambda a: a.pop("prompt_logprobs"), "line 3, has no prompt_logprobs"),
    "wrong ids": (lambda a: a.update(prompt_token_ids=["1"]), "no list of ids"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_refused_with_its_line_and_nothing_is_written(teacher, requests, damage):
    answers = [answer(teacher, ids) for ids in requests]
    damaging, message = DAMAGES[damage]
    damaging(answers[2])
    with pytest.raises(DistillError, match=message):
        import_cache(recipe(), [write_lines(answers)])
    assert not Path("c").exists()


def test_lines_that_are_no_answers_are_refused(teacher, requests):
    good = json.dumps(answer(teacher, requests[0]))
    failed = json.dumps({"custom_id": "a", "response": {"status_code": 400, "body": {"message": "too long"}}})
    for line, message in (
        (good[:50], "line 3, is not JSON"),
        ("[1]", "line 3, holds list"),
        (good.replace('": {"logprob": -', '": {"logprob": -1' + "0" * 400, 1).replace(".", "", 1), "finite `logprob`"),
        (good.replace('"prompt_token_ids": [', '"prompt": "\\ud800", "prompt_token_ids": ['), "line 3, is not JSON"),
        (good.replace('"prompt_token_ids": [', '"prompt_token_ids": [1' + "0" * 30 + ", "), "no list of ids"),
        (failed, "line 3, is the answer to a request that failed .*too long"),
    ):
        Path("answers.jsonl").write_text(f"{good}\n\n{line}\n")
        with pytest.raises(DistillError, match=message):
            import_cache(recipe(), ["answers.jsonl"])


def test_two_records_of_one_text_must_agree(teacher, requests):
    answers = [answer(teacher, ids) for ids in requests]
    other = json.loads(json.dumps(answers[3]))
    best = max(other["prompt_logprobs"][-1].values(), key=lambda entry: entry["logprob"])
    best["logprob"] -= 0.5
    with pytest.raises(DistillError, match=r"line 13 and .*line 4 have the same text and different log-prob"):
        import_cache(recipe(), [write_lines([*answers, other])])


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["distill.temperature=2"], {}, "has the temperature 2.*Set distill.temperature to 1"),
        (["teacher={kind: ema}", "student={model: 'smoke:llama/student'}"], {}, "one teacher of kind cached"),
        ([], {"k": 0}, "k is 0"),
        ([], {"k": 100}, "k is 100: request more"),
        ([], {"format": "sglang"}, "must be one of vllm, distillkit"),
        ([], {"vocab_size": 1}, "must be 2 or more"),
    ],
)
def test_wrong_options_are_refused(teacher, requests, overrides, options, message):
    file = write_lines([answer(teacher, ids) for ids in requests])
    with pytest.raises(DistillError, match=message):
        import_cache(recipe(*overrides), [file], "c", **options)
    assert not Path("c").exists()
    with pytest.raises(DistillError, match="no such file"):
        import_cache(recipe(), ["nowhere.jsonl"])


def test_an_imported_cache_is_not_compared_with_a_teacher(teacher, requests):
    import_cache(recipe(), [write_lines([answer(teacher, ids) for ids in requests])])
    with pytest.raises(DistillError, match="no teacher whose outputs"):
        verify_against_teacher(open_cache("c"), 4)
    with pytest.raises(DistillError, match="c was imported, so it is not known"):
        run_recipe(recipe("teacher.on_miss=query_teacher", "control=null"))
