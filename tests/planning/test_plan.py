"""Strategies, advice, costs, and what is refused."""

import pytest
from shrunk import SMALL, job, recipe
from transformers import AutoConfig

from hf_distill.errors import DistillError
from hf_distill.planning import ModelStats, Strategy, memory, model_config, plan
from hf_distill.planning.estimates import GiB, deepspeed_estimate, fewest_gpus, min_gpus
from hf_distill.planning.render import caches_table, verdict
from hf_distill.planning.strategy import STUDENTS, alternatives
from hf_distill.planning.workload import make_workload
from hf_distill.recipe import load_recipe
from hf_distill.recipe.load import recipes_by_stage

# Strategies


@pytest.mark.parametrize("name", ["llama-70b-to-8b-zero3", "qwen-72b-to-7b-fsdp2"])
def test_every_strategy_is_what_its_overrides_make_of_a_recipe(name):
    models = (f"student.model={SMALL}", f"teacher.model={SMALL}")
    found = plan(recipe(*models, name=name), 8, 80)
    assert {row.strategy.student for row in found.rows} == set(STUDENTS) - {"single"}
    for row in found.rows:
        again = recipe(*models, *row.overrides, name=name)
        assert Strategy.of_recipe(again, 8) == row.strategy
        config = model_config(SMALL)
        assert memory(make_workload(again, config, config), row.strategy, 8, found.usable) == row.parts


def test_quantised_models_are_not_sharded_and_engines_not_mixed():
    for method in ("full", "lora", "qlora"):
        for strategy in alternatives(method, 8):
            assert {strategy.teacher, strategy.student} not in (
                {"zero3", "fsdp2"},
                {"fsdp2", "zero1"},
                {"fsdp2", "zero2"},
            )
    assert {s.student for s in alternatives("qlora", 8)} == {"ddp"}
    assert all(not s.sharded for s in alternatives("full", 1))


def test_fewer_gpus_than_the_least_do_not_do():
    asked = job(model_config("meta-llama/Llama-3.1-8B"), mixed=True)
    strategy = Strategy("zero3", "zero3")
    least = min_gpus(asked, strategy, 40 * GiB)
    assert (
        memory(asked, strategy, least, 40 * GiB).total <= 40 * GiB < memory(asked, strategy, least - 1, 40 * GiB).total
    )
    assert fewest_gpus(asked, 40 * GiB)[0] <= least
    assert min_gpus(asked, Strategy("whole", "ddp"), 40 * GiB) is None


def test_advice_follows_the_memory_of_a_gpu():
    small = ("teacher.model=Qwen/Qwen2.5-7B", f"student.model={SMALL}", "data.max_length=256")
    roomy, tight, tiny, never = (plan(recipe(*small), 1, gib) for gib in (32, 12, 4.5, 1.5))
    assert roomy.cheapest.strategy.teacher == "whole"
    assert tight.cheapest.strategy.teacher == "int8"
    assert tiny.cheapest is None
    assert "takes the fewest" in tiny.advice
    assert "per_device_train_batch_size" in never.advice


def test_deepspeeds_own_estimate_stands_beside_ours():
    asked = job(model_config("meta-llama/Llama-3.1-8B"), mixed=True)
    for student, each in (("zero2", 20), ("zero3", 18)):
        parts = memory(asked, Strategy("whole", student), 8)
        ours = (parts.student + parts.gradients + parts.optimizer) / GiB
        assert ours < deepspeed_estimate(asked, Strategy("whole", student), 8) < ours * each / 16 + 2.5
    assert deepspeed_estimate(asked, Strategy("whole", "ddp"), 8) is None


# The whole


def test_the_cost_of_a_run():
    found = plan(recipe(name="llama-70b-to-8b-zero3"), 8, 80)
    tokens = 10000 * 2 * 8 * 8 * 2048
    assert found.cost.tokens == tokens
    assert found.cost.rule == pytest.approx(tokens * (2 * 70553706496 + 6 * 8030261248))
    assert found.cost.flop == pytest.approx(tokens * (found.teacher.forward + found.student.training))
    assert found.cost.gpu_hours == pytest.approx(found.cost.flop / (0.4 * 989e12) / 3600)
    assert found.cost.share == pytest.approx(found.cost.flop / (6 * 8030261248 * 2e12))


