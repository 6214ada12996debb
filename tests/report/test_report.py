"""A report is one file that a browser renders correctly without a network."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.analysis import open_run
from hf_distill.cli import app
from hf_distill.filters import apply_filters
from hf_distill.filters.text_filters import Length
from hf_distill.generation.evaluation import evaluate_data_set
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.report import run_sections
from hf_distill.report.html import report
from hf_distill.report.samples import write_samples

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --hide-scrollbars --host-resolver-rules=MAP*~NOTFOUND"


@pytest.fixture(scope="module")
def completed_run(tmp_path_factory):
    """The folder of a run with two data sources and a control."""
    folder = tmp_path_factory.mktemp("report") / "run"
    run_recipe(load_recipe("task-mix", [f"train.output_dir={folder}"], smoke=True))
    return folder


@pytest.fixture
def folder(completed_run, tmp_path):
    shutil.copytree(completed_run, tmp_path / "run")
    return tmp_path / "run"


def browse(page, tmp_path, *options):
    """Open a page in headless Chromium and return the finished process."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    assert browser, f"none of {', '.join(BROWSERS)} is installed: `make test` installs chromium where it may"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [browser, *FLAGS.split(), profile, *options, f"file://{page}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)


def pixels(file):
    import matplotlib.image

    return matplotlib.image.imread(file)[..., :3]


def test_a_browser_shows_the_report_in_light_and_dark_mode(folder, tmp_path):
    page = report(open_run(folder)).path
    screenshots = {}
    for name, scheme in (("light", 1), ("dark", 0)):
        shot = tmp_path / f"{name}.png"
        browse(page, tmp_path, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}",
               "--window-size=1000,2400")  # fmt: skip
        screenshots[name] = pixels(shot)
        assert screenshots[name].shape[:2] == (2400, 1000)
        assert (
            len({tuple(p) for p in screenshots[name][::7, ::7].reshape(-1, 3).tolist()}) > 50
        )  # text and coloured lines
    assert screenshots["light"][0, 0].min() > 0.95
    assert screenshots["dark"][0, 0].max() < 0.2
    # Titles and axes of plots have the text color of the page, so that they are readable on both backgrounds.
    assert screenshots["light"].min() < 0.2
    assert screenshots["dark"].max() > 0.85


def test_a_browser_prints_the_report(folder, tmp_path):
    page = report(open_run(folder)).path
    browse(page, tmp_path, f"--print-to-pdf={tmp_path / 'report.pdf'}")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


