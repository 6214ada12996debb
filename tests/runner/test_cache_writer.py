"""Teacher caches of recipes: written, verified and read by the same recipe, refused for others."""

import json

import pytest
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.cache import open_cache
from hf_distill.cli import app
from hf_distill.planning import plan
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.recipe.load import validate
from hf_distill.runner.cache_writer import verify_against_teacher, write_recipe_cache


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Overrides for a small source; the working directory is a new folder."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"The number {i} times {i} is {i * i}, and not {i * i + 1}. " * 3}) for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    return ["data.task.path=texts.jsonl", "train.learning_rate=0.01", "train.logging_steps=1"]


def recipe(texts, *overrides, name="cached"):
    return load_recipe(name, [*texts, *overrides], smoke=True)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["run"] == "student" and "loss" in line]


def test_a_student_trained_from_a_cache_equals_one_trained_from_its_source(texts, tmp_path):
    options = ["teacher.path=c", "losses=[{name: hidden_cosine, weight: 0.1, layers: [[2, 3]]}]"]
    write_recipe_cache(recipe(texts, *options), dtype="float32")
    cached = run_recipe(recipe(texts, *options, "train.output_dir=cached"))
    online = run_recipe(recipe(texts, *options, "teacher.use_source=true", "train.output_dir=online"))
    assert losses(cached.folder) == pytest.approx(losses(online.folder), rel=1e-5)
    for name in ("perplexity", "kl", "agreement", "hidden_cosine_loss"):
        assert cached.models["student"][name] == pytest.approx(online.models["student"][name], rel=1e-4)
        assert "kl" in cached.models["control"]
    evidence = json.loads((cached.folder / "results.json").read_text())
    assert evidence["caches"]["c"]["kind"] == "hidden"
    assert evidence["caches"]["c"]["teacher"]["model"] == "smoke:llama/teacher"


def test_packed_and_padded_runs_read_the_same_cache(texts, tmp_path):
    (tmp_path / "chats.jsonl").write_text(
        "\n".join(
            json.dumps({"prompt": f"What is {i}?", "completion": " It is " + "very " * (i % 5)}) for i in range(40)
        )
    )
    chats = [*texts, "data.task.path=chats.jsonl", "teacher.path=c"]
    _, manifest = write_recipe_cache(recipe(chats))
    assert manifest.data["examples"] == 40
    packed = run_recipe(recipe(chats, "data.packing=true", "train.output_dir=packed"))
    assert packed.models["student"]["kl"] > 0


def test_a_cache_written_with_another_max_length_is_refused_before_the_first_step(texts):
    write_recipe_cache(recipe(texts, "teacher.path=c"))
    with pytest.raises(
        DistillError,
        match=r"The cache c lacks .* rows that were checked.*max_length: 64 in the "
        "cache, 48 in this recipe",
    ):
        run_recipe(recipe(texts, "teacher.path=c", "data.max_length=48"))
    online = run_recipe(recipe(texts, "teacher.path=c", "data.max_length=48", "teacher.on_miss=query_teacher"))
    assert online.models["student"]["kl"] > 0


def test_an_interrupted_cache_write_continues_to_the_same_cache(texts, tmp_path):
    _, complete = write_recipe_cache(recipe(texts, "teacher.path=whole"), shard_rows=8)

    def stop(progress):
        if progress.bytes_per_token:  # the first shard is written
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_recipe_cache(recipe(texts, "teacher.path=part"), shard_rows=8, on_progress=stop)
    assert len([*(tmp_path / "part").glob("*.arrow")]) == 1
    _, again = write_recipe_cache(recipe(texts, "teacher.path=part"), shard_rows=8)
    assert again.shards == complete.shards


