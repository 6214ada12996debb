import subprocess
import sys
from importlib.resources import files

import pytest
import yaml

from hf_distill import DistillError
from hf_distill.recipe import list_recipes, load_recipe
from hf_distill.recipe.load import validate
from hf_distill.recipe.resolve import find_recipe

GOOD = """
student: {from_teacher: {keep_layers: 2}}
teacher: {model: some/model}
data: {task: {path: some/data}, eval: {holdout: 0.1}}
train: {output_dir: runs/x, learning_rate: 1e-4, eval_strategy: no}
"""


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def problems_of(change) -> list[str]:
    values = yaml.safe_load(GOOD)
    change(values)
    with pytest.raises(DistillError) as caught:
        validate(values)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_the_defaults_of_the_objective_do_not_change(good):
    recipe = load_recipe(str(good))
    assert (recipe.distill.temperature, recipe.distill.alpha, recipe.distill.divergence) == (2.0, 0.5, "forward_kl")


def test_floats_without_a_dot_and_bare_no_are_read_as_intended(good):
    """PyYAML reads 1e-4 as a string and a bare `no` as False."""
    recipe = load_recipe(str(good))
    assert recipe.train.learning_rate == 1e-4
    assert recipe.train.eval_strategy == "no"


def test_a_dict_is_read_as_a_file_of_the_same_values_and_is_not_changed(good, tmp_path):
    values = yaml.safe_load(GOOD)
    overrides = ["train.max_steps=3", "data.task.path=other/data"]
    assert load_recipe(values, overrides) == load_recipe(str(good), overrides)
    assert values == yaml.safe_load(GOOD)
    assert load_recipe({"extends": "quickstart", "control": None}).control is None
    with pytest.raises(DistillError, match=r"teacher\.modle: unknown key"):
        load_recipe({**values, "teacher": {"modle": "some/model"}})
    with pytest.raises(DistillError, match=r"The recipe requires hf-distill >=99"):
        load_recipe({**values, "requires": ">=99"})
    with pytest.raises(DistillError, match=r"train\.output_dir"):
        load_recipe({**values, "train": {"output_dir": tmp_path}})


@pytest.mark.parametrize("name", list_recipes())
def test_packaged_recipes_are_valid(name):
    assert load_recipe(name).train.output_dir
    assert load_recipe(name, smoke=True).tokenizer_model.startswith("smoke:")


@pytest.mark.parametrize("name", list_recipes())
def test_headers_of_packaged_recipes_state_command_hardware_time_and_result(name):
    header = [line for line in find_recipe(name).text.splitlines() if line.startswith("#")]
    for word in ("command:", "hardware:", "time:", "result:"):
        assert any(line.startswith(f"# {word}") for line in header)


def test_overrides_take_precedence_over_the_file_and_smoke_values(good):
    assert load_recipe(str(good), ["train.max_steps=7", "distill.alpha=1"]).distill.alpha == 1
    assert load_recipe(str(good), ["train.max_steps=7"], smoke=True).train.max_steps == 7
    assert load_recipe(str(good), smoke=True).train.max_steps == 4


def test_a_smoke_run_keeps_the_objective_and_the_kind_of_student(good):
    recipe = load_recipe(str(good), ["student={model: Qwen/Qwen2.5-0.5B}"], smoke=False)
    assert recipe.student.model == "Qwen/Qwen2.5-0.5B"
    small = load_recipe(str(good), ["distill.temperature=3"], smoke=True)
    assert small.distill.temperature == 3
    assert small.student.from_teacher.keep_layers == 3


def test_a_smoke_run_maps_layers_to_the_tiny_models():
    layers = [
        [loss.model_extra["layers"] for loss in load_recipe("features", smoke=smoke).losses] for smoke in (False, True)
    ]
    assert layers == [[[[2, 4], [9, 17], [16, 26], [19, 29]], "last:2"], ["stretch", "last:1"]]


