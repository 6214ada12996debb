"""Publishing is atomic, uploads nothing twice, checks licenses and replaces nothing that it did not write."""

import json
import re
import shutil
import struct
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import Fault, Hub
from huggingface_hub import ModelCard, constants, snapshot_download
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_distill import DistillError, publishing
from hf_distill.analysis import open_run
from hf_distill.cli import app
from hf_distill.models.sidecar import SIDECAR
from hf_distill.publishing import check_ready, dry_run
from hf_distill.recipe import load_recipe, run_recipe

publish = partial(publishing.publish, allow_smoke=True)  # the fixture's run is a smoke run
CARD = "---\nlicense: {license}\n---\n# Teacher\n\n{text}\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run with a control, plots and a report."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    recipe = load_recipe("quickstart", [f"train.output_dir={folder}", "train.max_steps=2"], smoke=True)
    run_recipe(recipe)
    (folder / "figures").mkdir()
    (folder / "figures" / "losses.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 0))
    (folder / "report.html").write_text("<p>report</p>")
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return open_run(tmp_path / "run")


def files_of(hub: Hub, name: str = "tester/quick") -> set[str]:
    repo = hub.repos["models", name]
    return set(repo.commits[repo.at("main")])


def commits_of(hub: Hub, name: str = "tester/quick") -> int:
    repo = hub.repos.get(("models", name))
    return len(repo.commits) if repo else 0


def with_hub_teacher(run, hub: Hub, license: str, text: str = "", student: str | None = None):
    """The same run, as if its teacher (and its student's base model) had been models of the Hub."""
    hub.put("models", "org/teacher", {"README.md": CARD.format(license=license, text=text).encode()})
    values = yaml.safe_load(run.path("recipe.yaml").read_text())
    values["teacher"]["model"] = "org/teacher"
    if student:
        hub.put("models", "org/base", {"README.md": CARD.format(license=student, text="").encode()})
        values["student"] = {"model": "org/base"}
    run.path("recipe.yaml").write_text(yaml.safe_dump(values))
    return open_run(run.folder)


def test_published_weights_are_bit_equal_after_a_download(run, hub):
    published = publish(run, "quick")
    local, downloaded = (AutoModelForCausalLM.from_pretrained(name) for name in (run.path("student"), "tester/quick"))
    for (name, a), (_, b) in zip(local.state_dict().items(), downloaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    text = "What is published is what was trained."
    assert AutoTokenizer.from_pretrained("tester/quick")(text) == AutoTokenizer.from_pretrained(run.path("student"))(
        text
    )
    assert published.commit == hub.repos["models", "tester/quick"].at("main")


def test_only_the_student_and_the_measurements_are_published(run, hub):
    save_file({"w": torch.zeros(1)}, run.path("student") / "sidecar.safetensors")
    (run.folder / "peer").mkdir()
    published = publish(run, "tester/quick", include=["report"])
    assert files_of(hub) - {".gitattributes"} == set(published.files)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "distillation.json"} <= set(
        published.files
    )
    assert {"figures/losses.png", "report.html", "generation_config.json"} <= set(published.files)
    assert published.left_out == ["sidecar.safetensors", "training_args.bin"]


def test_weights_with_a_projector_are_refused(run, hub):
    file = run.path("student") / "model.safetensors"
    save_file(load_file(file) | {f"{SIDECAR}.parts.x.weight": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(DistillError, match="not part of it"):
        publish(run, "tester/quick")
    assert not hub.repos


@pytest.mark.parametrize("number", range(20))
def test_an_interrupted_push_leaves_the_repository_unchanged(run, hub, number, monkeypatch):
    """Each kind of request of a push fails with each kind of answer, for a repository that contains a model."""
    publish(run, "tester/quick")
    before, commits = files_of(hub), commits_of(hub)
    student = run.path("student") / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(student).items()}, student, {"format": "pt"})
    monkeypatch.setattr(
        "huggingface_hub.utils._http.time.sleep", lambda seconds: None
    )  # between the retries of huggingface_hub
    requests = ("POST .*preupload", "POST .*lfs/objects/batch", "PUT /lfs/", "POST .*/commit/", "GET .*api/models")
    answers = ({"status": 403}, {"status": 409}, {"status": 500}, {"cut": True})
    hub.faults.append(Fault(match=requests[number % 5], times=99, **answers[number // 5]))
    with pytest.raises(DistillError):
        publish(run, "tester/quick")
    assert (files_of(hub), commits_of(hub)) == (before, commits)
    hub.faults.clear()
    publish(run, "tester/quick")
    assert commits_of(hub) == commits + 1
    assert len(hub.uploaded) == len(set(hub.uploaded)), "a file was uploaded twice"


def test_a_second_push_of_the_same_student_changes_nothing(run, hub):
    first = publish(run, "tester/quick")
    uploads = len(hub.uploaded)
    assert publish(run, "tester/quick").commit == first.commit
    assert len(hub.uploaded) == uploads


def test_files_of_an_earlier_student_are_deleted(run, hub):
    publish(run, "tester/quick", include=["report"])
    shutil.rmtree(run.folder / "figures")
    publish(run, "tester/quick")
    assert not {"figures/losses.png", "report.html"} & files_of(hub)


def test_the_card_is_valid_and_has_the_measured_values(run, hub):
    publish(run, "tester/quick")
    card = ModelCard.load("tester/quick")
    card.validate()
    assert {"distillation", "hf-distill"} <= set(card.data.tags)
    assert (card.data.license, card.data.pipeline_tag, card.data.library_name) == (
        "apache-2.0", "text-generation", "transformers",
    )  # fmt: skip
    student = run.results["models"]["student"]
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics["perplexity"] == pytest.approx(student["perplexity"], rel=1e-5)
    assert metrics["kl"] == pytest.approx(student["kl"], abs=1e-5)
    assert f"{run.results['models']['control']['perplexity']:.2f}" in card.text
    assert "retention RUN" in card.text.split("## Not measured")[1]
    data = json.loads(Path(snapshot_download("tester/quick"), "distillation.json").read_text())
    assert data["held_out"]["student"]["kl"] == student["kl"]
    assert data["data"]["train_fingerprint"] == run.results["data"]["train_fingerprint"]
    assert data["training"]["tokens"] == 2 * 2 * 64
    assert data["training"]["flop_student"] > 0


def test_the_recipe_in_the_card_is_the_recipe_that_ran(run, hub, tmp_path):
    publish(run, "tester/quick")
    (text,) = re.findall(r"```yaml\n(.*?)```", ModelCard.load("tester/quick").text, flags=re.S)
    (tmp_path / "card.yaml").write_text(text)
    in_card, ran = load_recipe(str(tmp_path / "card.yaml")).model_dump(), run.recipe.model_dump()
    assert in_card.pop("train")["output_dir"] == "runs/run"
    assert ran.pop("train")
    assert in_card == ran


def test_the_code_snippet_of_the_card_runs(run, hub, capsys):
    publish(run, "tester/quick")
    card = ModelCard.load("tester/quick")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.S)
    exec(code, {})
    assert len(capsys.readouterr().out) > 5


def test_the_widget_and_the_snippet_use_the_same_prompt(run, hub):
    sample = {"prompt": "The with statement wraps", "reference": "", "written": {}}
    (run.folder / "samples.json").write_text(json.dumps({"samples": [sample]}))
    publish(run, "tester/quick")
    card = ModelCard.load("tester/quick")
    assert card.data.widget == [{"text": sample["prompt"]}]
    assert json.dumps(sample["prompt"]) in card.text


@pytest.mark.parametrize(
    ("license", "student", "text", "why"),
    [
        ("apache-2.0", None, "You may not use this model or its outputs to train other models.", "its card says"),
        ("llama3", "apache-2.0", "", "forbids using its outputs"),
        ("llama3.1", "apache-2.0", "", "begins with"),
        ("cc-by-nd-4.0", None, "", "no derivatives"),
        ("other", None, "", "custom license"),
        ("gemma", "cc-by-nc-4.0", "", "different licenses"),
    ],
)
def test_a_license_conflict_must_be_accepted(run, hub, license, student, text, why):
    run = with_hub_teacher(run, hub, license, text, student)
    with pytest.raises(DistillError, match=why):
        publish(run, "tester/quick")
    assert ("models", "tester/quick") not in hub.repos
    publish(run, "tester/quick", accept_license=True)
    assert why in ModelCard.load("tester/quick").text


def test_the_license_and_the_base_model_are_inherited(run, hub):
    run = with_hub_teacher(run, hub, "gemma")
    publish(run, "tester/quick")
    card = ModelCard.load("tester/quick")
    assert (card.data.license, card.data.base_model, card.data.base_model_relation) == (
        "gemma", ["org/teacher"], "finetune",
    )  # fmt: skip


def test_another_license_than_the_teacher_requires_is_a_conflict(run, hub):
    with pytest.raises(DistillError, match="mit is requested, but teacher requires gemma"):
        publish(with_hub_teacher(run, hub, "gemma"), "tester/quick", license="mit")


WEIGHTS = [
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "unet/diffusion.fp16.safetensors",
    "Small-Q4_K_M.gguf",
    "onnx/decoder.onnx",
    "flax_model.msgpack",
    "tf_model.h5",
    "model.pt",
    "consolidated.00.pth",
    "adapter_model.bin",
    "adapter_config.json",
]


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_publish_did_not_write_are_not_replaced_in_any_format(run, hub, name):
    hub.put("models", "tester/quick", {name: b"theirs", "notes.txt": b"mine"})
    with pytest.raises(DistillError, match="--replace") as caught:
        publish(run, "tester/quick")
    assert name in str(caught.value)
    assert files_of(hub) == {name, "notes.txt"}
    published = publish(run, "tester/quick", replace=True)
    assert published.deleted == [n for n in (name,) if n not in published.files]
    assert files_of(hub) == {*published.files, "notes.txt"}


@pytest.mark.parametrize(
    "files",
    [
        {"README.md": b"# My model\n"},
        {"README.md": b"---\nlicense: mit\n---\n"},
        {"README.md": b"# x", "distillation.json": b"{"},
        {"README.md": b"# x", "distillation.json": b'{"files": ["README.md"]}'},
        {"config.json": b"{}"},
    ],
    ids=["card", "metadata alone", "damaged json", "json of another form", "config"],
)
def test_a_card_and_a_config_that_publish_did_not_write_are_not_replaced(run, hub, files):
    hub.put("models", "tester/quick", files)
    with pytest.raises(DistillError, match="did not publish"):
        publish(run, "tester/quick")
    assert files_of(hub) == {*files}
    publish(run, "tester/quick", replace=True)


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "added.gguf"])
def test_files_that_were_edited_or_added_after_publishing_are_not_replaced(run, hub, name):
    publish(run, "tester/quick")
    repo = hub.repos["models", "tester/quick"]
    files = {path: hub.content(value) for path, value in repo.commits[repo.at("main")].items()}
    hub.put("models", "tester/quick", files | {name: files.get(name, b"") + b"edited"})
    with pytest.raises(DistillError, match=name):
        publish(run, "tester/quick")
    assert publish(run, "tester/quick", replace=True).deleted == [n for n in ("added.gguf",) if n == name]


def test_a_repository_that_is_created_meanwhile_is_not_overwritten(run, hub, monkeypatch):
    from huggingface_hub import ModelCard as Card

    monkeypatch.setattr(Card, "validate", lambda self: hub.put("models", "tester/quick", {"README.md": b"theirs"}))
    with pytest.raises(DistillError, match="meanwhile"):
        publish(run, "tester/quick")
    assert files_of(hub) == {"README.md"}


def test_a_run_does_not_start_for_a_repository_that_cannot_be_published_to(hub):
    hub.put("models", "tester/quick", {"model.gguf": b"theirs"})
    with pytest.raises(DistillError, match=r"model\.gguf"):
        check_ready(load_recipe("quickstart", smoke=True), "tester/quick")


def test_a_student_with_another_base_model_does_not_replace_the_published_one(run, hub):
    publish(run, "tester/quick")
    run = with_hub_teacher(run, hub, "apache-2.0")
    with pytest.raises(DistillError, match="another base"):
        publish(run, "tester/quick")
    publish(run, "tester/quick", replace=True)


def test_no_published_file_contains_a_local_path(run, hub, tmp_path):
    """The recipe, the student's configs, the diagnosis, the samples and the report contain absolute paths before."""
    secret = tmp_path / "secret place" / "rows.jsonl"
    student = run.path("student")
    values = yaml.safe_load(run.path("recipe.yaml").read_text())
    values["data"]["eval"] = {"path": str(secret), "holdout": None}
    run.path("recipe.yaml").write_text(yaml.safe_dump(values))
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "tokenizer_file")):
        config = json.loads((student / name).read_text())
        (student / name).write_text(json.dumps(config | {key: str(secret)}))
    verdict = {"name": "short_log", "text": f"see {run.folder}/metrics.jsonl", "advice": ""}
    (run.folder / "diagnosis.json").write_text(json.dumps({"verdicts": [verdict]}))
    sample = {"prompt": f"Open {secret} and read on", "reference": "", "written": {}}
    (run.folder / "samples.json").write_text(json.dumps({"samples": [sample]}))
    results = run.results
    results["environment"]["device_name"] = str(run.folder)
    (run.folder / "results.json").write_text(json.dumps(results))
    (run.folder / "report.html").write_text(f"<p>{run.folder}</p><pre>path: {secret}\n'{Path.home()}/x'</pre>")
    publish(open_run(run.folder), "tester/quick", include=["report"])
    repo = hub.repos["models", "tester/quick"]
    for name, value in repo.commits[repo.at("main")].items():
        content = hub.content(value)
        for path in (tmp_path.name, tmp_path.parent.name, f"{Path.home()}/", "secret place"):
            assert path.encode() not in content, (name, path)
    assert (
        json.loads(hub.content(repo.commits[repo.at("main")]["tokenizer_config.json"]))["tokenizer_file"]
        == "rows.jsonl"
    )


