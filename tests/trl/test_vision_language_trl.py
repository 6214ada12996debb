"""TRL's trainers with vision-language models: TRL's rows of images under the library's objective."""

import re

import pytest
import torch
from datasets import Dataset, Features, Image, List
from datasets import Value as V
from tiny_vision import IMAGE_ID, VISION_KINDS, vision_examples, vision_processor, vlm
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

from hf_distill import DistillError
from hf_distill.trl import DistillSFTConfig, DistillSFTTrainer, OnPolicyDistillConfig, OnPolicyDistillTrainer
from hf_distill.trl.image_rows import messages_of

MESSAGE = List({"role": V("string"), "content": V("string")})


def dataset(rows):
    kinds = {"images": List(Image()), "image": Image(), "text": V("string")}
    return Dataset.from_list(rows, features=Features({name: kinds.get(name, MESSAGE) for name in rows[0]}))


def conversations(count=8, **options):
    return [
        {"images": row["images"], "messages": row["prompt"] + row["completion"]}
        for row in vision_examples(count, **options)
    ]


ROWS = {
    "prompt and completion": (vision_examples(), {}),
    "the whole text": (vision_examples(), {"completion_only_loss": False}),
    "assistant only": (conversations(), {"assistant_only_loss": True}),
    "one image": (
        [{"image": row.pop("images")[0], **row} for row in vision_examples(counts=(1,))],
        {"losses": [{"name": "hidden_mse", "weight": 0.1}]},
    ),
}


@pytest.fixture
def make_sft(tmp_path):
    """`make_sft("qwen", rows)`: a trainer of a tiny pair of vision-language models."""

    def make(kind="qwen", rows=None, *, cls=DistillSFTTrainer, config=DistillSFTConfig, folder="out", **options):
        passed = {k: options.pop(k) for k in list(options) if k not in DistillSFTConfig.__dataclass_fields__}
        fields = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"} | options
        args = config(str(tmp_path / folder), bf16=False, report_to="none", dataloader_pin_memory=False, **fields)
        data = dataset(vision_examples() if rows is None else rows)
        arguments = {"model": vlm(kind, 0), "processing_class": vision_processor(kind)}
        if cls is DistillSFTTrainer:
            arguments["teacher"] = vlm(kind, 1, layers=2, width=24)
        return cls(args=args, train_dataset=data, eval_dataset=data.select(range(3)), **arguments | passed)

    return make


def logged(trainer, *names):
    return [[log[name] for name in names] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_without_a_teacher_it_equals_sft_trainer_bit_for_bit(make_sft, kind):
    plain = make_sft(kind, cls=SFTTrainer, config=SFTConfig)
    ours = make_sft(kind, teacher=None)
    names = ("loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens")
    for trainer in (plain, ours):
        trainer.train()
    assert logged(ours, *names) == logged(plain, *names)
    assert ours.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    expected = plain.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.model.state_dict().items())


@pytest.mark.parametrize("rows", ROWS)
def test_the_rows_that_trl_prepares_have_the_loss_of_ten_lines(make_sft, rows):
    examples, options = ROWS[rows]
    kind = VISION_KINDS[list(ROWS).index(rows)]
    trainer = make_sft(
        kind, examples, max_steps=1, gradient_accumulation_steps=2, temperature=2.0, alpha=0.6, **options
    )
    student, batches, compute_loss = vlm(kind, 0), [], trainer.compute_loss

    def record_batch(model, inputs, *more, **kwargs):
        batches.append({k: v for k, v in inputs.items() if k != "shift_labels"})
        return compute_loss(model, inputs, *more, **kwargs)

    trainer.compute_loss = record_batch
    trainer.train()
    soft = hard = count = 0
    for batch in batches:
        labels = batch.pop("labels")[:, 1:]
        is_target = (labels != -100) & (labels != IMAGE_ID)
        with torch.no_grad():
            s, t = (m(**batch).logits[:, :-1][is_target] for m in (student, trainer.teacher.model))
        log_s, log_t = ((logits / 2.0).log_softmax(-1) for logits in (s, t))
        soft += 4.0 * (log_t.exp() * (log_t - log_s)).sum()
        hard += torch.nn.functional.cross_entropy(s, labels[is_target], reduction="sum")
        count += is_target.sum()
    (log,) = logged(trainer, "soft_loss", "hard_loss")
    assert log == pytest.approx([(soft / count).item(), (hard / count).item()], rel=1e-5)
    text = vision_processor(kind).tokenizer.decode(labels[is_target])
    assert text.startswith("It is") or rows == "the whole text"
    assert trainer.evaluate()["eval_kl"] > 0


def test_a_max_length_that_cuts_images_off_is_explained(make_sft):
    with pytest.raises(DistillError, match="max_length is 8, which cuts off tokens of images"):
        make_sft("llava", vision_examples(counts=(2,)), max_length=8).train()


@pytest.mark.parametrize("name", ["packing", "padding_free"])
def test_packing_of_images_is_refused_by_trl(make_sft, name):
    with pytest.raises(ValueError, match="vision datasets"):
        make_sft(**{name: True})