def test_every_problem_is_reported_at_once_with_its_key():
    def spoil(values):
        values["student"] = {"modle": "x"}
        values["data"]["task"]["splt"] = "train"
        values["distill"] = {"alpha": 2, "temperature": 0, "divergence": "forward_lk"}
        values["losses"] = [{"name": "foo"}, {"name": "forward_kl", "temp": 3}]
        values["losses"] += [{"name": "hidden_mse", "layers": "strech"}]
        values["projectors"] = {"knd": "mlp"}
        values["train"] = {"lerning_rate": 1, "max_steps": "many", "save_strategy": "often"}
        values["contrl"] = "sft"

    problems = problems_of(spoil)
    for start in (
        "student.modle: unknown key; did you mean 'model'?",
        "data.task.splt: unknown key; did you mean 'split'?",
        "distill.alpha: Input should be less than or equal to 1 (given: 2)",
        "distill.temperature: Input should be greater than 0 (given: 0)",
        "distill.divergence: unknown loss 'forward_lk'; did you mean 'forward_kl'?",
        "losses.0: unknown loss 'foo'",
        "losses.1: loss 'forward_kl' has no option 'temp'; its options are: temperature",
        "losses.2: layers is 'strech'; it must be kept, uniform, stretch, last:N, learned, or [student, teacher] pairs",
        "projectors.knd: unknown key; did you mean 'kind'?",
        "train.output_dir: required key is missing",
        "train.max_steps: Input should be a valid integer",
        "train.save_strategy: Input should be 'no', 'steps', 'epoch' or 'best' (given: 'often')",
        "train.lerning_rate: unknown key; did you mean 'learning_rate'?",
        "contrl: unknown key; did you mean 'control'?",
    ):
        assert any(problem.startswith(start) for problem in problems), (start, problems)


def test_keys_with_the_name_of_a_type_are_reported_where_they_are():
    def spoil(values):
        values["float"] = 1
        values["train"]["str"] = 1
        values["data"]["int"] = {"path": 3}

    problems = problems_of(spoil)
    for start in ("float: unknown key", "train.str: unknown key", "data.int.path: "):
        assert any(problem.startswith(start) for problem in problems), (start, problems)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda values: values.pop("teacher"), "recipe: give either teacher, or teachers"),
        (lambda values: values["student"].update(model="x"), "recipe: student: give either model or from_teacher"),
        (
            lambda values: values["student"]["from_teacher"].update(layers=[1]),
            "student.from_teacher: give either keep_layers",
        ),
        (lambda values: values["data"]["eval"].update(path="x"), "data.eval: give either path or holdout"),
        (
            lambda values: values.update(distill={"divergence": {"name": "js", "bta": 1}}),
            "distill.divergence: loss 'js' has no",
        ),
        (lambda values: values.update(distill={"divergence": {"beta": 1}}), "distill.divergence: unknown loss"),
        (lambda values: values["teacher"].update(kind="frozn"), "teacher.kind: Input should be 'frozen'"),
        (
            lambda values: values["teacher"].update(kind="mutual", decay=0.9),
            "teacher: kind mutual does not accept decay; it accepts model",
        ),
        (lambda values: values.update(teacher={"kind": "online"}), "teacher: kind online needs a model"),
        (
            lambda values: values.update(teacher={"kind": "ema", "decay": 1.0}),
            "teacher.decay: must be at least 0 and below 1",
        ),
        (
            lambda values: values.update(teacher={"kind": "ema"}),
            "recipe: student: set student.model",
        ),
        (lambda values: values.update(teacher={"kind": "snapshot"}), "teacher: kind snapshot needs interval_steps"),
        (lambda values: values.update(teacher={"kind": "multi_view"}), "teacher: kind multi_view needs a view"),
        (
            lambda values: values.update(teacher={"kind": "multi_view", "view": {}}),
            "teacher.view: the view does not change the batch",
        ),
        (lambda values: values.update(export="ema"), "recipe: export ema needs teacher.kind ema; the kind is frozen"),
    ],
)
def test_contradictions_are_reported(change, problem):
    assert any(p.startswith(problem) for p in problems_of(change))