def test_the_control_is_a_part_of_the_cost():
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
    assert any("The control trains the student as long again" in line for line in verdict(epochs))


def test_the_direct_control_of_a_chain_is_planned_beside_its_stages():
    chain = load_recipe("progressive", smoke=True)
    parts = recipes_by_stage(chain)
    assert [*parts] == [*(f"stage-{i}" for i in range(1, len(chain.stages) + 1)), "direct"]
    assert parts["direct"].train.max_steps == sum(parts[name].train.max_steps for name in parts if name != "direct")


def test_the_size_of_a_cache_of_hidden_states_includes_the_head():
    found = plan(recipe("student={from_teacher: {keep_layers: 16}}", f"teacher.model={SMALL}"), 1, 80)
    heads = {kind.kind: kind.head for kind in found.caches.kinds}
    assert heads == {"hidden": 49152 * 576 * 2, "sampled": 0, "top_k": 0}
    (table, line, _) = caches_table(found)
    assert line == "The output head takes 54 MiB of hidden."
    rows = [*table.columns[2].cells]
    tokens = found.caches.tokens or 10**9
    hidden = found.caches.kinds[0]
    assert rows[0] == f"{(hidden.bytes_per_token * tokens + heads['hidden']) / GiB:.3g} GiB"


def test_a_run_of_epochs_has_no_cost_that_can_be_known():
    cost = plan(recipe("train.max_steps=null", "train.num_train_epochs=1"), 1, 80).cost
    assert cost.tokens is cost.flop is cost.gpu_hours is cost.share is None
    assert cost.tokens_per_second > 0


def test_a_student_cut_from_its_teacher_has_fewer_blocks():
    found = plan(recipe("student={from_teacher: {keep_layers: 16}}", f"teacher.model={SMALL}"), 1, 80)
    block = ModelStats.of(model_config(SMALL)).block
    assert found.student.parameters == 134515008 - 14 * block


def test_all_that_is_wrong_is_told_at_once(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    wrong = recipe("student.model=meta-llama/Llama-3.1-8B-Instrct", "teacher.model=me/mine")
    with pytest.raises(DistillError) as caught:
        plan(wrong, 0, -1)
    for words in (
        "gpus is 0; it must be above 0",
        "gpu_memory is -1; it must be above 0",
        "did you mean 'meta-llama/Llama-3.1-8B-Instruct'",
        "'me/mine'",
        "no route to host",
        "a folder with the model's config.json",
    ):
        assert words in str(caught.value)


def test_a_sharded_recipe_on_one_gpu_is_told_what_to_choose():
    for name in ("llama-70b-to-8b-zero3", "qwen-72b-to-7b-fsdp2"):
        with pytest.raises(DistillError, match=r"needs at least 2 processes.*teacher\.quantization=nf4"):
            plan(recipe(name=name), 1, 80)
    offload = ("teacher.deepspeed=zero3-teacher-offload.json", "train.deepspeed=zero3-student-offload.json")
    assert plan(recipe(*offload, name="llama-70b-to-8b-zero3"), 1, 80).rows


def test_a_student_whose_own_base_teaches_it_needs_no_memory_for_a_teacher():
    found = plan(recipe("teacher={kind: adapter_base}", name="llama-70b-to-8b-nf4"), 2, 80)
    assert {row.strategy.teacher for row in found.rows} == {"own"}
    assert all(row.parts.teacher == 0 for row in found.rows)
    assert found.teacher.forward == found.student.forward


def test_a_past_of_a_cut_student_is_planned_as_the_cut_student_and_what_is_not_counted_is_said():
    small, whole = (plan(load_recipe("ema", [f"student.from_teacher={{keep_layers: {n}}}"]), 1, 80) for n in (10, 20))
    assert small.student.parameters == small.teacher.parameters < whole.student.parameters
    assert "Not counted: the average" in small.advice