class Links(HTMLParser):
    """Collects everything in a page that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.urls = []

    def handle_starttag(self, tag, attrs):
        self.urls += [
            (tag, k, v)
            for k, v in attrs
            if k in ("src", "href", "xlink:href", "data", "srcset") and not v.startswith("#")
        ]
        assert tag not in ("script", "link", "iframe", "img")


def test_the_report_fetches_nothing(folder):
    text = report(open_run(folder)).path.read_text()
    links = Links()
    links.feed(text)
    assert links.urls == []
    assert not re.search(r"@import|url\((?!#)", text)


def test_the_report_shows_the_results_of_the_run(folder):
    run = open_run(folder)
    written = report(run)
    text = written.path.read_text()
    models = run.results["models"]
    for name in ("before", "student"):
        assert f"{models[name]['perplexity']:.2f}" in text
        assert f"{models[name]['kl']:.4f}" in text
    assert {"losses", "closeness", "sources", "entropies"} <= set(written.figures)
    for file in written.figures.values():
        assert pixels(file).std() > 0.01
    for source in run.recipe.data.sources:
        assert source in text
    assert "keep_layers: 3" in text
    assert run.results["environment"]["torch"] in text


def test_the_report_states_what_the_student_was_pruned_to(folder):
    run = open_run(folder)
    (text,) = run_sections.results(run).text[1:]
    assert re.fullmatch(r"The student was pruned to 3 layers: 0\.1M of 0\.2M parameters\.", text), text


def test_the_report_shows_the_results_of_the_analysis_commands(folder):
    from dataclasses import asdict

    from hf_distill.analysis.evaluation import retention
    from hf_distill.analysis.lm_eval_tasks import EvalTask
    from hf_distill.analysis.successive_halving import Candidate, Rung
    from hf_distill.analysis.temperature_search import SearchResult
    from hf_distill.core.io import read_json, write_json

    for command, *options in (["inspect"], ["diagnose"], ["curve"], ["draft", "--prompts", "1", "--new-tokens", "2"]):
        result = CliRunner().invoke(app, [command, str(folder), *options])
        assert result.exit_code == 0, result.output
    task = EvalTask("mini_maths", "maths", "acc", True, lambda values: sum(values) / len(values), None)
    values = {"teacher": [1, 1, 1, 0], "student": [1, 0, 1, 0], "control": [0, 0, 1, 0]}
    earlier = {model: {"mini_maths": examples} for model, examples in values.items()}
    scores = retention(dict.fromkeys(values), None, [task], earlier_values=earlier)
    write_json(folder / "retention.json", asdict(scores))
    best = Candidate(2.0, 0.5, True, [Rung(4, 3.25, 0.5, 0.75)])
    without_kl = Candidate(1.0, 0.9, False, [Rung(4, 3.5, None, None)])
    search_folder = folder.with_name("run-temperature")
    search_folder.mkdir()
    search = SearchResult(str(search_folder), [best, without_kl], [best.name], "nll", 10, 2.5, ["distill.alpha=0.5"])
    write_json(search_folder / "temperature.json", asdict(search))
    write_samples(open_run(folder), 1, new_tokens=3)
    written = report(open_run(folder))
    assert written.missing == {}
    assert {"teacher_t", "teacher_entropy", "temperature", "curve", "retention"} <= set(written.figures)
    text = written.path.read_text()
    inspection, diagnosis = (read_json(folder / f"{name}.json") for name in ("inspection", "diagnosis"))
    assert f"the entropy is {inspection['entropy']:.2f} nats" in text
    for verdict in diagnosis["verdicts"]:
        assert verdict["name"] in text
    assert f"{diagnosis['agreement']['pearson']:.3f}" in text
    assert "0.750 ± " in text
    assert "3.2500" in text


def test_generated_text_is_not_rendered_as_markup(folder):
    samples = write_samples(open_run(folder), 2, new_tokens=5)
    assert [set(sample.written) for sample in samples] == [{"teacher", "before", "student", "control"}] * 2
    file = folder / "samples.json"
    file.write_text(file.read_text().replace('"teacher": "', '"teacher": "<script>alert(1)</script>', 1))
    text = report(open_run(folder)).path.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_the_initial_student_equals_the_kept_blocks_of_the_teacher(folder):
    """Its logits equal those of a teacher whose other blocks were removed by hand."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_distill.analysis.initial_student import student_before
    from hf_distill.runner.model_loading import resolve_model

    run = open_run(folder)
    teacher = AutoModelForCausalLM.from_pretrained(resolve_model(run.recipe.tokenizer_model)).eval()
    student = student_before(run, teacher)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = student(ids).logits
        blocks = [teacher.model.layers[i] for i in run.results["student"]["layers_kept"]]
        teacher.model.layers = torch.nn.ModuleList(blocks)
        teacher.config.num_hidden_layers = teacher.model.config.num_hidden_layers = len(blocks)
        assert torch.equal(logits, teacher(ids, use_cache=False).logits)


