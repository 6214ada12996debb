"""Plans of students that are pruned from their teacher, from configs alone."""

import pytest
from transformers import LlamaConfig, Qwen3MoeConfig

from hf_distill import DistillError
from hf_distill.planning.decoding import Decoding
from hf_distill.planning.model_stats import ModelStats
from hf_distill.planning.planner import plan
from hf_distill.planning.pruned import parameters_of, student_config
from hf_distill.planning.render import verdict
from hf_distill.recipe import load_recipe
from hf_distill.recipe.from_teacher import FromTeacher

TEACHER = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def test_the_parameters_of_a_pruned_student_are_those_of_its_sizes():
    """V H + L (2 heads d H + 2 groups d H + 3 I H + 2 H) + H, with the teacher's head dimension d."""
    cut = FromTeacher(keep_layers=3, hidden_size=48, intermediate_size=80, num_attention_heads=2)
    config = student_config(cut, TEACHER)
    assert (config.head_dim, config.num_key_value_heads) == (16, 1)
    by_hand = 100 * 48 + 3 * (2 * 2 * 16 * 48 + 2 * 16 * 48 + 3 * 80 * 48 + 2 * 48) + 48
    assert ModelStats.of(config).parameters == by_hand
    assert parameters_of(cut, TEACHER) == by_hand
    assert TEACHER.hidden_size == 64  # the teacher's config is not changed


def test_experts_are_counted():
    teacher = Qwen3MoeConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    smaller = student_config(FromTeacher(num_experts=4), teacher)
    lost = ModelStats.of(teacher).parameters - ModelStats.of(smaller).parameters
    assert lost == 2 * 4 * (3 * 32 * 16 + 32)  # of each layer: four experts, and their rows of the router


@pytest.mark.parametrize(
    ("cut", "problem"),
    [
        ({"hidden_size": 96}, "hidden_size is 96: give a number from 1 to 64"),
        ({"num_attention_heads": 3}, "num_attention_heads is 3: .* Give a multiple of 2, up to 4"),
        ({"num_experts": 2}, "num_experts of LlamaForCausalLM cannot be pruned"),
        (
            {"keep_layers": 5, "hidden_size": 48},
            "keep_layers is 5; the teacher has 4 layers: give a number from 1 to 4",
        ),
        ({"layers": [0, 4]}, r"layers is \[0, 4\]: give each layer to keep once, from 0 to 3"),
        ({"hidden_size": 96, "intermediate_size": 999}, "hidden_size is 96: .* intermediate_size is 999"),
        ({"target_parameters": "1M"}, "`hf-distill prune` searches them"),
    ],
)
def test_sizes_that_the_student_cannot_have_are_named(cut, problem):
    with pytest.raises(DistillError, match=problem):
        student_config(FromTeacher(**cut), TEACHER)


def test_the_speed_of_decoding_follows_from_the_bytes_that_a_token_reads():
    teacher = Decoding.of(ModelStats.of(TEACHER))
    blocks = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert teacher == Decoding(weights=2 * (blocks + 100 * 64), kv_cache=2 * 2 * 4 * 2 * 16)
    student = Decoding.of(ModelStats.of(student_config(FromTeacher(keep_layers=2), TEACHER)))
    assert student.kv_cache == teacher.kv_cache / 2
    assert student.speed_up(teacher, 0) == teacher.weights / student.weights
    assert student.speed_up(teacher, 10**9) == pytest.approx(2, rel=1e-3)


def test_a_plan_states_parameters_and_decoding_of_a_pruned_shape():
    cut = "student.from_teacher={keep_layers: 24, hidden_size: 480, intermediate_size: 1152, num_attention_heads: 6}"
    planned = plan(load_recipe("quickstart", [cut, "teacher.model=HuggingFaceTB/SmolLM2-135M-Instruct"]), 1, 80)
    assert (
        planned.student.parameters
        == 49152 * 480 + 24 * (2 * 6 * 64 * 480 + 2 * 2 * 64 * 480 + 3 * 1152 * 480 + 2 * 480) + 480
    )
    (line,) = [line for line in verdict(planned) if line.startswith("Decoding: ")]
    assert "the student generates" in line
