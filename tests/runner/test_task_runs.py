"""Recipes of classifiers and of speech recognition: smoke runs, resuming, data, labels and invalid input."""

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    TrainerCallback,
)
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.cli import app
from hf_distill.core.held_out_metrics import shown_metrics
from hf_distill.data.load import load_columns
from hf_distill.data.task_collators import SpeechCollator
from hf_distill.publishing.card_data import run_card_data
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.runner.model_loading import resolve_model
from hf_distill.runner.row_fingerprints import fingerprint_of
from hf_distill.runner.run_results import open_run
from hf_distill.runner.tasks import task_of
from hf_distill.runner.tasks.media import check_files

CLASSES = {
    "text-classification": (AutoModelForSequenceClassification, AutoTokenizer),
    "image-classification": (AutoModelForImageClassification, AutoImageProcessor),
    "speech-recognition": (AutoModelForSpeechSeq2Seq, AutoProcessor),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def smoke(name, output, *overrides):
    return load_recipe(name, [f"train.output_dir={output}", *overrides], smoke=True)


def prepared(name, *overrides):
    """The task of a smoke recipe with other values, its processor and its data."""
    recipe = smoke(name, "run", *overrides)
    task = task_of(recipe)
    processor = task.load_processor()
    return task, processor, task.prepare_data(processor, 0, 8)


@pytest.mark.parametrize("name", CLASSES)
def test_a_smoke_run_trains_resumes_and_exports_the_models_with_their_processor(name, folder):
    straight = run_recipe(smoke(name, "straight"))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(smoke(name, "cut"), callbacks=[StopAt()])
    stages = []
    resumed = run_recipe(smoke(name, "cut"), resume=True, on_stage=stages.append)
    assert any(stage.startswith("student: from step 2 of 4") for stage in stages)
    for model in straight.models:
        without_time = [
            {key: value for key, value in run.models[model].items() if key != "train_seconds"}
            for run in (straight, resumed)
        ]
        assert without_time[0] == without_time[1]
    auto_class, processor_class = CLASSES[name]
    processor_class.from_pretrained(folder / "straight" / "student")
    weights = [auto_class.from_pretrained(folder / run / "student").state_dict() for run in ("straight", "cut")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    results = json.loads((folder / "straight" / "results.json").read_text())
    assert results["status"] == "done"
    assert results["data"]["train_rows"] + results["data"]["eval_rows"] == 40
    assert {metric.key for metric in shown_metrics(straight.models.values())} >= {"kl", "agreement"}
    card = run_card_data(open_run(folder / "straight"), "org/name", lookup=lambda *_: None)
    assert card.task == load_recipe(name).task
    assert "tokens" not in card.training


def test_classifiers_report_accuracy_and_have_the_names_of_the_classes(folder):
    for name, labels in (
        ("text-classification", ["food", "music", "weather"]),
        ("image-classification", ["left", "right", "top"]),
    ):
        result = run_recipe(smoke(name, name))
        auto_class, _ = CLASSES[name]
        for model in ("student", "control"):
            assert 0 <= result.models[model]["accuracy"] <= 1
            config = auto_class.from_pretrained(folder / name / model).config
            assert [config.id2label[i] for i in range(3)] == labels
        assert json.loads((folder / name / "results.json").read_text())["data"]["labels"] == labels
        assert "perplexity" not in result.models["student"]


@pytest.mark.parametrize(
    ("name", "family", "teacher"),
    [
        ("text-classification", "bert", "teacher={kind: ema, decay: 0.5}"),
        ("image-classification", "vit", "teacher={kind: mutual, model: 'smoke:vit/teacher'}"),
        ("speech-recognition", "whisper", "teacher={kind: snapshot, interval_steps: 2}"),
    ],
)
def test_teachers_that_change_during_training(name, family, teacher):
    student = f"student={{model: 'smoke:{family}/student'}}"
    models = run_recipe(smoke(name, "run", student, teacher, "control=null")).models
    measured = "perplexity" if family == "whisper" else "accuracy"
    for model in {"student", "ema", "peer"} & models.keys():
        assert models[model][measured] > 0, model
    assert len(models) == (2 if family == "whisper" else 3)


def test_a_speech_student_has_some_decoder_layers_and_the_encoder_of_its_teacher(folder):
    run_recipe(smoke("speech-recognition", "run"))
    student = AutoModelForSpeechSeq2Seq.from_pretrained(folder / "run" / "student")
    teacher = AutoModelForSpeechSeq2Seq.from_pretrained(resolve_model("smoke:whisper/teacher"))
    assert (student.config.encoder_layers, student.config.decoder_layers) == (4, 2)
    for name, weight in teacher.get_encoder().state_dict().items():
        assert torch.equal(student.get_encoder().state_dict()[name], weight), name
    decoder = [model.get_decoder().layers[-1].fc1.weight for model in (student, teacher)]
    assert not torch.equal(*decoder)  # trained
    facts = json.loads((folder / "run" / "results.json").read_text())["student"]
    assert facts["decoder_layers_kept"] == [0, 3]
    assert facts["layers"] == 6


@pytest.mark.parametrize("name", CLASSES)
def test_preview_shows_inputs_and_targets_and_other_commands_refuse(name):
    shown = CliRunner().invoke(app, ["recipes", "preview", name, "--smoke"])
    assert shown.exit_code == 0
    assert "«" in shown.output
    for command in (["plan"], ["inspect"], ["temperature"], ["cache", "write", "-o", "cache"], ["serve"]):
        refused = CliRunner().invoke(app, [*command, name, "--smoke"])
        assert refused.exit_code != 0, command
        assert f"the task of this recipe is {load_recipe(name).task}" in f"{refused.output}{refused.exception}", command


def write_images(folder, *labels):
    for number, label in enumerate(labels):
        (folder / label).mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (12 + number, 12), (number * 20, 0, 0)).save(folder / label / f"{number}.png")


def test_a_folder_of_images_is_read_with_its_folders_as_labels(folder):
    write_images(folder / "images", *["left", "right", "top"] * 4)
    _, _, data = prepared("image-classification", "data.task={path: images}")
    assert data.labels == ("left", "right", "top")
    batch = data.collator([data.train[i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert batch["labels"].tolist() == [data.train[i]["labels"] for i in range(3)]
    before = fingerprint_of(data.train)
    assert before == fingerprint_of(prepared("image-classification", "data.task={path: images}")[2].train)


def test_paths_of_images_in_a_csv_file_are_read_and_missing_files_are_named(folder):
    write_images(folder / "images", "left", "right", "top")
    lines = [f"images/{label}/{i}.png,{label}" for i, label in enumerate(("left", "right", "top"))]
    (folder / "rows.csv").write_text("file,kind\n" + "\n".join(lines) + "\n")
    columns = ["data.columns={image: file, label: kind}", "data.task={path: rows.csv}", "data.eval={path: rows.csv}"]
    _, _, data = prepared("image-classification", *columns)
    assert data.train[1]["image"].size == (13, 12)
    (folder / "rows.csv").write_text("file,kind\nimages/none.png,left\n")
    with pytest.raises(
        DistillError, match=r"1 of 1 files of the column 'image' do not exist, such as 'images/none.png'"
    ):
        prepared("image-classification", *columns)


@pytest.mark.parametrize("kind", [Image(), Value("string")])
def test_rows_without_an_image_are_an_error_before_the_training(folder, kind):
    write_images(folder / "images", "left", "right", "top")
    names = ["images/left/0.png", None, "images/right/1.png", "images/top/2.png"]
    features = Features({"image": kind, "label": Value("string")})
    Dataset.from_dict({"image": names, "label": ["left", "left", "right", "top"]}, features).save_to_disk("rows")
    with pytest.raises(DistillError, match=r"data.task \(rows\): 1 of 4 rows have no image: remove them"):
        prepared("image-classification", "data.task={path: rows}", "data.eval={path: rows, split: train}")


def test_paths_in_a_data_set_of_the_hub_do_not_name_files_of_this_machine(folder):
    write_images(folder / "images", "left")
    rows = Dataset.from_dict({"image": ["images/left/0.png"]})
    check_files(rows, "image", "data.task", "rows.csv")
    for path in ("org/images", "hf://datasets/org/images"):
        with pytest.raises(DistillError, match="only local data may name files of this machine"):
            check_files(rows, "image", "data.task", path)


def text_rows(folder, labels, **columns):
    rows = [{"text": f"text {i}", "label": label, **columns} for i, label in enumerate(labels)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "data.task={path: rows.jsonl}"


def test_pairs_of_texts_are_tokenized_together_and_padded(folder):
    source = text_rows(folder, ["a", "b", "c"] * 4, text_pair="and more")
    _, _, data = prepared("text-classification", source, "data.max_length=9")
    row = data.train[0]
    assert len(row["input_ids"]) == 9  # truncated
    assert 1 in row["token_type_ids"]
    short, long = {**row, "input_ids": [2, 3], "token_type_ids": [0, 0], "attention_mask": [1, 1]}, row
    batch = data.collator([short, long])
    assert batch["input_ids"].shape == (2, 9)
    assert batch["attention_mask"].sum(1).tolist() == [2, 9]
    assert batch["labels"].tolist() == [row["labels"]] * 2
    assert data.labels == ("a", "b", "c")


def test_a_tokenizer_without_a_padding_token_is_refused_before_the_data_is_read(folder):
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smoke:bert/student"))
    tokenizer.pad_token = None
    AutoModelForSequenceClassification.from_pretrained(resolve_model("smoke:bert/student")).save_pretrained("student")
    tokenizer.save_pretrained("student")
    with pytest.raises(DistillError, match=r"The tokenizer of student has no padding token.*tokenizer.pad_token ="):
        run_recipe(smoke("text-classification", "run", "student.model=student", "data.task.path=none.csv"))


def test_labels_are_numbers_of_a_csv_file_or_ids_of_the_classes_of_the_teacher(folder):
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"text {i},{i % 3}\n" for i in range(12)))
    assert prepared("text-classification", "data.task={path: rows.csv}")[2].labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    # The teacher has the classes of the data in another order: the ids of the rows are the teacher's.
    teacher = AutoModelForSequenceClassification.from_pretrained(resolve_model("smoke:bert/teacher"))
    names = ["c", "a", "b"]
    teacher.config.id2label, teacher.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    teacher.save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(resolve_model("smoke:bert/teacher")).save_pretrained(folder / "teacher")
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
    Dataset.from_dict({"text": ["x"] * 12, "label": [0, 1, 2] * 4}, features=features).save_to_disk("rows")
    task, _, data = prepared(
        "text-classification", "data.task={path: rows}", "data.eval={path: rows}", "teacher.model=teacher"
    )
    assert data.train[:3]["labels"] == [1, 2, 0]
    assert task.model_options()["label2id"] == {"c": 0, "a": 1, "b": 2}
    with pytest.raises(DistillError, match=r"labels that the teacher teacher does not have: 'z'"):
        prepared("text-classification", text_rows(folder, ["a", "z"] * 6), "teacher.model=teacher")


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (["a", "b"] * 6, r"The data has 2 labels \('a', 'b'\), and the teacher .* has 3 classes"),
        ([0, 3] * 6, "has the label 3, and there are 3 classes"),
        ([0, -1] * 6, "some rows have no label in the column 'label'"),
        ([None, "a"] * 6, "some rows have no label in the column 'label'"),
        ([0.5, 1.0] * 6, "has the type float64, and a label of a recipe is one class of each row"),
        ([[0], [1]] * 6, "has the type List, and a label of a recipe is one class of each row"),
    ],
)
def test_labels_that_do_not_fit_the_teacher_are_refused(folder, labels, problem):
    with pytest.raises(DistillError, match=problem):
        prepared("text-classification", text_rows(folder, labels))


@pytest.mark.parametrize(
    ("name", "columns", "problem"),
    [
        ("text-classification", {"sentence": ["x"]}, r"has no column 'text'(.|\n)*data.columns: {text: NAME}"),
        ("text-classification", {"text": [1], "label": ["a"]}, "the column of the text has the type"),
        ("image-classification", {"image": [1], "label": ["a"]}, "the column of the image has the type"),
        ("speech-recognition", {"audio": [1], "text": ["a"]}, "the column of the audio has the type"),
    ],
)
def test_columns_that_are_missing_or_of_another_type_are_named(folder, name, columns, problem):
    Dataset.from_dict(columns).save_to_disk("rows")
    with pytest.raises(DistillError, match=problem):
        prepared(name, "data.task={path: rows}")


def test_several_sources_are_mixed_and_batches_name_the_source_of_each_row(folder):
    source = "data.more={path: 'smoke:texts', weight: 3.0}"
    _, _, data = prepared("text-classification", source)
    assert data.collator.sources == ("task", "more")
    batch = data.collator([data.train[i] for i in range(4)])
    assert batch["source"].tolist() == [data.train[i]["source"] for i in range(4)]
    metrics = run_recipe(smoke("text-classification", "run", source, "control=null")).models["student"]
    assert {"soft_loss_task", "soft_loss_more"} <= metrics.keys()


def test_transcripts_lose_the_start_token_and_are_padded_with_minus_100(folder):
    _, processor, data = prepared("speech-recognition")
    start = processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    rows = [data.train[i] for i in range(4)]
    assert isinstance(data.collator, SpeechCollator)
    batch = data.collator(rows)
    assert batch["input_features"].shape == (4, 8, 100)
    for row, labels in zip(rows, batch["labels"].tolist(), strict=True):
        assert row["labels"][0] == start
        assert labels == [*row["labels"][1:], *[-100] * (len(labels) - len(row["labels"]) + 1)]


def test_rows_that_are_too_long_for_a_speech_model_are_left_out(folder):
    tones = load_columns("smoke:tones")
    rows = [{**tones[i]} for i in range(12)]
    rows[0]["audio"] = {"array": [0.0] * 16_001, "sampling_rate": 16_000}  # the model reads one second
    rows[1]["text"] = "low " * 20  # the model writes 64 tokens
    Dataset.from_list(rows).save_to_disk("rows")
    options = ["data.task={path: rows}", "data.eval={path: rows}"]
    assert len(prepared("speech-recognition", *options)[2].train) == 10
    Dataset.from_list(rows[:2]).save_to_disk("long")
    with pytest.raises(DistillError, match="no row is left"):
        prepared("speech-recognition", "data.task={path: long}")
    Dataset.from_list([{**rows[2], "audio": {"array": [0.0], "sampling_rate": 8_000}}] * 9).save_to_disk("other-rate")
    with pytest.raises(DistillError, match="8000 samples a second, and the model reads 16000"):
        prepared("speech-recognition", "data.task={path: other-rate}")


def test_the_language_of_speech_is_part_of_the_transcripts_and_of_generation(folder):
    task, processor, data = prepared("speech-recognition", "data.language=english")
    tokens = processor.tokenizer.convert_ids_to_tokens(data.train[0]["labels"])
    assert tokens[:4] == ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    student = AutoModelForSpeechSeq2Seq.from_pretrained(resolve_model("smoke:whisper/student"))
    assert task.adapt_student(student).generation_config.language == "english"
    with pytest.raises(DistillError, match=r"data.language is 'klingon'"):
        prepared("speech-recognition", "data.language=klingon")


def test_a_teacher_with_another_image_processor_is_refused(folder):
    processor = AutoImageProcessor.from_pretrained(resolve_model("smoke:vit/teacher"))
    processor.image_mean = [0.4, 0.4, 0.4]
    AutoModelForImageClassification.from_pretrained(resolve_model("smoke:vit/teacher")).save_pretrained("teacher")
    processor.save_pretrained("teacher")
    models = ["student={model: 'smoke:vit/student'}", "teacher={model: teacher}"]
    with pytest.raises(DistillError, match=r"processors differ in image_mean \(image_mean is \[0.4"):
        prepared("image-classification", *models)


def test_fingerprints_of_rows_change_with_images_and_labels():
    def rows(color, label):
        image = PILImage.new("RGB", (4, 4), (color, 0, 0))
        features = Features({"image": Image(), "labels": Value("int64")})
        return Dataset.from_dict({"image": [image], "labels": [label]}, features=features)

    assert fingerprint_of(rows(0, 0)) == fingerprint_of(rows(0, 0))
    assert len({fingerprint_of(rows(0, 0)), fingerprint_of(rows(9, 0)), fingerprint_of(rows(0, 1))}) == 3
