"""Vision-language models in `DistillTrainer`: images reach both models, and no token of an image is a target."""

import copy

import peft
import pytest
import torch
from tiny import build, one_step
from tiny_vision import IMAGE_ID, VISION_KINDS, VOCAB, vision_examples, vision_processor, vlm
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, Trainer, set_seed
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hf_distill import DistillConfig, DistillError, DistillTrainer
from hf_distill.cache import write_cache
from hf_distill.teachers import (
    AdapterBaseTeacher,
    CachedTeacher,
    EMATeacher,
    FrozenTeacher,
    PeerTeacher,
    RoutedTeacher,
    SnapshotTeacher,
)

TEMPERATURE, ALPHA = 2.0, 0.7


def collator_of(kind, side="right"):
    """TRL's collator of prompts and completions, whose labels are all tokens, those of images included."""
    collate = DataCollatorForVisionLanguageModeling(vision_processor(kind))

    def collated(rows):
        batch = collate(copy.deepcopy(rows))
        return batch if side == "right" else left_padded(batch)

    return collated


def left_padded(batch):
    """The batch with its padding on the left."""
    counts = batch["attention_mask"].sum(1)
    shape, width = batch["input_ids"].shape, batch["input_ids"].shape[1]
    order = (torch.arange(width) + counts[:, None]) % width
    tensors = {k: v.gather(1, order) if v.shape == shape else v for k, v in batch.items()}
    return tensors


@pytest.fixture
def make_vision(tmp_path):
    """`make_vision("qwen", temperature=1.0)`: a trainer of tiny vision-language models."""

    def make(kind="qwen", *, folder="out", cls=DistillTrainer, side="right", **options):
        passed = {k: options.pop(k) for k in list(options) if k not in DistillConfig.__dataclass_fields__}
        fields = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"} | options
        args = DistillConfig(
            str(tmp_path / folder), dataloader_pin_memory=False, remove_unused_columns=False, report_to="none", **fields
        )
        arguments = dict(
            model=vlm(kind, 0),
            train_dataset=vision_examples(),
            eval_dataset=vision_examples(3),
            data_collator=collator_of(kind, side),
            processing_class=vision_processor(kind),
        )
        if cls is DistillTrainer:
            arguments["teacher"] = vlm(kind, 1, layers=3, width=24)
        return cls(args=args, **arguments | passed)

    return make


def reference(student, teacher, batch):
    """The objective in ten lines."""
    labels = batch["labels"][:, 1:].clone()
    labels[(labels == IMAGE_ID) | (batch["attention_mask"][:, :-1] == 0)] = -100
    is_target = labels != -100
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    student_logits = student(**inputs).logits[:, :-1][is_target]
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits[:, :-1][is_target]
    p, q = ((logits / TEMPERATURE).log_softmax(-1) for logits in (teacher_logits, student_logits))
    soft = (p.exp() * (p - q)).sum() * TEMPERATURE**2
    hard = torch.nn.functional.cross_entropy(student_logits, labels[is_target], reduction="sum")
    return (ALPHA * soft + (1 - ALPHA) * hard) / is_target.sum()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", VISION_KINDS)
def test_loss_and_gradient_equal_the_reference_for_any_split_and_padding(make_vision, kind, side):
    rows = vision_examples(4)
    student, teacher = vlm(kind, 0), vlm(kind, 1, layers=3, width=24)
    batch = collator_of(kind, side)(rows)
    expected = reference(student, teacher.eval(), batch)
    expected.backward()
    for micro, pieces in [(4, 1), (1, 4)]:
        log, gradient = one_step(
            make_vision,
            kind,
            micro,
            pieces,
            side=side,
            train_dataset=rows,
            temperature=TEMPERATURE,
            alpha=ALPHA,
            train_sampling_strategy="sequential",
        )
        assert log["loss"] == pytest.approx(expected.item(), rel=1e-5)
        for name, parameter in student.named_parameters():
            of_reference = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(gradient[name], of_reference, rtol=1e-4, atol=2e-6)