def test_missing_results_are_listed_with_the_command_that_writes_them(folder, tmp_path):
    written = report(open_run(folder))
    command = f"hf-distill inspect {folder}"
    assert written.missing["measures of the teacher's soft labels"] == command
    assert command in written.path.read_text()
    (folder / "metrics.jsonl").unlink()
    written.path.unlink()
    with pytest.raises(DistillError, match=r"metrics\.jsonl is missing: `hf-distill run RECIPE` writes it"):
        report(open_run(folder))
    assert not written.path.exists()
    with pytest.raises(DistillError, match=r"recipe\.yaml is missing, so .* is not the folder of a run"):
        open_run(tmp_path)
    with pytest.raises(DistillError, match="There is no folder"):
        open_run(tmp_path / "nowhere")


def test_the_command_writes_samples_and_report(folder):
    result = CliRunner().invoke(app, ["report", str(folder), "--samples", "1", "--new-tokens", "4"])
    assert result.exit_code == 0, result.output
    assert (folder / "report.html").is_file()
    assert (folder / "samples.json").is_file()
    assert "hf-distill inspect" in result.output


def test_external_text_in_a_report_is_not_rendered_as_markup(folder):
    """Samples, losses and the recipe contain HTML, and dollar signs that matplotlib could render as a formula."""
    attack = "<img src=x onerror=alert(1)></pre><script>alert(1)</script> $\\frac{1$ \"'"
    sample = {"prompt": attack, "reference": attack, "written": {attack: attack}}
    (folder / "samples.json").write_text(json.dumps({"samples": [sample]}))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    name = attack.replace("/", "")
    lines = [line | ({f"{name}_loss": 1.0} if "loss" in line else {}) for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (folder / "recipe.yaml").open("a") as recipe:
        recipe.write(f"# {attack}\n")
    page = report(open_run(folder)).path.read_text()
    tags = re.findall(r"<\s*(script|img|iframe|object)", page)
    assert tags == []
    assert page.count("&lt;script&gt;") >= 3


def test_title_and_legend_of_a_plot_are_not_rendered_as_markup():
    from xml.etree import ElementTree

    from hf_distill.report.figures import axes, legend, svg

    attack = '<script>alert("1")</script> & $\\frac{1$ \' '
    figure, (subplot,) = axes(attack, attack, attack)
    subplot.plot([1, 2], label=attack)
    legend(subplot)
    root = ElementTree.fromstring(svg(figure))
    assert not [element for element in root.iter() if "script" in element.tag]
    assert root.attrib["aria-label"] == attack.strip() or root.attrib["aria-label"] == attack


def test_the_report_of_a_run_on_generated_data_shows_what_the_filters_took(folder, tmp_path):
    page = report(open_run(folder)).path
    assert "Generated data" not in page.read_text()
    rows = [
        {"prompt": f"question {i}", "completion": "yes " * (i + 1), "reference": f"<b>{i}</b>", "tokens": i + 1}
        for i in range(6)
    ]
    result = apply_filters(rows, [Length(max_tokens=4)])
    evaluation = evaluate_data_set("org/teacher", rows, [*result.kept_rows(rows)], result.counts)
    (folder / "generated_data.json").write_text(json.dumps({"task": evaluation.as_json()}))
    written = report(open_run(folder))
    assert written.figures["generated_task"].is_file()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", written.path.read_text()))
    assert "data.task has 4 completions of 4 prompts, which org/teacher wrote: 66.7% of 6 completions passed" in text
    assert "length (max_tokens: 4) 6 2 0 4 66.7%" in text
    assert "distinct-1 0.048 0.100 " in text  # one word of 21, and of 10
    assert "teacher, removed by length yes yes yes yes yes" in text
    assert "continuation in the data &lt;b&gt;0&lt;/b&gt;" in text
    shot = tmp_path / "phone.png"
    browse(written.path, tmp_path, f"--screenshot={shot}", "--window-size=390,6000")
    assert pixels(shot)[:, -12:].min() > 0.9  # the page is not wider than a phone
    (folder / "generated_data.json").write_text(json.dumps({"task": {"model": 3}}))
    with pytest.raises(DistillError, match=r"generated_data.json is damaged"):
        report(open_run(folder))
