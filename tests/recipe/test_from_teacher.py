"""The sizes of a student that is pruned from its teacher: which go together, and what an error says."""

import pytest

from hf_distill import DistillError
from hf_distill.recipe.from_teacher import FromTeacher, parameter_count
from hf_distill.recipe.load import load_recipe, recipes_by_stage, validate
from hf_distill.recipe.stages import direct_values


@pytest.mark.parametrize(
    ("cut", "problem"),
    [
        ("{}", "give keep_layers or layers, a width"),
        ("{keep_layers: 2, layers: [0, 1]}", "give either keep_layers or layers"),
        ("{decoder_layers: [0], hidden_size: 8}", "hidden_size: the width of a model with an encoder and a decoder"),
        ("{keep_layers: 2, by: weight}", "by: weight selects what is kept of a width"),
        ("{keep_layers: 2, by: block_influence}", "'activation' or 'weight'"),
        ("{hidden_size: 0}", "greater than 0"),
        ("{hiden_size: 8}", "did you mean 'hidden_size'"),
        ("{target_parameters: 80M, hidden_size: 8}", "remove hidden_size, or target_parameters"),
        ("{target_parameters: eighty}", "write a number of parameters above 0, such as 80M"),
        ("{target_parameters: 0}", "write a number of parameters above 0, such as 80M"),
        ("{keep_layers: 2, calibration_rows: 0}", "greater than 0"),
        ("{layers: [0, 2, 0]}", "from_teacher.layers: give each layer to keep once; repeated: 0"),
        ("{layers: [0, -1]}", r"from_teacher.layers.1: .* greater than or equal to 0"),
        ("{decoder_layers: [1, 1]}", "from_teacher.decoder_layers: give each layer to keep once; repeated: 1"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(cut, problem):
    with pytest.raises(DistillError, match=problem):
        load_recipe("quickstart", [f"student={{from_teacher: {cut}}}"])


@pytest.mark.parametrize("name", ["text-classification", "image-classification"])
@pytest.mark.parametrize("cut", ["hidden_size: 8", "target_parameters: 1M"])
def test_widths_are_refused_for_other_tasks(name, cut):
    with pytest.raises(DistillError, match=f"from_teacher.{cut.partition(':')[0]} is for the task text-generation"):
        load_recipe(name, [f"student={{from_teacher: {{{cut}}}}}", "teacher.kind=frozen"])


@pytest.mark.parametrize(
    ("text", "count"), [("80M", 80_000_000), ("1.5b", 1_500_000_000), (" 7 K ", None), ("500k", 500_000), (123, 123)]
)
def test_numbers_of_parameters_are_read_with_their_unit(text, count):
    if count is None:
        with pytest.raises(ValueError, match="80M"):
            parameter_count(text)
    else:
        assert parameter_count(text) == count


def test_a_shape_is_described_in_words():
    cut = FromTeacher(keep_layers=20, hidden_size=448, intermediate_size=1024, num_attention_heads=6)
    assert cut.text == "20 layers, hidden size 448, intermediate size 1,024, 6 attention heads"
    assert FromTeacher(decoder_layers=[0, 1]).text == "2 decoder layers"
    assert FromTeacher(target_parameters="80M").text == "at most 80M parameters"


def test_the_resolved_recipe_is_valid_again():
    """It has the defaults of all keys, `by` too."""
    recipe = load_recipe("quickstart", ["student.from_teacher={keep_layers: 3}"])
    assert validate(recipe.model_dump(exclude_none=True)) == recipe


CHAIN = """
teacher: {model: some/model}
data: {task: {path: some/data}, eval: {holdout: 0.1}}
train: {output_dir: runs/x, max_steps: 4}
control: direct
stages:
"""


def chain(tmp_path, *students: str):
    file = tmp_path / "chain.yaml"
    file.write_text(CHAIN + "".join(f"  - student: {student}\n" for student in students))
    return load_recipe(str(file))


def test_the_control_of_a_chain_has_the_sizes_of_all_its_stages(tmp_path):
    recipe = chain(
        tmp_path,
        "{from_teacher: {layers: [0, 1, 3], hidden_size: 64}}",
        "{from_teacher: {hidden_size: 48, intermediate_size: 32}}",
    )
    cut = validate(direct_values(recipe)).student.from_teacher
    assert (cut.layers, cut.hidden_size, cut.intermediate_size) == ([0, 1, 3], 48, 32)
    recipe = chain(tmp_path, "{from_teacher: {layers: [0, 1, 3]}}", "{from_teacher: {keep_layers: 2}}")
    assert validate(direct_values(recipe)).student.from_teacher.model_dump(exclude_unset=True) == {"keep_layers": 2}


def test_each_stage_is_planned_with_the_sizes_of_the_stages_before_it(tmp_path):
    recipe = chain(
        tmp_path,
        "{from_teacher: {layers: [0, 3], hidden_size: 64}}",
        "{model: some/other}",
        "{from_teacher: {keep_layers: 5}}",
        "{from_teacher: {intermediate_size: 32}}",
    )
    cuts = [part.student.from_teacher for part in recipes_by_stage(recipe).values()]
    sizes = [cut and cut.model_dump(exclude_unset=True) for cut in cuts[:-1]]
    assert sizes[:2] == [{"layers": [0, 3], "hidden_size": 64}, None]
    assert sizes[2:] == [{"keep_layers": 5}, {"keep_layers": 5, "intermediate_size": 32}]


def test_indices_of_layers_of_a_later_teacher_are_refused_with_a_direct_control(tmp_path):
    with pytest.raises(DistillError, match=r"stages.2: student.from_teacher.layers: the first teacher has other layer"):
        chain(
            tmp_path,
            "{from_teacher: {keep_layers: 3}}",
            "{from_teacher: {layers: [0, 2]}}",
            "{from_teacher: {hidden_size: 8}}",
        )


def test_a_chain_may_begin_with_the_teacher_itself(tmp_path):
    """Teacher correction: the first stage adapts the teacher to the data on the hard labels."""
    recipe = chain(tmp_path, "{model: some/model}\n    distill: {alpha: 0}", "{from_teacher: {hidden_size: 8}}")
    assert recipe.stages[0].distill == {"alpha": 0}
    assert validate(direct_values(recipe)).student.from_teacher.hidden_size == 8


def test_a_search_is_refused_in_a_chain(tmp_path):
    with pytest.raises(DistillError, match=r"stages.1: student.from_teacher.target_parameters: "):
        chain(tmp_path, "{from_teacher: {target_parameters: 1M}}", "{from_teacher: {hidden_size: 8}}")
