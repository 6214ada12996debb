"""Strategies, advice and costs of a plan, and the errors that it raises."""

import pytest
from shrunk import SMALL, recipe, workload_of
from transformers import AutoConfig

from hf_distill.errors import DistillError
from hf_distill.planning import ModelStats, Strategy, estimate_memory, model_config, plan
from hf_distill.planning.estimates import GiB, deepspeed_estimate, fewest_gpus, min_gpus
from hf_distill.planning.render import caches_table, verdict
from hf_distill.planning.strategy import STUDENTS, alternatives
from hf_distill.planning.workload import make_workload
from hf_distill.recipe import load_recipe
from hf_distill.recipe.load import recipes_by_stage

# Strategies


@pytest.mark.parametrize("name", ["llama-70b-to-8b-zero3", "qwen-72b-to-7b-fsdp2"])
def test_the_overrides_of_a_strategy_turn_a_recipe_into_that_strategy(name):
    models = (f"student.model={SMALL}", f"teacher.model={SMALL}")
    planned = plan(recipe(*models, name=name), 8, 80)
    assert {row.strategy.student for row in planned.rows} == set(STUDENTS) - {"single"}
    for row in planned.rows:
        changed = recipe(*models, *row.overrides, name=name)
        assert Strategy.of_recipe(changed, 8) == row.strategy
        config = model_config(SMALL)
        assert estimate_memory(make_workload(changed, config, config), row.strategy, 8) == row.parts


def test_quantized_models_are_not_sharded_and_deepspeed_and_fsdp2_not_mixed():
    for method in ("full", "lora", "qlora"):
        for strategy in alternatives(method, 8):
            assert {strategy.teacher, strategy.student} not in (
                {"zero3", "fsdp2"},
                {"fsdp2", "zero1"},
                {"fsdp2", "zero2"},
            )
    assert {s.student for s in alternatives("qlora", 8)} == {"ddp"}
    assert all(not s.is_sharded for s in alternatives("full", 1))


def test_a_strategy_does_not_fit_on_fewer_gpus_than_the_minimum():
    workload = workload_of(model_config("meta-llama/Llama-3.1-8B"), mixed_precision=True)
    strategy = Strategy("zero3", "zero3")
    least = min_gpus(workload, strategy, 40 * GiB)
    assert (
        estimate_memory(workload, strategy, least).total
        <= 40 * GiB
        < estimate_memory(workload, strategy, least - 1).total
    )
    assert fewest_gpus(workload, 40 * GiB)[0] <= least
    assert min_gpus(workload, Strategy("full", "ddp"), 40 * GiB) is None


def test_the_advice_depends_on_the_memory_of_a_gpu():
    small = ("teacher.model=Qwen/Qwen2.5-7B", f"student.model={SMALL}", "data.max_length=256")
    roomy, tight, tiny, never = (plan(recipe(*small), 1, gib) for gib in (32, 12, 4.5, 1.5))
    assert roomy.cheapest.strategy.teacher == "full"
    assert tight.cheapest.strategy.teacher == "int8"
    assert tiny.cheapest is None
    assert "needs the fewest" in tiny.advice
    assert "per_device_train_batch_size" in never.advice


def test_our_estimate_is_below_deepspeeds_and_close_to_it():
    workload = workload_of(model_config("meta-llama/Llama-3.1-8B"), mixed_precision=True)
    for student, each in (("zero2", 20), ("zero3", 18)):
        parts = estimate_memory(workload, Strategy("full", student), 8)
        ours = (parts.student + parts.gradients + parts.optimizer) / GiB
        assert ours < deepspeed_estimate(workload, Strategy("full", student), 8) < ours * each / 16 + 2.5
    assert deepspeed_estimate(workload, Strategy("full", "ddp"), 8) is None


# The plan of a recipe


def test_the_cost_of_a_run_equals_a_calculation_by_hand():
    planned = plan(recipe(name="llama-70b-to-8b-zero3"), 8, 80)
    tokens = 10000 * 2 * 8 * 8 * 2048
    assert planned.cost.tokens == tokens
    assert planned.cost.rule == pytest.approx(tokens * (2 * 70553706496 + 6 * 8030261248))
    assert planned.cost.flop == pytest.approx(tokens * (planned.teacher.forward + planned.student.training))
    assert planned.cost.gpu_hours == pytest.approx(planned.cost.flop / (0.4 * 989e12) / 3600)
    assert planned.cost.share == pytest.approx(planned.cost.flop / (6 * 8030261248 * 2e12))


def test_the_cost_includes_the_control():
    alone, both = (plan(recipe(f"control={control}", "train.max_steps=100"), 2, 80) for control in ("null", "sft"))
    tokens = alone.cost.tokens
    assert alone.cost.control == 0
    assert both.cost.control == pytest.approx(tokens * alone.student.training)
    assert both.cost.flop == pytest.approx(alone.cost.flop + both.cost.control)
    assert both.cost.rule == pytest.approx(alone.cost.rule + 6 * alone.student.parameters * tokens)
    assert both.cost.gpu_hours == pytest.approx(alone.cost.gpu_hours * both.cost.flop / alone.cost.flop)
    assert any(line.startswith("Control: ") for line in verdict(both))
    assert not any("control" in line.lower() for line in verdict(alone))
    epochs = plan(recipe("control=sft", "train.max_steps=null", "train.num_train_epochs=1"), 1, 80)
    assert any("The control trains for as long" in line for line in verdict(epochs))