def test_a_private_student_is_not_published_to_a_public_repository(run, hub):
    publish(run, "tester/quick")
    with pytest.raises(DistillError, match="is a public repository"):
        publish(run, "tester/quick", private=True)
    publish(run, "tester/hidden", private=True)
    assert hub.repos["models", "tester/hidden"].private


def test_a_run_does_not_start_for_a_private_student_and_a_public_repository(hub):
    hub.put("models", "tester/quick", {})
    with pytest.raises(DistillError, match="is a public repository"):
        check_ready(load_recipe("quickstart", ["train.hub_private_repo=true"], smoke=True), "tester/quick")


def test_a_card_that_the_hub_does_not_accept_is_an_error_with_the_reason(run, hub):
    """The Hub knows the ids of licenses, and refuses a card with another one."""
    hub.faults.append(Fault("validate-yaml", status=400))
    with pytest.raises(DistillError, match=r"The Hub does not accept the card of the student: .*injected fault"):
        publish(run, "tester/quick", license="no-such-license")
    assert not hub.repos


def test_the_card_counts_the_rows_of_all_processes(run, hub):
    results = json.loads(run.path("results.json").read_text())
    results["environment"]["processes"] = 4
    run.path("results.json").write_text(json.dumps(results))
    assert "8 rows per step" in dry_run(run, "tester/quick").card  # 2 rows of each process


