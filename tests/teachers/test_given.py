"""Teachers as users give them: by path, as adapters, of other kinds; and what they cannot read."""

import pytest
import torch
import transformers as tf
from tiny import build, collate, rows

from hf_distill import DistillError, FrozenTeacher
from hf_distill.models.model_call import prepare_inputs
from hf_distill.teachers.input_limits import InputLimits

SMALL = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
)


def vit(seed=0, **config):
    tf.set_seed(seed)
    return tf.ViTForImageClassification(tf.ViTConfig(**SMALL, **config)).eval()


def images(count=8):
    return [{"pixel_values": torch.randn(3, 8, 8), "labels": torch.tensor(i % 3)} for i in range(count)]


def first_soft_loss(trainer):
    return trainer.evaluate()["eval_soft_loss"]


def test_an_image_teacher_is_loaded_from_its_path(make_trainer, tmp_path):
    teacher = vit(1, num_labels=3)
    teacher.save_pretrained(tmp_path / "teacher")
    data = images()
    losses = [
        first_soft_loss(
            make_trainer(model=vit(num_labels=3), teacher=teacher_or_path, train_dataset=data, eval_dataset=data)
        )
        for teacher_or_path in (teacher, tmp_path / "teacher")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_a_folder_of_adapters_is_loaded_with_its_base(make_trainer, tmp_path, modules_to_save):
    from peft import LoraConfig, get_peft_model

    build("llama", 1).save_pretrained(tmp_path / "base")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False, modules_to_save=modules_to_save
    )
    adapted = get_peft_model(base, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)
    adapted.save_pretrained(tmp_path / "adapters")
    by_object, by_path = (
        first_soft_loss(make_trainer(teacher=teacher_or_path))
        for teacher_or_path in (adapted.eval(), str(tmp_path / "adapters"))
    )
    assert by_path == pytest.approx(by_object, rel=1e-5)
    assert by_path != pytest.approx(first_soft_loss(make_trainer(teacher=str(tmp_path / "base"))), rel=1e-3)


class Around(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **inputs):
        return self.model(**inputs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: __file__, "is a file: give the folder of a model"),
        (lambda: "no/such/path", "no/such/path is a path, and there is no such folder"),
        (lambda: "~/no such folder", "no such folder is a path, and there is no such folder"),
        (lambda: 3, "The teacher is of the type int"),
    ],
)
def test_values_that_are_no_teacher_are_refused_with_the_reason(make_trainer, make, message):
    with pytest.raises(DistillError, match=message):
        make_trainer(teacher=make())


def test_a_module_around_a_teacher_is_of_the_type_of_the_student(make_trainer):
    teacher = build("llama", 1)
    assert first_soft_loss(make_trainer(teacher=Around(teacher))) == first_soft_loss(make_trainer(teacher=teacher))


def bert(cls, **config):
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=97)
    return cls(tf.BertConfig(**small, num_labels=5, **config))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: bert(tf.BertForSequenceClassification, problem_type="multi_label_classification"), "multi_label"),
        (lambda: bert(tf.BertModel), "has no weights for classifier"),
        (lambda: bert(tf.BertForTokenClassification), "is a token classifier"),
        (lambda: bert(tf.BertForMaskedLM), "is a masked language model"),
    ],
)
def test_a_checkpoint_that_is_no_classifier_is_refused(make_trainer, tmp_path, model, message):
    model().save_pretrained(tmp_path / "teacher")
    with pytest.raises(DistillError, match=message):
        make_trainer("sequence", teacher=str(tmp_path / "teacher"))


def test_classes_named_by_strings_are_those_named_by_numbers(make_trainer):
    names = ["cat", "dog", "owl"]
    student, teacher = (vit(i, id2label=dict(enumerate(names))) for i in range(2))
    student.config.id2label = {str(i): name for i, name in enumerate(names)}
    make_trainer(model=student, teacher=teacher, train_dataset=images(), eval_dataset=images())
    student.config.id2label["2"] = "fox"
    with pytest.raises(DistillError, match="Class 2 is 'owl' for the teacher and 'fox'"):
        make_trainer(model=student, teacher=teacher, train_dataset=images(), eval_dataset=images())


@pytest.mark.parametrize("as_data_set", [False, True])
def test_ids_beyond_the_embedding_of_the_teacher_are_refused_before_training(make_trainer, as_data_set):
    from datasets import Dataset

    student = build("llama", 0)
    student.resize_token_embeddings(100)
    data = [{"input_ids": [5, 6, 98, 7], "attention_mask": [1, 1, 1, 1], "labels": [5, 6, 98, 7]}] * 4
    teacher_or_path = Dataset.from_list(data) if as_data_set else data
    with pytest.raises(DistillError, match=r"train_dataset: .* token id 98, .* has 97 rows"):
        make_trainer(model=student, train_dataset=teacher_or_path)