def test_verify_finds_identical_teacher_outputs_and_refuses_other_data(texts, tmp_path):
    write_recipe_cache(recipe(texts, "teacher.path=c"), kind="sampled", shard_rows=8)
    result = verify_against_teacher(open_cache("c"), 10)
    assert result["examples"] >= 10
    assert result["identical"] == 1.0
    manifest = open_cache("c").manifest
    assert manifest.recipe["teacher"]["kind"] == "frozen"
    lines = [json.dumps({"text": f"Other text altogether, {i}. " * 9}) for i in range(20)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    with pytest.raises(DistillError, match="another fingerprint"):
        verify_against_teacher(open_cache("c"), 10)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["teacher={kind: cached, path: nowhere}", "student={model: 'smoke:llama/student'}"], "nowhere is not a cache"),
        (["teacher={kind: cached}"], "needs the path of the cache"),
        (["teacher={kind: cached, path: c, use_source: true}"], "need the teacher that wrote the cache"),
        (["teacher={kind: cached, path: c}"], "a teacher cache holds no weights"),
        (["teacher={kind: cached, path: c, source: {kind: ema}}"], "the kind of source is ema"),
        (["teacher.on_miss=query_teacher", "teacher.use_source=true"], "remove one of them"),
        (["on_policy={max_completion_length: 8}"], "a teacher cache does not contain what the student generates"),
    ],
)
def test_recipes_that_cannot_read_a_cache_are_refused(texts, overrides, why):
    with pytest.raises(DistillError, match=why):
        run_recipe(recipe(texts, *overrides))


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["teacher={kind: ema}", "student={model: 'smoke:llama/student'}"], "has kind ema"),
        (["losses=[{name: attention_kl}]"], "loss 'attention_kl' compares features of the kind attention"),
        (["teacher={kind: cached, path: c}", "student={model: 'smoke:llama/student'}"], "is a cache without a source"),
    ],
)
def test_recipes_whose_teacher_cannot_be_cached_are_refused(texts, overrides, why):
    with pytest.raises(DistillError, match=why):
        write_recipe_cache(recipe(texts, *overrides), "c")


def test_a_cache_of_another_teacher_is_refused(texts):
    write_recipe_cache(recipe(texts, "teacher.path=c"))
    with pytest.raises(
        DistillError, match=r"c was written by the teacher smoke:llama/teacher, but its source is smoke:qwen2/teacher"
    ):
        run_recipe(recipe(texts, "teacher.path=c", "teacher.source.model=smoke:qwen2/teacher"))


def test_the_command_line_writes_verifies_and_runs(texts):
    runner = CliRunner()
    write = ["cache", "write", "cached", *texts, "--smoke", "-o", "c", "--kind", "sampled", "--samples-per-token", "6"]
    done = runner.invoke(app, write)
    assert done.exit_code == 0, done.output
    assert "of kind sampled" in done.output
    assert "tokens/s" in done.output
    checked = runner.invoke(app, ["cache", "verify", "c", "--against-teacher", "4"])
    assert "files are correct" in checked.output
    assert "100.0%" in checked.output
    ran = runner.invoke(app, ["run", "cached", "--smoke", *texts, "teacher.path=c"])
    assert ran.exit_code == 0, ran.output


def test_the_plan_estimates_caches(texts):
    values = load_recipe("llama-70b-to-8b-nf4").model_dump(exclude_none=True, exclude_defaults=True)
    online = plan(validate(values), 8, 80.0)
    source = values["teacher"]
    cached = plan(validate(values | {"teacher": {"kind": "cached", "path": "c", "source": source}}), 8, 80.0)
    kinds = {kind.kind: kind.bytes_per_token for kind in online.caches.kinds}
    assert kinds["hidden"] == pytest.approx(2 * 8192, rel=0.01)
    assert kinds["sampled"] < 36
    assert kinds["top_k"] < 200
    assert 0.5 < online.caches.saved < 1
    assert cached.cost.flop_per_token == pytest.approx((1 - online.caches.saved) * online.cost.flop_per_token)
    assert cached.rows[0].parts.teacher < 0.1 * online.rows[0].parts.teacher
    assert plan(load_recipe("ema"), 1, 80.0).caches is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "foo"}, "kind is 'foo'; it must be one of"),
        ({"kind": "top_k", "k": 0}, "k is 0; it must be an integer from 1"),
        ({"kind": "sampled", "samples_per_token": 0}, "samples_per_token is 0"),
    ],
)
def test_wrong_options_of_a_cache_are_refused_before_a_model_is_loaded(texts, tmp_path, options, message):
    stages = []
    with pytest.raises(DistillError, match=message):
        write_recipe_cache(recipe(texts), str(tmp_path / "c"), stages.append, **options)
    assert stages == []
    assert not (tmp_path / "c").exists()