def test_publishing_without_a_token_raises_an_error(run, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DistillError, match="No token is set"):
        publish(run, "tester/quick")


def test_an_unfinished_run_is_not_published(run, hub):
    results = run.results
    del results["status"]
    (run.folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(DistillError, match="not finished"):
        publish(run, "tester/quick")


def test_a_missing_report_is_an_error_before_anything_is_uploaded(run, hub):
    (run.folder / "report.html").unlink()
    with pytest.raises(DistillError, match="hf-distill report"):
        publish(run, "tester/quick", include=["report"])
    with pytest.raises(DistillError, match="--include accepts"):
        publish(run, "tester/quick", include=["reports"])
    assert not hub.repos


def test_a_dry_run_shows_what_publishing_uploads_without_a_token(run, hub, monkeypatch):
    run = with_hub_teacher(run, hub, "llama3", student="apache-2.0")
    monkeypatch.delenv("HF_TOKEN")
    offline = CliRunner().invoke(app, ["publish", str(run.folder), "tester/quick", "--dry-run", "--include", "report"])
    assert offline.exit_code == 0, offline.exception
    assert "License conflict, which needs --accept-license: teacher: llama3 forbids" in offline.output
    monkeypatch.setenv("HF_TOKEN", hub.token)
    preview = dry_run(run, "tester/quick", ["report"])
    assert not any(method != "GET" and method != "HEAD" for method, _ in hub.requests)
    published = publish(run, "tester/quick", include=["report"], accept_license=True)
    repo = hub.repos["models", "tester/quick"]
    files = {name: hub.content(value) for name, value in repo.commits[repo.at("main")].items()}
    del files[".gitattributes"]
    assert preview.sizes == {name: len(content) for name, content in files.items()}
    assert preview.card.encode() == files["README.md"]
    assert (preview.left_out, preview.license.id) == (published.left_out, "apache-2.0")


def test_a_dry_run_needs_no_connection(run, hub, monkeypatch):
    run = with_hub_teacher(run, hub, "mit")
    hub.faults.append(Fault(match=".*", cut=True, times=999))
    preview = dry_run(run, "quick")
    assert "org/teacher" in preview.unknown
    assert "cannot be reached" in preview.unknown["org/teacher"]
    assert preview.license.conflicts == []
    assert "model.safetensors" in preview.sizes
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = CliRunner().invoke(app, ["publish", str(run.folder), "quick", "--dry-run"])
    assert result.exit_code == 0, result.exception
    assert "The license of org/teacher could not be looked up" in result.output
    assert "model.safetensors" in result.output
    assert hub.requests == []


def test_a_dry_run_reports_missing_and_damaged_files(run):
    (run.folder / "report.html").unlink()
    with pytest.raises(DistillError, match="hf-distill report"):
        dry_run(run, "quick", ["report"])
    with pytest.raises(DistillError, match="--include cache needs"):
        dry_run(run, "quick", ["cache"])
    (run.path("student") / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(DistillError, match="is damaged"):
        dry_run(run, "quick")


def test_a_smoke_run_is_published_only_with_allow_smoke_and_the_card_states_it(run, hub):
    command = ["publish", str(run.folder), "tester/quick"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, DistillError)
    assert "smoke run" in str(result.exception)
    assert "--allow-smoke" in str(result.exception)
    assert not hub.repos
    preview = CliRunner().invoke(app, [*command, "--dry-run"])
    assert preview.exit_code == 0, preview.exception
    assert preview.output.startswith(
        "This is a smoke run: its models are tiny and were initialized with random weights (smoke:llama"
    )
    assert "Publishing it needs --allow-smoke" in preview.output
    assert CliRunner().invoke(app, [*command, "--allow-smoke"]).exit_code == 0
    repo = hub.repos["models", "tester/quick"]
    card = hub.content(repo.commits[repo.at("main")]["README.md"]).decode()
    assert "this is a smoke run" in card
    recipe = load_recipe("quickstart", ["train.push_to_hub=true", "train.hub_model_id=tester/quick"], smoke=True)
    with pytest.raises(DistillError, match="smoke run"):
        check_ready(recipe, "tester/quick")


@pytest.mark.parametrize(
    ("repo", "options", "option"),
    [
        ("a b", {}, "REPO"),
        ("org/a/b", {}, "REPO"),
        ("org/--x", {}, "REPO"),
        (f"org/{'x' * 92}", {"include": ["cache"]}, "the cache"),
        ("org/quick", {"base_model": "no id"}, "--base-model"),
    ],
)
@pytest.mark.parametrize("function", [publish, dry_run])
def test_an_invalid_repository_id_is_refused_before_any_request(run, hub, function, repo, options, option):
    with pytest.raises(DistillError, match=rf"{option}.* which is not a repository id"):
        function(run, repo, **options)
    assert hub.requests == []