def test_padding_ids_beyond_the_teachers_embedding_do_not_change_the_loss(make_trainer):
    student = build("llama", 0)
    student.resize_token_embeddings(100)
    losses = []
    for pad in (0, 99):
        data = [
            {**row, "input_ids": row["input_ids"].masked_fill(row["attention_mask"] == 0, pad)}
            for row in rows("llama", 7)
        ]
        losses.append(first_soft_loss(make_trainer(model=student, train_dataset=data, eval_dataset=data)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_ids_and_positions_are_checked_in_each_batch():
    student, teacher = build("gpt2", 0), build("gpt2", 1)
    limits = InputLimits.of(teacher, student)
    assert (limits.positions, limits.is_id_checked) == (64, False)
    with pytest.raises(DistillError, match="65 tokens, and the teacher has 64 positions"):
        limits.readable({"input_ids": torch.ones(1, 65, dtype=torch.long)})
    packed = torch.arange(65)[None] % 10
    limits.readable({"input_ids": torch.ones(1, 65, dtype=torch.long), "position_ids": packed})
    assert InputLimits.of(build("llama"), build("llama")).positions is None
    small = dict(vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    roberta = tf.RobertaForMaskedLM(tf.RobertaConfig(**small, max_position_embeddings=20, pad_token_id=1))
    assert InputLimits.of(roberta, roberta).positions == 18


def test_the_head_that_peft_ties_to_a_trained_embedding_has_all_ids(make_trainer):
    from peft import LoraConfig, get_peft_model

    student = build("llama", 0)
    student.config.tie_word_embeddings = True
    student.tie_weights()
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    trainer = make_trainer(model=get_peft_model(student, lora), max_steps=1)
    trainer.train()
    batch = collate(rows("llama", 7, seed=5))
    model = trainer.model.eval()
    with torch.no_grad():
        expected = model(**prepare_inputs(model.get_base_model(), batch), labels=batch["labels"]).loss
    assert trainer.evaluate()["eval_hard_loss"] == pytest.approx(float(expected), rel=1e-4)


def swapped_tokenizer(words):
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


class Processor:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["sequence", "token", "bert"])
@pytest.mark.parametrize("wrap", [lambda tokenizer: tokenizer, Processor])
def test_the_tokenizers_of_classifiers_and_processors_are_compared(make_trainer, kind, wrap):
    one, other = swapped_tokenizer(["good", "bad"]), swapped_tokenizer(["bad", "good"])
    teacher = FrozenTeacher(build(kind, 1), processing_class=wrap(other))
    with pytest.raises(DistillError, match="2 ids mean different"):
        make_trainer(kind, teacher=teacher, processing_class=wrap(one)).train()


def test_ids_that_the_tokenizer_of_the_teacher_lacks_are_warned_of(make_trainer, monkeypatch):
    from hf_distill.teachers import compatibility as vocabulary

    warnings = []
    monkeypatch.setattr(vocabulary.logger, "warning_once", warnings.append)
    more, fewer = swapped_tokenizer(["good", "bad", "new"]), swapped_tokenizer(["good", "bad"])
    make_trainer("bert", teacher=FrozenTeacher(build("bert", 1), processing_class=fewer), processing_class=more)
    assert any("lacks 1 ids of the student's (first: 4 'new')" in text for text in warnings)


def test_the_tokenizer_of_the_teacher_is_loaded_with_its_options(make_trainer, tmp_path, monkeypatch):
    from hf_distill.teachers import compatibility as vocabulary

    build("llama", 1).save_pretrained(tmp_path / "teacher")
    calls = []

    def from_pretrained(path, **options):
        calls.append((path, options))
        raise OSError

    monkeypatch.setattr(vocabulary.AutoTokenizer, "from_pretrained", from_pretrained)
    path = str(tmp_path / "teacher")
    make_trainer(teacher=path, teacher_init_kwargs={"revision": "v2", "trust_remote_code": True})
    options = dict(calls)[path]
    assert options == {"revision": "v2", "trust_remote_code": True, "local_files_only": True}
    make_trainer(teacher=path)
    assert calls[-1][1]["trust_remote_code"] is False


def test_features_of_images_are_compared_at_every_position(make_trainer):
    student, teacher = vit(0, num_labels=3), vit(1, num_labels=3)
    data = images()
    losses = [{"name": "hidden_mse", "layers": [[0, 0]]}, {"name": "value_relation", "layers": [[0, 0]]}]
    trainer = make_trainer(model=student, teacher=teacher, train_dataset=data, eval_dataset=data, losses=losses)
    trainer.train()
    student.eval()
    pixels = torch.stack([row["pixel_values"] for row in data])
    outputs = []
    handles = [m.vit.layers[0].register_forward_hook(lambda *call: outputs.append(call[2])) for m in (student, teacher)]
    with torch.no_grad():
        student(pixels), teacher(pixels)
    for handle in handles:
        handle.remove()
    student_hidden, teacher_hidden = (output[0] if isinstance(output, tuple) else output for output in outputs)
    assert trainer.evaluate()["eval_hidden_mse_loss"] == pytest.approx(
        float((student_hidden - teacher_hidden).square().mean()), rel=1e-5
    )


def test_features_of_images_of_other_positions_are_refused(make_trainer):
    tf.set_seed(0)
    finer = tf.ViTForImageClassification(tf.ViTConfig(**(SMALL | {"patch_size": 2}), num_labels=3))
    trainer = make_trainer(
        model=vit(num_labels=3), teacher=finer, train_dataset=images(), losses=[{"name": "hidden_mse"}], max_steps=1
    )
    with pytest.raises(DistillError, match="and the other of shape"):
        trainer.train()