@pytest.mark.parametrize(
    ("reference", "overrides", "message"),
    [
        ("nowhere.yaml", [], "There is no recipe file 'nowhere.yaml'"),
        ("quickstrat", [], "did you mean 'quickstart'"),
        ("quickstart", ["train.max_steps"], "Write key=value"),
        ("quickstart", ["control.x.y=1"], "'control' is not a mapping"),
        ("quickstart", ["train.max_steps=[1"], "is not YAML"),
    ],
)
def test_invalid_references_and_overrides_are_reported(reference, overrides, message):
    with pytest.raises(DistillError, match=message):
        load_recipe(reference, overrides)


def test_a_file_that_is_not_a_mapping_is_reported(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(DistillError, match="is not a mapping"):
        load_recipe(str(path))


def test_validation_imports_no_torch():
    code = "import sys, hf_distill.recipe as r; r.load_recipe('quickstart'); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_packaged_schema_is_up_to_date():
    import json

    from hf_distill.recipe.generate_schema import schema

    packaged = files("hf_distill.recipe").joinpath("schema.json").read_text()
    assert json.loads(packaged) == json.loads(json.dumps(schema())), "run: python -m hf_distill.recipe.generate_schema"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"student": {"model": "a/b", "quantization": "nf4"}}, "student: a quantized student cannot be trained"),
        ({"teacher": {"model": "a/b", "quantization": "nf3"}}, "teacher.quantization: Input should be 'nf4' or 'int8'"),
        ({"teacher": {"model": "a/b", "quantization": "nf4", "deepspeed": "zero3-teacher.json"}}, "exclude each other"),
        ({"teacher": {"model": "a/b", "device_map": "auto", "fsdp": True}}, "over the devices of one process"),
        ({"teacher": {"model": "a/b", "deepspeed": "zero3-techer.json"}}, "teacher.deepspeed: there is no file"),
        ({"teacher": {"model": "a/b", "deepspeed": {"optimizer": {}, "zero_optimization": {"stage": 3}}}}, "remove it"),
        ({"teacher": {"model": "a/b", "deepspeed": "zero2-student.json"}}, "teacher.deepspeed: zero_opt"),
        ({"teacher": {"kind": "adapter_base"}}, "disables the student's adapters, and the student has none: add "
        "student.lora"),
        ({"teacher": {"kind": "adapter_base", "model": "a/b"}}, "kind adapter_base does not accept model; it "
        "accepts prompt"),
        ({"teacher": {"kind": "adapter_base", "fsdp": True}}, "adapter_base does not accept fsdp; it accepts prompt"),
        ({"teacher": {"dtype": "auto"}}, "teacher: kind frozen needs a model"),
        ({"export": "merged"}, "export merged needs a student with adapters: add student.lora"),
        ({"train": {"output_dir": "x", "deepspeed": "none.json"}}, "train.deepspeed: there is no file 'none.json'"),
    ],
)  # fmt: skip
def test_placement_options_are_validated_with_the_recipe(tmp_path, change, problem):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(GOOD) | change))
    with pytest.raises(DistillError, match=problem):
        load_recipe(str(path))


def test_a_relative_deepspeed_file_becomes_part_of_the_recipe(tmp_path):
    (tmp_path / "local.json").write_text('{"zero_optimization": {"stage": 3}}')
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(GOOD) | {"teacher": {"model": "a/b", "deepspeed": "local.json"}}))
    recipe = load_recipe(str(path), ["train.deepspeed=zero2-student.json"])
    assert recipe.teacher.deepspeed == {"zero_optimization": {"stage": 3}}
    assert recipe.train.deepspeed["zero_optimization"]["stage"] == 2
