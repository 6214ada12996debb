"""Keys of batches whose teachers have other tokenizers."""

from hf_distill.core.aligned_inputs import aligned_keys, aligned_names, has_aligned_inputs


def batch(*keys: str) -> dict[str, str]:
    return dict.fromkeys(keys, "")


def test_the_keys_of_named_teachers_differ():
    assert aligned_keys().chunk_ids == "chunk_ids"
    assert aligned_keys("math").teacher_chunk_ids == "teacher_chunk_ids_math"
    inputs = batch("input_ids", *aligned_keys("math"))
    assert has_aligned_inputs(inputs, "math")
    assert not has_aligned_inputs(inputs)
    assert not has_aligned_inputs(inputs, "code")


def test_the_keys_of_a_batch_are_those_of_its_teachers():
    student = batch("input_ids", "labels", "attention_mask", "position_ids")
    assert aligned_names(student) == set()
    assert aligned_names({**student, **batch(*aligned_keys())}) == {*aligned_keys()}
    both = (*aligned_keys("a"), *aligned_keys("b_c"))
    assert aligned_names({**student, **batch(*both)}) == {*both}


def test_another_prompt_in_the_same_tokens_has_no_such_keys():
    inputs = batch("input_ids", "teacher_input_ids", "teacher_labels", "teacher_attention_mask")
    assert not has_aligned_inputs(inputs)
    assert not aligned_names(inputs)
