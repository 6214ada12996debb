"""Pushes to the Hub: every commit has a model card and no projector, whatever the strategy."""

import json
from types import SimpleNamespace

import pytest
from datasets import load_dataset
from hub_server import Hub
from huggingface_hub import ModelCard
from tiny import build
from transformers import AutoModelForCausalLM, TrainerState, default_data_collator

from hf_distill import DistillConfig
from hf_distill.teachers import FrozenTeacher
from hf_distill.trainer.hub import CardOptions, ModelCardWriter
from hf_distill.trl import DistillSFTConfig, DistillSFTTrainer

HIDDEN = [{"name": "hidden_mse", "weight": 0.1}]


def pushed(hub: Hub, name: str = "tester/tiny") -> list[dict[str, bytes]]:
    """Return the files of each commit of a repository that has a model, in order."""
    repo = hub.repos["models", name]
    states = [{path: hub.content(value) for path, value in files.items()} for files in repo.commits.values()]
    return [files for files in states if "model.safetensors" in files]


def build_card(files: dict[str, bytes]) -> ModelCard:
    return ModelCard(files["README.md"].decode())


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_every_push_has_a_card_and_no_projector(make_trainer, hub, strategy):
    options = {"hub_strategy": strategy, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    trainer = make_trainer(push_to_hub=True, hub_model_id="tester/tiny", losses=HIDDEN, eval_steps=2, **options)
    trainer.train()
    trainer.push_to_hub()
    states = pushed(hub)
    assert len(states) >= (1 if strategy == "end" else 2)
    for files in states:
        card = build_card(files)
        card.validate()
        assert {"distillation", "hf-distill"} <= set(card.data.tags)
        assert b"hidden_mse" in files["README.md"]
        assert json.loads(files["distillation.json"])["training"]["steps"] in (2, 4)
        assert not any("sidecar" in path for path in files if "/" not in path)
    assert json.loads(states[-1]["distillation.json"])["training"]["steps"] == 4
    sidecars = {path for path in states[-1] if path.endswith("sidecar.safetensors")}
    assert bool(sidecars) == (strategy in ("checkpoint", "all_checkpoints")), "checkpoints need projectors"


def test_the_pushed_weights_are_the_trained_ones(make_trainer, hub):
    trainer = make_trainer(push_to_hub=True, hub_model_id="tester/tiny", losses=HIDDEN)
    trainer.train()
    trainer.push_to_hub(language="en", tags=["mine"], dataset="org/data", license="mit")
    pushed_weights = AutoModelForCausalLM.from_pretrained("tester/tiny").state_dict()
    trained = {name: value for name, value in trainer.model.state_dict().items() if name in pushed_weights}
    assert trained.keys() == pushed_weights.keys()
    assert all((trained[name].cpu() == pushed_weights[name]).all() for name in trained)
    data = ModelCard.load("tester/tiny").data
    assert (data.language, data.license, data.datasets) == ("en", "mit", ["org/data"])
    assert "mine" in data.tags


def test_the_card_names_a_teacher_from_the_hub_and_its_license(make_trainer, hub, tmp_path):
    build("llama", 1, layers=3, width=48).save_pretrained(tmp_path / "t")
    files = {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()}
    hub.put("models", "org/teacher", files | {"README.md": b"---\nlicense: gemma\n---\n"})
    trainer = make_trainer(teacher="org/teacher", hub_model_id="tester/tiny")
    trainer.train()
    trainer.push_to_hub()
    card = ModelCard.load("tester/tiny")
    assert card.data.license == "gemma"
    assert "org/teacher" in card.text
    assert "stays under its terms" in card.text


def test_the_card_names_data_arguments_and_papers(make_trainer, hub):
    hub.put("datasets", "org/rows", {"train.jsonl": b'{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}\n' * 8})
    rows = load_dataset("org/rows", split="train")
    options = {"hub_model_id": "tester/tiny", "warmup_steps": 2, "losses": HIDDEN}
    trainer = make_trainer(train_dataset=rows, data_collator=default_data_collator, **options)
    trainer.train()
    trainer.push_to_hub()
    card = ModelCard.load("tester/tiny")
    assert card.data.datasets == ["org/rows"]
    assert hub.repos["datasets", "org/rows"].at("main")[:12] in card.text
    assert "`warmup_steps=2`" in card.text
    assert "output_dir" not in card.text
    for paper in ("1503.02531", "1412.6550"):
        assert f"arxiv.org/abs/{paper}" in card.text


def test_a_card_is_written_without_a_trainer(tmp_path):
    args = DistillConfig(str(tmp_path), hub_model_id="tester/tiny", learning_rate=0.125, use_cpu=True)
    source = SimpleNamespace(
        args=args, state=TrainerState(), train_dataset=None, eval_dataset=None, processing_class=None
    )
    teacher, writer = FrozenTeacher(build("llama", 1)), ModelCardWriter()
    writer.write(source, build("llama"), teacher, CardOptions(license="mit", tags="mine", tasks="fill-mask"))
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.pipeline_tag) == ("mit", "fill-mask")
    assert {"mine", "hf-distill"} <= {*data.tags}
    assert json.loads((tmp_path / "distillation.json").read_text())["training"]["learning_rate"] == 0.125


def test_an_unknown_option_of_a_card_is_an_error(make_trainer):
    with pytest.raises(TypeError, match="dataset_tags"):
        make_trainer().create_model_card(dataset_tags=["a"])


def test_without_a_teacher_the_trainer_writes_the_card(make_trainer, hub):
    trainer = make_trainer(teacher=None, alpha=0.0, push_to_hub=True, hub_model_id="tester/plain")
    trainer.train()
    trainer.push_to_hub()
    assert "distillation" not in (ModelCard.load("tester/plain").data.tags or [])


def test_the_trl_trainer_pushes_the_distillation_card(hub, tmp_path):
    from datasets import Dataset

    from hf_distill.recipe.smoke import byte_tokenizer

    tokenizer = byte_tokenizer()
    options = {
        "push_to_hub": True,
        "hub_model_id": "tester/sft",
        "save_steps": 1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
    }
    trainer = DistillSFTTrainer(
        build("llama", 0, vocab=len(tokenizer)),
        DistillSFTConfig(str(tmp_path / "out"), max_steps=2, **options),
        teacher=build("llama", 1, layers=3, vocab=len(tokenizer)),
        train_dataset=Dataset.from_list([{"text": "The cat sat on the mat."}] * 8),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.push_to_hub()
    for files in pushed(hub, "tester/sft"):
        assert "hf-distill" in build_card(files).data.tags
        assert b"distilled from" in files["README.md"]
