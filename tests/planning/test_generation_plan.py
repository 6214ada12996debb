"""The plan of a generation: FLOP and cache against forwards of a model, and counts against the prompts of the data."""

import dataclasses
import json
from functools import cache

import pytest
import torch
import yaml
from shrunk import shrunk
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from hf_distill.errors import DistillError
from hf_distill.planning import ModelStats, model_config, plan
from hf_distill.planning.estimates import GiB
from hf_distill.planning.flops import Flops
from hf_distill.planning.generation import (
    GenerationRates,
    count_prompts,
    generation_flop,
    kv_cache_bytes,
    plan_generation,
)
from hf_distill.planning.render_generation import generation_lines
from hf_distill.recipe.load import load_recipe
from hf_distill.runner.generate import read_prompts
from hf_distill.runner.generated_sources import generation_rows, seed_of

TEACHER, STUDENT = "meta-llama/Llama-3.1-8B-Instruct", "HuggingFaceTB/SmolLM2-135M"
RATES = GenerationRates(prompts=10_000, prompt_tokens=200, completion_tokens=500)
SPEED = 989e12 * 0.4


@cache
def stats_of(name: str) -> ModelStats:
    return ModelStats.of(model_config(name))


def generation_of(recipe, rates=None, gib=80):
    usable = int(gib * GiB * 0.95) - GiB
    return plan_generation(recipe, stats_of(TEACHER), rates or GenerationRates(), usable, SPEED)


def text_of(generation) -> str:
    return "\n".join(generation_lines(generation, 0.4))


@pytest.fixture
def recipe_of(tmp_path):
    def make(*changes, **sections):
        values = {
            "student": {"model": STUDENT},
            "teacher": {"model": TEACHER, "dtype": "bfloat16"},
            "data": {"task": {"path": "org/prompts", "generate": True}, "eval": {"path": "org/prompts"}},
            "generate": {"samples": 4, "max_new_tokens": 1000, "batch_size": 64},
            "train": {"output_dir": "runs/x", "max_steps": 10},
            **sections,
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(values))
        return load_recipe(str(file), changes)

    return make


def test_the_formulas_give_the_flop_and_the_cache_of_generating_with_a_model():
    """Grouped-query attention in eager mode, whose products torch counts over all query heads."""
    prompt, completion = 24, 9
    model = AutoModelForCausalLM.from_config(shrunk("llama"), attn_implementation="eager").eval()
    stats = ModelStats.of(model.config)
    kv_cache, ids = DynamicCache(config=model.config), torch.zeros(1, prompt, dtype=torch.long)
    counts = []
    for _ in range(completion):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=ids, past_key_values=kv_cache, use_cache=True, logits_to_keep=1)
        counts.append(counter.get_total_flops())
        ids = ids[:, :1]
    prefill, decoding = generation_flop(stats, prompt, completion)
    assert prefill == pytest.approx(counts[0], rel=0.02)
    assert decoding == pytest.approx(sum(counts[1:]), rel=0.02)
    stored = sum(each.keys.nbytes + each.values.nbytes for each in kv_cache.layers)
    assert kv_cache_bytes(stats, torch.float32) * (prompt + completion - 1) == stored


@pytest.mark.parametrize(("prompt", "completion"), [(1, 1), (7, 1), (1, 5), (200, 30)])
def test_the_closed_form_equals_a_sum_over_tokens(prompt, completion):
    stats = stats_of(STUDENT)

    def forward(context: int) -> float:
        return Flops.of(stats, context).blocks + Flops.of(stats, context).attention

    head = Flops.of(stats, 1).head
    expected = sum(forward(prompt + j) + head for j in range(1, completion))
    assert generation_flop(stats, prompt, completion) == pytest.approx((prompt * forward(prompt) + head, expected))


def test_a_plan_of_llama_equals_a_calculation_by_hand(recipe_of):
    recipe = recipe_of(student={"model": TEACHER})
    generation = generation_of(recipe, RATES)
    assert (generation.tokens, generation.is_upper_bound, generation.server_hours) == (20_000_000, False, None)
    local = generation.local
    assert local.kv_bytes == 2 * 32 * 8 * 128 * 2
    assert local.weights == 8_030_261_248 * 2
    usable = int(80 * GiB * 0.95) - GiB
    assert local.fitting == (usable - local.weights) // (local.kv_bytes * 700)
    assert (local.sequences, local.kv_cache) == (64, 64 * local.kv_bytes * 700)
    embeddings = 128256 * 4096 * 2  # not tied to the output head: a step reads one row of them for each sequence
    read = local.weights - embeddings + 64 * local.kv_bytes * (200 + 250)
    assert local.is_memory_bound
    assert local.tokens_per_second == pytest.approx(64 * 3.35e12 / read)
    hours = local.prefill_flop / SPEED / 3600 + 20_000_000 / local.tokens_per_second / 3600
    assert local.hours == pytest.approx(hours)
    prefill, decoding = generation_flop(stats_of(TEACHER), 200, 500)
    assert (local.prefill_flop, local.decoding_flop) == (40_000 * prefill, 40_000 * decoding)
    text = 40_000 * (200 + 500 + 500) * 4.1 * 0.5
    assert generation.disk == pytest.approx(text)