def test_without_a_teacher_it_equals_the_trainer_bit_for_bit(make_vision):
    plain = make_vision(cls=Trainer, folder="plain", gradient_accumulation_steps=2)
    ours = make_vision(teacher=None, gradient_accumulation_steps=2)
    for trainer in (plain, ours):
        trainer.train()
    names = ("loss", "grad_norm")
    logs = [[[log[n] for n in names] for log in t.state.log_history if "loss" in log] for t in (plain, ours)]
    assert logs[0] == logs[1]
    expected = plain.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.model.state_dict().items())
    assert ours.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_the_output_head_is_measured_on_a_few_rows_of_text(make_vision, kind):
    trainer = make_vision(kind, max_steps=1, per_device_train_batch_size=4)
    calls = {trainer.model: [], trainer.teacher.model: []}

    def record(module, args, inputs):
        calls[module].append((len(inputs["input_ids"]), "pixel_values" in inputs))

    for model in calls:
        model.register_forward_pre_hook(record, with_kwargs=True)
    trainer.train()
    for *short, last in calls.values():
        assert last == (4, True)
        assert short
        assert all(rows <= 2 and not has_images for rows, has_images in short)


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_hidden_states_are_those_of_the_language_model_at_the_target_tokens(make_vision, kind):
    rows = vision_examples(4)
    student, teacher = vlm(kind, 0), vlm(kind, 1, layers=2)
    log, _ = one_step(
        make_vision,
        kind,
        4,
        1,
        train_dataset=rows,
        teacher=teacher,
        losses=[{"name": "hidden_mse"}],
        alpha=1.0,
        self_check=False,
    )
    batch = collator_of(kind)(rows)
    labels = batch.pop("labels")[:, 1:]
    is_target = (labels != -100) & (labels != IMAGE_ID)
    features = []
    for model in (student, teacher):
        captured = []
        for block in model.get_decoder().layers:
            block.register_forward_hook(
                lambda module, args, output, captured=captured: captured.append(
                    (output[0] if isinstance(output, tuple) else output)[:, :-1][is_target]
                )
            )
        with torch.no_grad():
            model.train(model is student)(**batch)
        features.append(captured)
    squares = [(one - other).square().mean(-1) for one, other in zip(*features, strict=True)]
    assert log["hidden_mse_loss"] == pytest.approx(torch.stack(squares).mean().item(), rel=1e-5)


def lora(model):
    """The model with adapters on its language model."""
    config = peft.LoraConfig(target_modules=r".*(language_model|text_model).*q_proj", r=2, init_lora_weights=False)
    return peft.get_peft_model(model, config)


TEACHERS = {
    "frozen": lambda kind: {"teacher": FrozenTeacher(vlm(kind, 1, width=24))},
    "EMA": lambda kind: {"teacher": EMATeacher(decay=0.5)},
    "adapter base": lambda kind: {"teacher": AdapterBaseTeacher(), "model": lora(vlm(kind, 0))},
    "peer": lambda kind: {"teacher": PeerTeacher(vlm(kind, 1, width=24))},
    "snapshot": lambda kind: {"teacher": SnapshotTeacher(2), "learning_rate": 0.1, "max_steps": 3},
    "two": lambda kind: {"teacher": {"one": vlm(kind, 1), "two": vlm(kind, 2, width=24)}},
    "a language model, for rows without images": lambda kind: {
        "teacher": build("llama", 1, vocab=VOCAB),
        "train_dataset": vision_examples(8, counts=(0,)),
        "eval_dataset": vision_examples(8, counts=(0,)),
    },
}


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_of_these_kinds_read_images(make_vision, name):
    kind = list(VISION_KINDS)[list(TEACHERS).index(name) % 4]
    trainer = make_vision(kind, **{"max_steps": 2, "learning_rate": 0.01} | TEACHERS[name](kind))
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_kl"] > 0.001
    assert 0 <= metrics["eval_agreement"] <= 1


