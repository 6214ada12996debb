"""Keys of batches whose teachers have other tokenizers."""

from hf_distill.core.aligned_inputs import aligned_keys, has_aligned_inputs, without_aligned_inputs


def batch(*keys: str) -> dict[str, str]:
    return dict.fromkeys(keys, "")


def test_the_keys_of_named_teachers_differ():
    assert aligned_keys().chunk_ids == "chunk_ids"
    assert aligned_keys("math").teacher_chunk_ids == "teacher_chunk_ids_math"
    inputs = batch("input_ids", *aligned_keys("math"))
    assert has_aligned_inputs(inputs, "math")
    assert not has_aligned_inputs(inputs)
    assert not has_aligned_inputs(inputs, "code")


def test_removal_leaves_the_student_batch():
    student = batch("input_ids", "labels", "attention_mask", "position_ids")
    assert without_aligned_inputs({**student, **batch(*aligned_keys())}) == student
    assert without_aligned_inputs({**student, **batch(*aligned_keys("a"), *aligned_keys("b_c"))}) == student


def test_another_prompt_in_the_same_tokens_stays():
    inputs = batch("input_ids", "teacher_input_ids", "teacher_labels", "teacher_attention_mask")
    assert not has_aligned_inputs(inputs)
    assert without_aligned_inputs(inputs) == inputs
