"""Encoders without a head, and losses on embeddings beside those of classifiers, against plain references."""

import pytest
import torch
import transformers as tf
from tiny import build, collate, rows
from torch.nn.functional import cosine_similarity, normalize, one_hot

from hf_distill import DistillConfig, DistillError
from hf_distill.models.features import Features
from hf_distill.models.projectors import ProjectorConfig
from hf_distill.models.sidecar import Sidecar, attach
from hf_distill.teachers import FrozenTeacher, PeerTeacher
from hf_distill.trainer.distiller import Distiller

BERT = dict(
    vocab_size=97,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.3,
)


def encoder(seed=0, layers=1, width=16, cls=tf.BertModel, **config):
    tf.set_seed(seed)
    return cls(tf.BertConfig(**BERT, hidden_size=width, num_hidden_layers=layers, **config))


def unlabeled(n=16, pad="right", seed=1):
    return [{k: v for k, v in row.items() if k != "labels"} for row in rows("bert", n, pad=pad, seed=seed)]


def embed(hidden, mask, pooling):
    """The naive embeddings of each row."""
    tokens = [
        states if mask is None else states[m == 1]
        for states, m in zip(hidden, [0] * len(hidden) if mask is None else mask, strict=True)
    ]
    return torch.stack([{"mean": t.mean(0), "cls": t[0], "last": t[-1]}[pooling] for t in tokens])


def distance(s, t, name, is_normalized=False):
    """The naive loss of each row."""
    if name == "embedding_cosine":
        return 1 - cosine_similarity(s, t)
    return ((normalize(s) - normalize(t)) ** 2 if is_normalized else (s - t) ** 2).mean(1)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "sidecar" not in n}


def assert_same_gradients(model, expected):
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():  # gradients are of the order of 1, and float32 rounds at 1e-7
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def distiller_for(student, teacher, **arguments):
    """A distiller as the trainer builds it, with an attached sidecar."""
    from hf_distill.models.model_types import model_type_of
    from hf_distill.trainer.terms import build_objective

    frozen = FrozenTeacher(teacher)
    frozen.prepare(student, torch.device("cpu"))
    args = DistillConfig("unused", use_cpu=True, **arguments)
    terms = build_objective(args, frozen, output_type=model_type_of(student).output_type).student
    config = ProjectorConfig.of(args.projectors)
    features = Features.match(terms, student, lambda term: frozen.layer_stack(term.stack), config)
    attach(student, Sidecar(features.parts(0)))
    return Distiller(terms, features=features), frozen


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("embedding_cosine", {}),
        ("embedding_cosine", {"pooling": "last", "teacher_pooling": "mean"}),
        ("embedding_mse", {"pooling": "cls"}),
        ("embedding_mse", {"pooling": "mean", "normalize": True}),
    ],
)
def test_loss_and_gradient_of_an_encoder_are_those_of_a_reference(padding, name, options):
    student, teacher, batch = encoder(0), encoder(1, layers=2), collate(unlabeled(pad=padding))
    pooling = options.get("pooling", "mean")
    s = embed(student(**batch).last_hidden_state, batch["attention_mask"], pooling)
    with torch.no_grad():
        t = embed(teacher(**batch).last_hidden_state, batch["attention_mask"], options.get("teacher_pooling", pooling))
    expected = distance(s, t, name, options.get("normalize", False)).mean()
    expected.backward()
    reference = gradients(student)
    student.zero_grad()

    distiller, frozen = distiller_for(student, teacher, divergence={"name": name, **options})
    step = distiller(student, frozen, batch, statistics_every=1)
    step.loss.backward()
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert step.per_token["embedding_similarity"].tolist() == pytest.approx(cosine_similarity(s, t).tolist(), abs=1e-6)
    assert not any(name.startswith("pooler") for name in reference)
    assert_same_gradients(student, reference)


