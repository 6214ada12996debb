"""A search for a shape compares students of equal size, and `hf-distill prune` writes the chosen one."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen3MoeConfig
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.analysis.shape_candidates import shape_candidates
from hf_distill.analysis.shape_search import find_shape
from hf_distill.cli import app
from hf_distill.planning.model_stats import ModelStats
from hf_distill.planning.pruned import student_config
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.recipe.from_teacher import FromTeacher
from hf_distill.runner.prune import prune_recipe

TEACHER = LlamaConfig(
    vocab_size=200,
    hidden_size=288,
    intermediate_size=512,
    num_hidden_layers=8,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
EXPERTS = Qwen3MoeConfig(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
)


@pytest.mark.parametrize(("teacher", "share"), [(TEACHER, 0.6), (EXPERTS, 0.6)])
def test_all_shapes_fit_and_use_most_of_the_parameters(teacher, share):
    budget = int(share * ModelStats.of(teacher).parameters)
    candidates = shape_candidates(teacher, budget)
    names = [candidate.name for candidate in candidates]
    assert {"depth", "mlp", "width", "depth-mlp"} <= {*names}
    assert ("experts" in names) == (teacher is EXPERTS)
    for candidate in candidates:
        exact = ModelStats.of(student_config(FromTeacher(**candidate.sizes), teacher)).parameters
        assert exact == candidate.parameters <= budget
        assert candidate.parameters > 0.75 * budget, candidate
    assert len({json.dumps(candidate.sizes) for candidate in candidates}) == len(candidates)


def test_shapes_of_a_quantized_student_have_widths_that_its_groups_divide():
    candidates = shape_candidates(TEACHER, int(0.6 * ModelStats.of(TEACHER).parameters), divisor=32)
    assert {"mlp", "width-heads"} <= {candidate.name for candidate in candidates}
    for candidate in candidates:
        config = student_config(FromTeacher(**candidate.sizes), TEACHER)
        widths = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
        assert not any(width % 32 for width in widths), (candidate, widths)


def test_rounding_never_makes_a_shape_larger_than_its_teacher():
    teacher = LlamaConfig(**TEACHER.to_dict() | {"intermediate_size": 509})  # nearest multiple of 16: 512
    budget = int(0.97 * ModelStats.of(teacher).parameters)
    assert "mlp" in [candidate.name for candidate in shape_candidates(teacher, budget)]
    teacher = Qwen3MoeConfig(**EXPERTS.to_dict() | {"num_experts_per_tok": 4})  # a quarter are 2 experts
    budget = int(0.7 * ModelStats.of(teacher).parameters)
    assert "experts" in [candidate.name for candidate in shape_candidates(teacher, budget)]


def test_a_teacher_whose_config_has_no_number_of_neurons_is_cut_in_depth():
    teacher = GPT2Config(vocab_size=100, n_embd=32, n_head=2, n_layer=4)
    candidates = shape_candidates(teacher, int(0.6 * ModelStats.of(teacher).parameters))
    assert [candidate.sizes for candidate in candidates] == [{"keep_layers": 1}]


@pytest.mark.parametrize(
    ("budget", "problem"),
    [(10**9, "give a smaller number"), (1000, "no shape of this teacher.*set sizes and vocab in place")],
)
def test_a_budget_that_no_student_has_is_an_error(budget, problem):
    with pytest.raises(DistillError, match=problem):
        shape_candidates(TEACHER, budget)


def recipe(folder, cut, *overrides, steps=4):
    values = [f"train.output_dir={folder}/run", f"train.max_steps={steps}", f"student={{from_teacher: {cut}}}"]
    return load_recipe("quickstart", [*values, *overrides], smoke=True)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """A search that was interrupted, with its stages before and after."""
    folder = tmp_path_factory.mktemp("search")
    searched, stages = recipe(folder, "{target_parameters: 110K}", steps=16), []

    def on_stage(text):
        stages.append(text)
        if "to step 4" in text:
            raise Killed

    with pytest.raises(Killed):
        find_shape(searched, str(folder / "s"), on_stage=on_stage)
    again = []
    return find_shape(searched, str(folder / "s"), on_stage=again.append), stages, again


def test_all_shapes_are_measured_before_training_and_the_better_ones_continue(search):
    result, _, _ = search
    steps = sorted([rung.step for rung in c.rungs] for c in result.candidates)
    assert steps == [[0, 2], [0, 2], [0, 2, 4], [0, 2, 4], [0, 2, 4, 8], [0, 2, 4, 8]]
    assert result.steps == 6 * 2 + 4 * 2 + 2 * 4
    best, second = result.candidates[:2]
    assert best.rungs[-1].nll <= second.rungs[-1].nll
    assert result.from_teacher.model_dump(exclude_unset=True).items() >= best.sizes.items()


def test_an_interrupted_search_measures_nothing_twice(search):
    _, stages, again = search
    assert len([text for text in stages if "before training" in text]) == 6
    assert not [text for text in again if "before training" in text or "to step 2" in text]


def test_the_file_of_a_search_records_all_shapes_and_no_checkpoints_are_left(search):
    result, _, _ = search
    folder = Path(result.folder)
    assert {f.name for f in folder.iterdir()} == {"shapes.json", "metrics.jsonl", ".lock"}
    written = json.loads((folder / "shapes.json").read_text())
    assert [c["name"] for c in written["candidates"]] == [c.name for c in result.candidates]
    assert FromTeacher(**written["from_teacher"]) == result.from_teacher


@pytest.mark.parametrize(
    ("overrides", "options", "problem"),
    [
        ([], {"steps": 32}, "lower --steps"),
        ([], {"steps": 1}, "1 steps are too few .* Set --steps to"),
        (["student.from_teacher={keep_layers: 2}"], {}, "no target_parameters"),
        (["teacher={kind: online, model: 'smoke:llama/teacher'}"], {}, "a teacher of kind online changes"),
        ([], {"by": "loss"}, "possible values are nll and kl"),
    ],
)
def test_a_recipe_that_cannot_be_searched_is_refused(tmp_path, overrides, options, problem):
    with pytest.raises(DistillError, match=problem):
        find_shape(recipe(tmp_path, "{target_parameters: 110K}", *overrides, steps=16), str(tmp_path / "s"), **options)
    assert not any(tmp_path.iterdir())


def test_the_pruned_student_is_that_of_the_run(tmp_path):
    cut = "{keep_layers: 3, hidden_size: 48}"
    model = prune_recipe(recipe(tmp_path, cut), str(tmp_path / "deep" / "x"))
    run = run_recipe(recipe(tmp_path, cut, "control=null"))
    for key in ("kl", "perplexity", "agreement"):
        assert model.metrics[key] == pytest.approx(run.models["before"][key], rel=1e-6)
    student = AutoModelForCausalLM.from_pretrained(model.folder)
    assert student.num_parameters() == model.student["parameters"]
    assert AutoTokenizer.from_pretrained(model.folder).eos_token == "<|end|>"
    ours = json.loads((model.folder / "pruning.json").read_text())
    assert ours["kept"] == json.loads((tmp_path / "run" / "pruning.json").read_text())["kept"]
    assert ours["metrics"] == model.metrics
    assert not [*model.folder.parent.glob("*.half")]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["student={model: 'smoke:llama/student'}"], "is not pruned from its teacher"),
        (["student.from_teacher={hidden_size: 100}"], "give a number from 1 to 64"),
        (["teacher={kind: online, model: 'smoke:llama/teacher'}", "control=null"], "teacher that does not change"),
    ],
)
def test_a_student_that_cannot_be_pruned_leaves_nothing_behind(tmp_path, overrides, problem):
    with pytest.raises(DistillError, match=problem):
        prune_recipe(recipe(tmp_path, "{keep_layers: 2}", *overrides), str(tmp_path / "x"))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("x")]


def test_an_existing_folder_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(DistillError, match="x exists: choose another folder"):
        prune_recipe(recipe(tmp_path, "{keep_layers: 2}"), str(tmp_path / "x"))


def test_the_command_prints_the_student_and_how_to_train_it(tmp_path):
    overrides = [f"train.output_dir={tmp_path / 'run'}", "student={from_teacher: {hidden_size: 48}}"]
    arguments = ["prune", "quickstart", "-o", str(tmp_path / "x"), *overrides, "--smoke"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "Metrics on held-out rows, before training" in result.output
    assert "Train it: hf-distill run quickstart" in result.output
    arguments[3] = str(tmp_path / "y")
    printed = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert printed["student"]["widths"] == {"hidden_size": 48}
    assert printed["metrics"]["perplexity"] > 1


def test_a_search_with_rounded_weights_says_so_and_prints_one_command(tmp_path):
    cut = ["student={from_teacher: {target_parameters: 110K}, quantize: {scheme: int4_weight_only, group_size: 16}}"]
    cut += ["student.from_teacher.calibration_rows=4", f"train.output_dir={tmp_path / 'run'}"]
    arguments = ["prune", "quickstart", "-o", str(tmp_path / "x"), *cut, "--smoke", "--steps", "16"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "student, quantized" in result.output
    (command,) = [line for line in result.output.splitlines() if line.startswith("Train it: ")]
    assert command.count("student.from_teacher") == 1
    assert "calibration_rows: 4" in command


def test_options_of_a_search_are_refused_without_a_search(tmp_path):
    sizes = "student={from_teacher: {keep_layers: 2}}"
    arguments = ["prune", "quickstart", "-o", str(tmp_path / "x"), sizes, "--smoke", "--eta", "3", "--by", "kl"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, DistillError)
    assert "--by, --eta would have no effect" in str(result.exception)
    assert not (tmp_path / "x").exists()