@pytest.fixture
def make_on_policy(tmp_path):
    """`make_on_policy("qwen", rows)`: an on-policy trainer of a tiny pair of vision-language models."""

    def make(kind, rows, *, cls=OnPolicyDistillTrainer, config=OnPolicyDistillConfig, side="right", **options):
        passed = {k: options.pop(k) for k in list(options) if k not in OnPolicyDistillConfig.__dataclass_fields__}
        fields = {
            "max_steps": 1,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "logging_steps": 1,
        }
        fields |= {"bf16": False, "report_to": "none", "max_completion_length": 5, "save_strategy": "no"} | options
        args = config(str(tmp_path / cls.__name__), dataloader_pin_memory=False, **fields)
        processor = vision_processor(kind)
        processor.tokenizer.padding_side = side
        teacher = "teacher" if cls is OnPolicyDistillTrainer else "teacher_model"
        arguments = {"model": vlm(kind, 0), teacher: vlm(kind, 1, layers=2, width=24)}
        data = dataset(rows)
        return cls(args=args, train_dataset=data, eval_dataset=data, processing_class=processor, **arguments | passed)

    return make


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_reverse_kl_on_completions_for_images_equals_that_of_trl(make_on_policy, kind):
    rows, options = vision_examples(4, counts=(1,)), dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    theirs = make_on_policy(
        kind, rows, cls=DistillationTrainer, config=DistillationConfig, temperature=1.0, side="left", **options
    )
    theirs.train()
    ours = make_on_policy(kind, rows, **options)  # built last, for the random numbers of the generation
    ours.train()
    names = ("loss", "grad_norm", "completions/mean_length", "num_tokens")
    (results,), (expected,) = logged(ours, *names), logged(theirs, *names)
    assert results == pytest.approx(expected, rel=1e-4)


def loss_by_rows(trainer, kind, batches, rows, alpha):
    """The objective of reverse KL, from each row alone with the images of its prompt."""
    models, processor, total = (trainer.model, trainer.teacher.model), vision_processor(kind), 0.0
    for batch in batches:
        for ids, mask, labels, has_labels in zip(
            *(batch[name] for name in ("input_ids", "attention_mask", "labels", "has_labels")), strict=True
        ):
            ids, labels = ids[mask == 1], labels[mask == 1]
            text = processor.tokenizer.decode(ids)
            row = rows[int(re.search(r"What is (\d+)", text)[1])]
            inputs = processor.apply_chat_template(
                messages_of(row), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            assert torch.equal(inputs["input_ids"][0], ids[: inputs["input_ids"].shape[1]])
            added = len(ids) - inputs["input_ids"].shape[1]
            types = {k: torch.nn.functional.pad(v, (0, added)) for k, v in inputs.items() if "token_type" in k}
            inputs = dict(inputs) | types | {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
            is_target = labels[1:] != -100
            with torch.no_grad():
                s, t = (model(**inputs).logits[0, :-1][is_target].log_softmax(-1) for model in models)
            hard = -s.gather(1, labels[1:][is_target][:, None]).sum() * has_labels
            total += alpha * (s.exp() * (s - t)).sum() + (1 - alpha) * hard
    return (total / batches[0]["items"]).item()


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("kind", VISION_KINDS)
def test_each_row_is_generated_and_trained_with_its_own_images(make_on_policy, kind, fraction):
    from hf_distill.trl.on_policy import _join_completions

    rows, alpha = vision_examples(4), 1.0 if fraction == 1 else 0.7
    trainer = make_on_policy(kind, rows, on_policy_fraction=fraction, alpha=alpha, learning_rate=0.0)
    batches, compute_loss = [], trainer.compute_loss

    def record_batch(model, inputs, *more, **kwargs):
        if model.training:
            batches.append(_join_completions(inputs) | {"items": inputs["num_items_in_batch"]})
        return compute_loss(model, inputs, *more, **kwargs)

    trainer.compute_loss = record_batch
    trainer.train()
    assert sum("pixel_values" in batch for batch in batches) == 3  # one row has no image
    assert sum(bool(batch["has_labels"]) for batch in batches) == round(4 * (1 - fraction))
    (loss,) = logged(trainer, "loss")
    assert loss == pytest.approx([loss_by_rows(trainer, kind, batches, rows, alpha)], rel=1e-4)
    assert trainer.evaluate()["eval_kl"] > 0  # of the completions of the data set


def test_a_prompt_of_the_teacher_has_no_images(make_on_policy):
    rows = [row | {"teacher_prompt": row["prompt"]} for row in vision_examples(4)]
    with pytest.raises(DistillError, match="a prompt of the teacher has no images"):
        make_on_policy("llava", rows)


def test_images_of_conversations_are_read_on_policy(make_on_policy):
    rows, options = vision_examples(4), dict(on_policy_fraction=0.5, alpha=0.7)
    losses = []
    for data in (rows, conversations(4)):
        trainer = make_on_policy("qwen", data, **options)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]