def test_a_projector_maps_the_students_embedding_to_the_teachers_width():
    student, teacher, batch = encoder(0), encoder(1, width=32), collate(unlabeled())
    distiller, frozen = distiller_for(student, teacher, divergence="embedding_mse")
    step = distiller(student, frozen, batch)
    (weight,) = [p for n, p in student.named_parameters() if "projectors" in n]
    step.loss.backward()
    s = embed(student(**batch).last_hidden_state, batch["attention_mask"], "mean") @ weight.T
    t = embed(teacher(**batch).last_hidden_state, batch["attention_mask"], "mean").detach()
    expected = ((s - t) ** 2).mean()
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    similarity = step.per_token["embedding_similarity"]
    torch.testing.assert_close(similarity, cosine_similarity(s, t).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad, torch.autograd.grad(expected, weight)[0], rtol=1e-5, atol=1e-7)


def test_any_split_into_micro_batches_trains_the_same_encoder(make_trainer):
    weights = []
    for batch, accumulation in ((16, 1), (8, 2), (5, 4)):
        trainer = make_trainer(
            model=encoder(0),
            teacher=encoder(1, layers=2, width=32),
            train_dataset=unlabeled(16),
            eval_dataset=None,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            optim="sgd",
            learning_rate=0.5,
            losses=[{"name": "hidden_cosine", "weight": 0.3}, {"name": "embedding_mse", "pooling": "cls"}],
        )
        trainer.train()
        assert all(
            torch.equal(a, b)
            for a, b in zip(trainer.model.pooler.parameters(), encoder(0).pooler.parameters(), strict=True)
        )
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert losses[-1] < losses[0]
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-5, atol=1e-6)


def test_an_evaluation_reports_the_cosine_similarity_of_all_rows(make_trainer, tmp_path):
    """The teacher is a checkpoint with a head and without a pooler, which AutoModel loads without the head."""
    teacher = encoder(1, layers=2, cls=tf.BertForMaskedLM)
    teacher.save_pretrained(tmp_path / "teacher")
    student, data = encoder(0), unlabeled(7, seed=5)
    labeled = [{**row, "labels": torch.tensor(0.5)} for row in data]
    trainer = make_trainer(model=student, teacher=tmp_path / "teacher", train_dataset=labeled, eval_dataset=data)
    batch = collate(data)
    s, t = (
        embed(m(**batch).last_hidden_state, batch["attention_mask"], "mean")
        for m in (student.eval(), teacher.bert.eval())
    )
    expected = cosine_similarity(s, t).mean().item()
    metrics = trainer.evaluate()
    assert metrics["eval_embedding_cosine"] == pytest.approx(expected, abs=1e-6)
    assert metrics["eval_loss"] == metrics["eval_soft_loss"] == pytest.approx(1 - expected, abs=1e-6)
    assert trainer.evaluate(labeled)["eval_loss"] == pytest.approx(metrics["eval_loss"])
    assert not {"eval_kl", "eval_perplexity", "eval_hard_loss"} & metrics.keys()
    assert trainer.predict(data).predictions[0].shape == (7, 12, 16)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Objective: 1 · embedding\\_cosine, averaged over the rows" in card or (
        "Objective: 1 · embedding_cosine, averaged over the rows" in card
    )
    assert "pipeline_tag: feature-extraction" in card
    saved = tf.AutoModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), trainer.model.parameters(), strict=True))


def test_a_teacher_with_another_tokenizer_pools_its_own_tokens(make_trainer):
    student, teacher = encoder(0), encoder(1)
    own, others = unlabeled(5, seed=5), unlabeled(5, pad="left", seed=7)
    data = [
        one | {f"teacher_{name}": value for name, value in other.items()}
        for one, other in zip(own, others, strict=True)
    ]
    trainer = make_trainer(model=student, teacher=teacher, train_dataset=data, eval_dataset=data)
    batches = collate(own), collate(others)
    s, t = (
        embed(m.eval()(**b).last_hidden_state, b["attention_mask"], "mean")
        for m, b in zip((student, teacher), batches, strict=True)
    )
    assert trainer.evaluate()["eval_embedding_cosine"] == pytest.approx(cosine_similarity(s, t).mean().item(), abs=1e-6)