def test_router_losses_of_a_model_that_reads_images_are_added(make_vision):
    rows, kind = vision_examples(4), "qwen"
    student = mixture_of_experts()
    batch = collator_of(kind)(rows)
    batch["labels"][batch["labels"] == IMAGE_ID] = -100
    expected = student(**batch)
    expected.loss.backward()
    assert expected.aux_loss > 0
    options = dict(model=mixture_of_experts(), teacher=vlm(kind, 1), losses=[{"name": "forward_kl", "weight": 1e-9}])
    log, gradient = one_step(make_vision, kind, 4, 1, train_dataset=rows, alpha=0.0, **options)
    assert log["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-3, atol=2e-6)


def mixture_of_experts():
    """A tiny Qwen3-VL with experts, which reads the batches of `vision_processor("qwen")`."""
    set_seed(0)
    text = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    text |= dict(head_dim=8, intermediate_size=32, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    text |= dict(rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4})
    vision = dict(depth=2, hidden_size=16, num_heads=2, intermediate_size=32, out_hidden_size=16, patch_size=4)
    vision |= dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
    ids = dict(image_token_id=IMAGE_ID, vision_start_token_id=4, vision_end_token_id=5)
    config = Qwen3VLMoeConfig(text_config=text | dict(output_router_logits=True), vision_config=vision, **ids)
    config.text_config.router_aux_loss_coef = 0.5
    return Qwen3VLMoeForConditionalGeneration(config)


@pytest.mark.parametrize("architecture", ["of the class", "unknown"])
def test_a_teacher_is_loaded_from_its_folder(make_vision, tmp_path, architecture):
    kind, folder = "qwen", str(tmp_path / "teacher")
    model = vlm(kind, 1)
    model.save_pretrained(folder)
    vision_processor(kind).tokenizer.save_pretrained(folder)
    if architecture == "unknown":
        file = tmp_path / "teacher" / "config.json"
        file.write_text(file.read_text().replace(type(model).__name__, "Unknown"))
    losses = []
    for teacher in (folder, model):
        trainer = make_vision(kind, teacher=teacher, max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]
    assert type(trainer.teacher.model) is type(model)


CACHE = "a cache of a language model finds an example by its tokens"
UNREAD = {
    "a language model as teacher": ({"teacher": lambda: build("llama", 1, vocab=VOCAB)}, "the teacher is a Llama"),
    "a language model as student": ({"model": lambda: build("llama", 1, vocab=VOCAB)}, "the student is a Llama"),
    "one of two teachers": (
        {"teacher": lambda: {"one": vlm("llava", 1), "two": build("llama", 1, vocab=VOCAB)}},
        "the teacher 'two' is a Llama",
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_model_that_would_leave_images_out_is_refused(make_vision, name):
    options, message = UNREAD[name]
    trainer = make_vision("llava", **{key: make() for key, make in options.items()})
    with pytest.raises(DistillError, match=message):
        trainer.train()


def test_caches_and_teachers_of_single_rows_refuse_images(make_vision, tmp_path):
    kind = "llava"
    with pytest.raises(DistillError, match=CACHE):
        write_cache(tmp_path / "cache", vlm(kind), vision_examples(4), collator=collator_of(kind))
    text = vision_examples(4, counts=(0,))
    write_cache(tmp_path / "cache", vlm(kind), text, collator=collator_of(kind))
    trainer = make_vision(kind, teacher=CachedTeacher(str(tmp_path / "cache")))
    with pytest.raises(DistillError, match="is a CachedTeacher, which reads text only"):
        trainer.train()
    teachers = RoutedTeacher({"one": vlm(kind, 1), "two": vlm(kind, 2)})
    rows = [row | {"teacher": "one"} for row in vision_examples(4)]
    trainer = make_vision(kind, teacher=teachers, train_dataset=rows, eval_dataset=rows)
    with pytest.raises(DistillError, match="is a RoutedTeacher, which reads text only"):
        trainer.train()


def test_losses_on_features_of_the_vision_part_are_refused(make_vision):
    with pytest.raises(DistillError, match="not those of its encoder: remove `stack`"):
        make_vision(losses=[{"name": "hidden_mse", "stack": "encoder"}])


def test_a_teacher_of_another_family_reads_the_images_of_its_own_processor(make_vision):
    rows, collators = vision_examples(4), {}
    for kind in ("llava", "qwen"):
        collators[kind] = DataCollatorForVisionLanguageModeling(vision_processor(kind), completion_only_loss=True)

    def collate(rows):
        student, teacher = (collators[kind](copy.deepcopy(rows)) for kind in ("llava", "qwen"))
        return {**student, **{f"teacher_{name}": values for name, values in teacher.items()}}

    student, teacher = vlm("llava", 0), vlm("qwen", 1, width=24)
    options = dict(teacher=teacher, train_dataset=rows, data_collator=collate, temperature=1.0, alpha=1.0)
    log, _ = one_step(make_vision, "llava", 4, 1, **options)
    logits = []
    for kind, model in (("llava", student), ("qwen", teacher)):
        batch = collators[kind](copy.deepcopy(rows))
        is_target = batch.pop("labels")[:, 1:] != -100
        with torch.no_grad():
            logits.append(model(**batch).logits[:, :-1][is_target].log_softmax(-1))
    q, p = logits
    assert log["loss"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