def test_the_plan_of_a_chain_includes_the_direct_control():
    chain = load_recipe("progressive", smoke=True)
    parts = recipes_by_stage(chain)
    assert [*parts] == [*(f"stage-{i}" for i in range(1, len(chain.stages) + 1)), "direct"]
    assert parts["direct"].train.max_steps == sum(parts[name].train.max_steps for name in parts if name != "direct")


def test_the_size_of_a_cache_of_hidden_states_includes_the_output_head():
    planned = plan(recipe("student={from_teacher: {keep_layers: 16}}", f"teacher.model={SMALL}"), 1, 80)
    heads = {kind.kind: kind.head for kind in planned.caches.kinds}
    assert heads == {"hidden": 49152 * 576 * 2, "sampled": 0, "top_k": 0}
    (table, line, _) = caches_table(planned)
    assert line == "The size of hidden includes 54 MiB for the output head."
    rows = [*table.columns[2].cells]
    tokens = planned.caches.tokens or 10**9
    hidden = planned.caches.kinds[0]
    assert rows[0] == f"{(hidden.bytes_per_token * tokens + heads['hidden']) / GiB:.3g} GiB"


def test_the_cost_of_a_run_of_epochs_is_unknown():
    cost = plan(recipe("train.max_steps=null", "train.num_train_epochs=1"), 1, 80).cost
    assert cost.tokens is cost.flop is cost.gpu_hours is cost.share is None
    assert cost.tokens_per_second > 0


def test_a_pruned_student_is_planned_with_fewer_blocks():
    planned = plan(recipe("student={from_teacher: {keep_layers: 16}}", f"teacher.model={SMALL}"), 1, 80)
    block = ModelStats.of(model_config(SMALL)).block
    assert planned.student.parameters == 134515008 - 14 * block


def test_all_problems_are_reported_at_once(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    wrong = recipe("student.model=meta-llama/Llama-3.1-8B-Instrct", "teacher.model=me/mine")
    with pytest.raises(DistillError) as caught:
        plan(wrong, 0, -1)
    for message in (
        "gpus is 0; it must be above 0",
        "gpu_memory is -1; it must be above 0",
        "did you mean 'meta-llama/Llama-3.1-8B-Instruct'",
        "'me/mine'",
        "no route to host",
        "a folder with the model's config.json",
    ):
        assert message in str(caught.value)


def test_the_error_for_a_sharded_recipe_on_one_gpu_names_alternatives():
    for name in ("llama-70b-to-8b-zero3", "qwen-72b-to-7b-fsdp2"):
        with pytest.raises(DistillError, match=r"needs at least 2 processes.*teacher\.quantization=nf4"):
            plan(recipe(name=name), 1, 80)
    offload = ("teacher.deepspeed=zero3-teacher-offload.json", "train.deepspeed=zero3-student-offload.json")
    assert plan(recipe(*offload, name="llama-70b-to-8b-zero3"), 1, 80).rows


def test_a_teacher_that_is_the_students_base_takes_no_memory():
    planned = plan(recipe("teacher={kind: adapter_base}", name="llama-70b-to-8b-nf4"), 2, 80)
    assert {row.strategy.teacher for row in planned.rows} == {"self"}
    assert all(row.parts.teacher == 0 for row in planned.rows)
    assert planned.teacher.forward == planned.student.forward


def test_the_ema_of_a_pruned_student_has_the_pruned_size_and_the_advice_names_what_is_not_counted():
    small, large = (plan(load_recipe("ema", [f"student.from_teacher={{keep_layers: {n}}}"]), 1, 80) for n in (10, 20))
    assert small.student.parameters == small.teacher.parameters < large.student.parameters
    assert "The plan does not count the averaged weights" in small.advice


def test_a_quantized_student_is_planned_with_its_size_when_served_and_without_zero3():
    overrides = (
        "student.quantize={scheme: int4_weight_only, group_size: 32}",
        "student.lora=null",
        "train.max_steps=10",
    )
    models = ("student.quantization=null", f"student.model={SMALL}", f"teacher.model={SMALL}")
    quantized = plan(recipe(*models, *overrides, "control=full_precision"), 2, 80)
    alone = plan(recipe(*models, *overrides, "control=null"), 2, 80)
    config = model_config(SMALL)
    linear, all_weights = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536), ModelStats.of(config).parameters
    packed = linear * (4 + 16 / 32) / 8 + 2 * (all_weights - linear)
    stored = linear + linear / 32 * 5 + 4 * (all_weights - linear)
    for size in (packed, stored, 2 * all_weights, 8 * linear):
        assert f"{size / 2**20:,.0f} MiB" in quantized.advice
    assert "zero3" not in {row.strategy.student for row in quantized.rows}
    assert quantized.cost.flop == pytest.approx(2 * alone.cost.flop)
    assert "Served as" not in plan(recipe(), 2, 80).advice