VIT = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, num_labels=3, initializer_range=0.3)
WAV = dict(
    hidden_size=16,
    num_attention_heads=2,
    intermediate_size=32,
    num_labels=3,
    vocab_size=12,
    pad_token_id=0,
    conv_dim=(8, 8),
    conv_kernel=(4, 3),
    conv_stride=(4, 2),
    num_feat_extract_layers=2,
    mask_time_prob=0.0,
    num_conv_pos_embedding_groups=2,
    num_conv_pos_embeddings=4,
    do_stable_layer_norm=True,
    feat_extract_norm="layer",
    classifier_proj_size=16,
    initializer_range=0.3,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    feat_proj_dropout=0.0,
    layerdrop=0.0,
)
WHISPER = dict(
    d_model=16,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    num_mel_bins=8,
    max_source_positions=10,
    num_labels=3,
    dropout=0.0,
    init_std=0.3,
    pad_token_id=0,
)


def vit(seed, layers=1, patch=4, **config):
    tf.set_seed(seed)
    return tf.ViTForImageClassification(
        tf.ViTConfig(**VIT, image_size=8, patch_size=patch, num_hidden_layers=layers, **config)
    )


def wav2vec2(seed, layers=1, cls=tf.Wav2Vec2ForSequenceClassification, **config):
    tf.set_seed(seed)
    return cls(tf.Wav2Vec2Config(**WAV | config, num_hidden_layers=layers))


def whisper_classifier(seed, layers=1):
    tf.set_seed(seed)
    return tf.WhisperForAudioClassification(tf.WhisperConfig(**WHISPER, encoder_layers=layers))


