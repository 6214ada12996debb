import pytest
import torch
from tiny import build, rows
from transformers import BertConfig, BertForSequenceClassification

from hf_distill import DistillError, FrozenTeacher
from hf_distill.recipe.smoke import byte_tokenizer


@pytest.fixture
def saved(tmp_path):
    """A folder with a tiny model and its tokenizer."""
    tokenizer = byte_tokenizer()
    build("llama", 1, vocab=len(tokenizer)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_the_teacher_is_frozen_in_place_and_moved_once(make_trainer, monkeypatch):
    teacher = build("llama", 1, dropout=0.5).train()
    moves = []
    monkeypatch.setattr(teacher, "to", lambda *args, **kwargs: moves.append(args) or teacher)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    trainer = make_trainer(teacher=teacher)
    trainer.train()
    assert trainer.teacher.model is teacher
    assert len(moves) == 1
    assert not teacher.training
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in teacher.named_parameters())


def test_the_teacher_is_in_neither_optimizer_nor_checkpoint(make_trainer):
    from pathlib import Path

    from safetensors import safe_open

    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trainer.model.parameters()}
    with safe_open(Path(trainer.args.output_dir) / "checkpoint-2" / "model.safetensors", "pt") as f:
        assert set(f.keys()) == set(trainer.model.state_dict())


def test_a_teacher_passed_as_a_path_is_loaded_in_the_students_class(make_trainer, saved):
    vocab = len(byte_tokenizer())
    trainer = make_trainer(
        model=build("llama", 0, vocab=vocab), teacher=str(saved), teacher_init_kwargs={"dtype": "bfloat16"}
    )
    trainer.train()
    assert type(trainer.teacher.model) is type(trainer.model)
    assert trainer.teacher.model.dtype == torch.bfloat16


@pytest.mark.parametrize("vocabularies", [(97, 101), (101, 97)])
def test_padded_vocabularies_train_in_both_directions(make_trainer, vocabularies):
    student, teacher = (build("llama", seed, vocab=v) for seed, v in enumerate(vocabularies))
    trainer = make_trainer(model=student, teacher=teacher, learning_rate=1e-2, max_steps=20)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert 0 < trainer.evaluate()["eval_kl"] < before


def relabelled(tokenizer, i, j):
    """The same tokenizer with two tokens swapped."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    data = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = data["model"]["vocab"]
    names = {v: k for k, v in vocab.items()}
    vocab[names[i]], vocab[names[j]] = j, i
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token="<|end|>")


def test_another_tokenizer_is_refused_with_the_first_id_that_differs(make_trainer):
    tokenizer = byte_tokenizer()
    vocab = len(tokenizer)
    teacher = FrozenTeacher(build("llama", 1, vocab=vocab), processing_class=relabelled(tokenizer, 40, 41))
    with pytest.raises(DistillError, match=r"2 ids mean different tokens \(first: 40 "):
        make_trainer(model=build("llama", 0, vocab=vocab), teacher=teacher, processing_class=tokenizer)


def test_another_tokenizer_is_refused_before_the_weights_are_loaded(make_trainer, saved, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    tokenizer = byte_tokenizer()
    student = build("llama", 0, vocab=len(tokenizer))
    with pytest.raises(DistillError, match="mean different tokens"):
        make_trainer(model=student, teacher=str(saved), processing_class=relabelled(tokenizer, 40, 41))


def test_a_tokenizer_that_splits_differently_is_refused():
    from tokenizers import pre_tokenizers

    from hf_distill.teachers.compatibility import check_vocabulary

    one, other = byte_tokenizer(), byte_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(DistillError, match="split text into tokens differently"):
        check_vocabulary(one, other, 300, 300)


SAME_TEXT = ("{{ messages[0]['content'] }}", "{% generation %}{{ messages[0].content }}{% endgeneration %}")


@pytest.mark.parametrize("templates", [("a", "b"), ("a", "a"), (None, "a"), SAME_TEXT])
def test_a_teacher_with_another_chat_template_is_warned_of(templates, monkeypatch):
    from hf_distill.teachers import compatibility as vocabulary

    warnings, tokenizers = [], [byte_tokenizer(), byte_tokenizer()]
    for tokenizer, template in zip(tokenizers, templates, strict=True):
        tokenizer.chat_template = template
    monkeypatch.setattr(vocabulary.logger, "warning_once", warnings.append)
    vocabulary.check_vocabulary(*tokenizers, 258, 258)
    assert ["render conversations differently" in text for text in warnings] == (
        [True] if templates == ("a", "b") else []
    )


def test_the_student_as_its_frozen_teacher_is_refused(make_trainer):
    model = build("llama", 0)
    with pytest.raises(DistillError, match="same object"):
        make_trainer(model=model, teacher=model)
    assert all(p.requires_grad for p in model.parameters())


def test_two_model_types_are_refused(make_trainer):
    with pytest.raises(DistillError, match="teacher is a masked language model and the student a causal"):
        make_trainer(teacher=build("bert", 1))


def classifier(**config):
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=97)
    return BertForSequenceClassification(BertConfig(**small, **config))


def test_classifiers_with_different_classes_are_refused(make_trainer):
    with pytest.raises(DistillError, match="teacher has 3 classes and the student 5"):
        make_trainer("sequence", teacher=classifier(num_labels=3))
    cats, dogs = {0: "cat", 1: "dog"}, {0: "dog", 1: "cat"}
    with pytest.raises(DistillError, match="Class 0 is 'dog' for the teacher and 'cat' for the student"):
        make_trainer("sequence", model=classifier(id2label=cats), teacher=classifier(id2label=dogs))


def test_a_teacher_gets_only_the_inputs_that_it_accepts(make_trainer):
    data = [{**row, "token_type_ids": torch.zeros(12, dtype=torch.long)} for row in rows("bert")]
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    teacher = DistilBertForMaskedLM(DistilBertConfig(vocab_size=97, dim=16, n_layers=1, n_heads=1, hidden_dim=16))
    trainer = make_trainer("bert", teacher=teacher, train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[0]["soft_loss"] > 0