def test_large_batches_are_limited_by_flop_and_by_memory(recipe_of):
    recipe = recipe_of("generate.batch_size=100000", student={"model": TEACHER})
    local = generation_of(recipe, dataclasses.replace(RATES, bandwidth=100.0)).local
    assert local.sequences == local.fitting < 100_000
    assert not local.is_memory_bound
    small = generation_of(recipe, RATES, gib=12)
    assert (small.local.fitting, small.local.hours) == (0, None)
    assert "shard the teacher with teacher.device_map, or use a server" in text_of(small)


def test_a_server_needs_a_rate(recipe_of):
    recipe = recipe_of(generate={"backend": "server", "samples": 2, "max_new_tokens": 1000})
    assert "pass the rate of the server with --tokens-per-second" in text_of(generation_of(recipe))
    known = generation_of(recipe, GenerationRates(prompts=3600, tokens_per_second=2000))
    assert "Time: 1 hours at the rate of the server" in text_of(known)
    assert known.local is None
    assert known.server_hours == pytest.approx(1.0)
    assert known.is_upper_bound


def test_prompts_are_counted_as_they_are_generated(recipe_of, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": "c"}) + "\n" for i in range(50)))
    source = {"path": str(file), "generate": True}
    for changes in ((), ("generate.max_prompts=30",), ("data.eval={holdout: 0.2}",)):
        recipe = recipe_of(f"data.task={source}", "data.more={path: package:builtins}", *changes)
        count = count_prompts(recipe, recipe.generate)
        assert count == len(generation_rows(recipe, 50, seed_of(recipe)))
    recipe = recipe_of(f"data.task={{path: {file}}}", "data.more={path: package:builtins}")
    assert count_prompts(recipe, recipe.generate) == len(read_prompts(recipe, recipe.generate))
    hub = recipe_of()
    assert count_prompts(hub, hub.generate) is None
    assert "of an unknown number: pass --prompts" in text_of(generation_of(hub))
    limited = recipe_of("generate.max_prompts=20")
    assert generation_of(limited).tokens == 20 * 4 * 1000


def test_a_recipe_without_a_generation_has_no_plan_of_one(recipe_of):
    recipe = recipe_of("data.task.generate=false", "generate=null")
    assert generation_of(recipe) is None
    assert generation_lines(None, 0.4) == []


@pytest.mark.parametrize(
    "rates", [{"prompts": -1}, {"prompt_tokens": 0}, {"completion_tokens": -5}, {"bandwidth": 0.0}]
)
def test_numbers_out_of_range_are_refused(rates, recipe_of):
    with pytest.raises(DistillError, match=f"{next(iter(rates))} is .*; it must be above 0"):
        plan(recipe_of(), 1, 80, rates=GenerationRates(**rates))


def test_a_chain_generates_once(run_cli, recipe_of, tmp_path):
    cut = [{"student": {"from_teacher": {"keep_layers": n}}} for n in (3, 2)]
    recipe_of(stages=cut, student=cut[-1]["student"])
    result = run_cli("plan", str(tmp_path / "recipe.yaml"), "--prompts", "100", "--json")
    plans = json.loads(result.stdout)
    assert [plans[name]["generation"] is None for name in ("stage-1", "stage-2")] == [False, True]
    assert plans["stage-1"]["generation"]["tokens"] == 100 * 4 * 1000
    result = run_cli("plan", str(tmp_path / "recipe.yaml"), "--prompts", "100")
    assert result.stdout.count("Generation with backend transformers") == 1


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({"cache": "top_k"}, 8 * 64 + 88, 8 * 64 + 88 + 2.2 * 64),
        ({"cache": "top_k", "k": 16}, 8 * 16 + 22, 8 * 16 + 22 + 2.2 * 16),
        ({"cache": "hidden"}, 2 * 4096 + 2 * 4096, 2 * 4096 + 2 * 4096 + 1),
        ({"cache": "sampled", "samples_per_token": 24}, 2 * 4096 + 20, 2 * 4096 + 60),
        ({}, 0, 0),
    ],
)
def test_a_cache_adds_its_size_and_that_of_the_recorded_distributions(options, least, most, recipe_of):
    recipe = recipe_of("data.task.generate=false", generate={"max_new_tokens": 100, **options})
    generation = generation_of(recipe, RATES)
    assert least <= generation.cache / generation.tokens <= most
    assert ("for the teacher cache" in text_of(generation)) == bool(options)