def sound(lengths=(60, 41, 60, 25)):
    """A batch of sounds of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.stack([(torch.arange(60) < n).long() for n in lengths])
    values = torch.randn(len(lengths), 60, generator=generator) * mask
    return {"input_values": values, "attention_mask": mask, "labels": torch.tensor([0, 2, 1, 1])}


def image_batch():
    generator = torch.Generator().manual_seed(3)
    return {"pixel_values": torch.randn(4, 3, 8, 8, generator=generator), "labels": torch.tensor([0, 2, 1, 1])}


def mel_batch():
    generator = torch.Generator().manual_seed(3)
    return {"input_features": torch.randn(4, 8, 20, generator=generator), "labels": torch.tensor([0, 2, 1, 1])}


CLASSIFIERS = {
    "text": (lambda seed, layers=1: build("sequence", seed, layers), lambda: collate(rows("sequence", 4)), "bert"),
    "image": (vit, image_batch, "vit"),
    "audio": (wav2vec2, sound, "wav2vec2"),
    "whisper": (whisper_classifier, mel_batch, "encoder"),
}


def frame_mask(model, batch, num_positions):
    """The positions of the hidden states that are no padding, as the model itself finds them; None if all are."""
    mask = batch.get("attention_mask")
    if mask is None or mask.shape[1] == num_positions:
        return mask
    return model._get_feature_vector_attention_mask(num_positions, mask)


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("name", ["embedding_cosine", "embedding_mse"])
def test_a_loss_on_embeddings_is_added_to_that_of_a_classifier(kind, name):
    make, make_batch, base = CLASSIFIERS[kind]
    student, teacher, batch = make(0).eval(), make(1, layers=2).eval(), make_batch()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    states = []
    for model in (student, teacher):
        hook = getattr(model, base).register_forward_hook(lambda _m, _a, out: states.append(out[0]))
        states.append(model(**inputs).logits)
        hook.remove()
    s_hidden, s_logits, t_hidden, t_logits = states
    mask = frame_mask(student, batch, s_hidden.shape[1])
    s, t = embed(s_hidden, mask, "mean"), embed(t_hidden, mask, "mean").detach()
    p, q = (s_logits / 2).log_softmax(-1), (t_logits / 2).log_softmax(-1).detach()
    soft = 4 * (q.exp() * (q - p)).sum(-1).mean()
    hard = -(one_hot(batch["labels"], s_logits.shape[1]) * s_logits.log_softmax(-1)).sum(-1).mean()
    expected = 0.5 * soft + 0.5 * hard + 0.3 * distance(s, t, name).mean()
    expected.backward()
    reference = gradients(student)
    student.zero_grad()

    distiller, frozen = distiller_for(student, teacher, losses=[{"name": name, "weight": 0.3}])
    step = distiller(student, frozen, batch)
    step.loss.backward()
    assert step.loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert_same_gradients(student, reference)


def test_rows_count_as_often_as_they_have_target_tokens():
    """A token classifier divides by its target tokens, as for the other losses on features of encoders."""
    student, teacher, batch = build("token", 0), build("token", 1), collate(rows("token", 4))
    counts = (batch["labels"] != -100).sum(1)
    s, t = (
        embed(m.bert(batch["input_ids"], batch["attention_mask"])[0], batch["attention_mask"], "mean")
        for m in (student, teacher)
    )
    expected = ((1 - cosine_similarity(s, t)) * counts).sum() / counts.sum()
    distiller, frozen = distiller_for(student, teacher, losses=[{"name": "embedding_cosine"}])
    step = distiller(student, frozen, batch)
    assert step.per_token["embedding_cosine"].mean().item() == pytest.approx(expected.item(), rel=1e-5)


def last_block(model):
    return {
        tf.ViTForImageClassification: lambda: model.vit.layers[-1],
        tf.Wav2Vec2ForSequenceClassification: lambda: model.wav2vec2.encoder.layers[-1],
        tf.WhisperForAudioClassification: lambda: model.encoder.layers[-1],
    }[type(model)]()


@pytest.mark.parametrize("kind", ["image", "audio", "whisper"])
def test_hidden_states_and_attention_of_encoders_are_compared_across_modalities(kind):
    make, make_batch, _ = CLASSIFIERS[kind]
    student, teacher, batch = make(0).eval(), make(1, layers=2).eval(), make_batch()
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    batch.pop("attention_mask", None)
    options = {"stack": "encoder"} if kind == "whisper" else {}
    losses = [{"name": n, **options} for n in ("hidden_mse", "hidden_cosine", "attention_kl", "value_relation")]
    distiller, frozen = distiller_for(student, teacher, losses=losses)
    step = distiller(student, frozen, batch)
    states, maps = [], []
    for model in (student, teacher):
        hook = last_block(model).register_forward_hook(
            lambda _m, _a, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
        outputs = model(**{k: v for k, v in batch.items() if k != "labels"}, output_attentions=True)
        maps.append(outputs.attentions[-1])
        hook.remove()
    s, t = states
    assert step.per_token["hidden_mse"].tolist() == pytest.approx(((s - t) ** 2).mean((1, 2)).tolist(), rel=1e-5)
    assert step.per_token["hidden_cosine"].tolist() == pytest.approx(
        (1 - cosine_similarity(s, t, -1)).mean(1).tolist(), rel=1e-5, abs=1e-6
    )
    kl = (maps[1] * (maps[1].log() - maps[0].log())).sum(-1).mean((1, 2))
    assert step.per_token["attention_kl"].tolist() == pytest.approx(kl.tolist(), rel=1e-4, abs=1e-6)
    assert step.per_token["value_relation"].isfinite().all()


@pytest.mark.parametrize("name", ["hidden_mse", "attention_kl", "value_relation"])
def test_other_numbers_of_patches_or_frames_are_refused(name):
    pairs = [
        (vit(0), vit(1, patch=2), image_batch()),
        (wav2vec2(0), wav2vec2(1, conv_stride=(4, 1)), sound((60, 60, 60, 60))),
    ]
    for student, teacher, batch in pairs:
        for model in (student, teacher):
            model.set_attn_implementation("eager")
        distiller, frozen = distiller_for(student, teacher, losses=[{"name": name}])
        with pytest.raises(DistillError, match="use models with the same number of positions"):
            distiller(student, frozen, batch)


def test_embeddings_are_compared_with_layerdrop():
    """It skips blocks of a student at random, and the last hidden states exist in any case."""
    student, teacher = wav2vec2(0, layerdrop=1.0).train(), wav2vec2(1)
    distiller, frozen = distiller_for(student, teacher, losses=[{"name": "embedding_cosine"}])
    assert distiller(student, frozen, sound()).loss.isfinite()
    with pytest.raises(DistillError, match="layerdrop"):
        distiller_for(student, teacher, losses=[{"name": "hidden_mse"}])


def test_embeddings_of_other_numbers_of_patches_can_be_compared():
    student, teacher = vit(0), vit(1, patch=2)
    distiller, frozen = distiller_for(student, teacher, losses=[{"name": "embedding_cosine"}])
    batch = image_batch()
    s, t = (m.vit(batch["pixel_values"])[0].mean(1) for m in (student, teacher))
    step = distiller(student, frozen, batch)
    assert step.per_token["embedding_cosine"].tolist() == pytest.approx(
        (1 - cosine_similarity(s, t)).tolist(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.3}, "alpha is 0.3, and an encoder has no labels"),
        ({"temperature": 3.0}, "embeddings, which no temperature divides"),
        ({"divergence": "forward_kl"}, "use embedding_mse or embedding_cosine"),
        ({"losses": [{"name": "cross_entropy"}]}, "use embedding_mse or embedding_cosine"),
        ({"label_smoothing_factor": 0.1}, "there are no labels: set it to 0"),
        ({"divergence": {"name": "embedding_mse", "pooling": "max"}}, "it must be one of mean, cls, last"),
        ({"divergence": {"name": "embedding_mse", "layers": "last:1"}}, "has no option 'layers'"),
        ({"projectors": "none"}, "projectors is none"),
        ({"teacher": lambda: encoder(1, cls=tf.BertForMaskedLM)}, "as AutoModel loads it"),
        ({"teacher": lambda: PeerTeacher(encoder(1))}, "PeerTeacher is trained on labels"),
    ],
)
def test_arguments_without_a_meaning_for_encoders_are_refused(make_trainer, options, message):
    options = {k: v() if callable(v) else v for k, v in options.items()}
    defaults = {
        "model": encoder(0),
        "teacher": encoder(1, width=32),
        "train_dataset": unlabeled(4),
        "eval_dataset": None,
    }
    with pytest.raises(DistillError, match=message):
        make_trainer(**defaults | options)


def test_a_loss_on_embeddings_is_no_divergence_of_a_classifier(make_trainer):
    with pytest.raises(DistillError, match="put this loss into `losses`"):
        make_trainer("sequence", divergence="embedding_cosine")


def test_a_model_with_an_encoder_and_a_decoder_is_no_encoder(make_trainer):
    tf.set_seed(0)
    size = dict(vocab_size=97, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
    bart = tf.BartModel(tf.BartConfig(**size, encoder_attention_heads=2, decoder_attention_heads=2))
    with pytest.raises(DistillError, match=r"BartModel has an encoder and a decoder and no head"):
        make_trainer(model=bart, teacher=encoder(1), train_dataset=unlabeled(4), eval_dataset=None)


def test_packed_rows_have_no_embedding():
    student, teacher = encoder(0), encoder(1)
    distiller, frozen = distiller_for(student, teacher)
    batch = {
        "input_ids": torch.randint(3, 97, (2, 6)),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]),
    }
    with pytest.raises(DistillError, match="several packed documents"):
        distiller(student, frozen, batch)


def test_a_decoder_is_an_encoder_that_pools_its_last_token():
    def llama(seed):
        tf.set_seed(seed)
        size = dict(vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        return tf.LlamaModel(tf.LlamaConfig(**size, initializer_range=0.3))

    student, teacher = llama(0), llama(1)
    distiller, frozen = distiller_for(student, teacher, divergence={"name": "embedding_cosine", "pooling": "last"})
    values = []
    for side in ("left", "right"):
        batch = collate(unlabeled(6, pad=side))
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        batch = {**batch, "position_ids": positions} if side == "left" else batch
        values.append(distiller(student, frozen, batch).per_token["soft"])
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)
