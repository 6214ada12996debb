"""Which keys of a recipe fit its task; all of it is checked before anything is loaded."""

import pytest

from hf_distill import DistillError
from hf_distill.recipe.load import load_recipe

TEXTS, IMAGES, SPEECH = "text-classification", "image-classification", "speech-recognition"


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (IMAGES, "data.max_length=128", "data.max_length has no meaning for the task image-classification: images"),
        (TEXTS, "data.packing=true", "data.packing has no meaning for the task text-classification"),
        (TEXTS, "data.chat_template=chatml", "data.chat_template has no meaning for the task text-classification"),
        (TEXTS, "data.task.column=x", "data.task.column has no meaning for the task text-classification: set data.col"),
        (TEXTS, "data.eval.column=x", "data.eval.column has no meaning for the task text-classification"),
        (TEXTS, "data.task.streaming=true", "data.task.streaming has no meaning"),
        (TEXTS, "data.columns={txt: x}", "'txt' is not a column of the task text-classification; its columns are text"),
        (TEXTS, "data.language=english", "data.language has no meaning for the task text-classification"),
        (TEXTS, "on_policy={}", "on_policy has no meaning for the task text-classification"),
        (TEXTS, "distill.cross_tokenizer=alm", "distill.cross_tokenizer has no meaning for the task text-classif"),
        (
            TEXTS,
            "teacher={kind: remote, url: 'http://x.invalid', model: x}",
            "teacher.kind remote is for the task text-",
        ),
        (TEXTS, "student.lora={r: 2}", "student.lora is for the task text-generation"),
        (
            TEXTS,
            "student.freeze_encoder=true",
            "student.freeze_encoder: a model of the task text-classification has no",
        ),
        (IMAGES, "student.from_teacher={keep_layers: 2}", "keep_layers measures the layers on text: set layers"),
        (IMAGES, "student.from_teacher={decoder_layers: [0]}", "has one stack of layers: set layers"),
        (SPEECH, "student.from_teacher={layers: [0]}", "set decoder_layers or encoder_layers"),
        (SPEECH, "student.from_teacher={layers: [0], encoder_layers: [0]}", "give either keep_layers or layers"),
        (SPEECH, "student.from_teacher={decoder_layers: []}", "student.from_teacher.decoder_layers"),
        (SPEECH, "task=image-classification", "is not a column|decoder_layers and encoder_layers"),
        (SPEECH, "task=speech-recognition", "task: Input should be 'text-generation'"),
        ("quickstart", "data.columns={text: x}", "data.columns is for the task text-classification, image-classific"),
        ("quickstart", "data.language=english", "data.language is for the task automatic-speech-recognition"),
        ("quickstart", "student.freeze_encoder=true", "student.freeze_encoder: a model of the task text-generation"),
    ],
)
def test_keys_that_have_no_meaning_for_the_task_are_refused(name, change, problem):
    with pytest.raises(DistillError, match=problem):
        load_recipe(name, [change])


def test_keys_that_have_their_default_are_not_refused():
    """The recipe.yaml of a run has all of them."""
    for name in (TEXTS, IMAGES, SPEECH):
        changed = load_recipe(
            name, ["data.packing=false", "data.max_length=512", "student.lora=null", "on_policy=null"]
        )
        assert changed == load_recipe(name, ["data.max_length=512"])
