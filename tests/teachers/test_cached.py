"""A teacher on disk teaches as the teacher itself, within what its kind promises."""

import math
import threading

import pytest
import torch
from tiny import VOCAB, build, collate, rows

from hf_distill import DistillError
from hf_distill.cache import write_cache
from hf_distill.cache.example_keys import batch_checksum
from hf_distill.core.logits import DenseLogits, LazyLogits, SparseLogProbs
from hf_distill.core.signals import Signals
from hf_distill.core.targets import Targets
from hf_distill.data import Collator
from hf_distill.losses.fused import ChunkedLoss
from hf_distill.losses.objective import objective
from hf_distill.teachers import CachedTeacher, EMATeacher, FrozenTeacher, MultiTeacher


def big(kind="llama", **options):
    return build(kind, 1, **{"layers": 3, "width": 48} | options)


def cache(folder, of="llama", *data, model=None, **options):
    data = data or (rows(of, 32), rows(of, 7, seed=5))
    options_of_cache = {"collator": collate, "kind": "hidden", "dtype": "float32", "batch_size": 4, "shard_rows": 8}
    write_cache(folder, big(of) if model is None else model, *data, **options_of_cache | options)
    return CachedTeacher(str(folder))


def curve(trainer, *names):
    trainer.train()
    return [[log[name] for name in names or ("loss",)] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, "float32") for kind in ("llama", "gpt2", "bert", "t5")] + [("llama", "bfloat16")]
)
def test_a_cache_of_hidden_states_gives_the_losses_of_the_teacher(make_trainer, tmp_path, kind, dtype):
    """Shuffled, over two epochs, in another batch size than they were written in, with workers."""
    options = dict(max_steps=10, per_device_train_batch_size=6, learning_rate=1e-2, divergence="js", temperature=3.0)
    options |= {"dataloader_num_workers": 1} if kind == "llama" else {}
    online = make_trainer(kind, teacher=big(kind), folder="online", **options)
    cached = make_trainer(kind, teacher=cache(tmp_path / "cache", kind, dtype=dtype), folder="cached", **options)
    bound = {"rel": 1e-6} if dtype == "float32" else {"rel": 3e-3}
    for a, b in zip(curve(online), curve(cached), strict=True):
        assert a == pytest.approx(b, **bound)
    left, right = online.evaluate(), cached.evaluate()
    for name in ("eval_loss", "eval_kl", "eval_teacher_entropy"):
        assert left[name] == pytest.approx(right[name], **bound)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_training_batches_are_looked_up_in_a_thread_before_their_step(make_trainer, tmp_path, kind):
    options = {"max_steps": 5, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    threads, losses = [], []
    for prefetch in (0, 1):
        teacher = cache(tmp_path / f"cache-{prefetch}", kind)
        teacher.prefetch, get, names = prefetch, teacher.store.get, []
        teacher.store.get = lambda keys, get=get, names=names: (
            names.append(threading.current_thread().name) or get(keys)
        )
        losses.append(curve(make_trainer(kind, teacher=teacher, folder=f"out-{prefetch}", **options)))
        threads.append([name.split("_")[0] for name in names])
        assert not teacher._started
    assert losses[0] == losses[1]
    assert set(threads[0]) == {"MainThread"}
    assert threads[1].count("teacher-cache") == 10  # micro-batches
    assert threads[1].count("MainThread") == threads[0].count("MainThread") - 10  # of the evaluations


def test_batches_of_other_content_or_shape_have_other_checksums():
    batch = {"input_ids": torch.arange(12).reshape(2, 6), "labels": torch.arange(12).reshape(2, 6)}
    swapped = {"input_ids": batch["input_ids"].flip(0), "labels": batch["labels"]}
    wider = {name: value.reshape(1, 12) for name, value in batch.items()}
    masked = batch | {"attention_mask": torch.ones(2, 6, dtype=torch.long)}
    moved = {"input_ids": batch["labels"], "attention_mask": batch["input_ids"]}
    sums = [int(batch_checksum(one)) for one in (batch, swapped, wider, masked, moved)]
    assert len({*sums}) == 5
    assert int(batch_checksum({name: value.int() for name, value in batch.items()})) == sums[0]


@pytest.mark.parametrize("kind", ["sequence", "token", "llama"])
def test_top_k_with_all_ids_equals_the_full_distribution(make_trainer, tmp_path, kind):
    options = dict(max_steps=4, learning_rate=1e-2, train_sampling_strategy="sequential", divergence="reverse_kl")
    online = make_trainer(kind, teacher=big(kind), folder="online", **options)
    teacher = cache(tmp_path / "cache", kind, model=big(kind), **{"kind": "top_k", "k": VOCAB})
    cached = make_trainer(kind, teacher=teacher, folder="cached", **options)
    for a, b in zip(curve(online, "soft_loss"), curve(cached, "soft_loss"), strict=True):
        assert a == pytest.approx(b, abs=0.02)  # T^2 times half a step of the grid


def documents(n=24):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 12, (n,), generator=generator).tolist()
    ids = [torch.randint(3, VOCAB, (size,), generator=generator).tolist() for size in lengths]
    return [{"input_ids": x, "labels": [-100] * (i % 2) + x[i % 2 :]} for i, x in enumerate(ids)]


def test_a_cache_written_with_padded_rows_serves_packed_rows(make_trainer, tmp_path):
    alone = documents()
    packed = [
        {
            "input_ids": [t for d in alone[a : a + 3] for t in d["input_ids"]],
            "labels": [t for d in alone[a : a + 3] for t in d["labels"]],
            "seq_lengths": [len(d["input_ids"]) for d in alone[a : a + 3]],
        }
        for a in range(0, len(alone), 3)
    ]
    teacher = cache(tmp_path / "cache", "llama", alone, collator=Collator(0))
    options = dict(
        max_steps=4, train_dataset=packed, data_collator=Collator(0), remove_unused_columns=False, learning_rate=1e-2
    )
    online, cached = (make_trainer(teacher=t, folder=f, **options) for t, f in ((big(), "online"), (teacher, "cached")))
    assert curve(online) == [pytest.approx(step, rel=1e-5) for step in curve(cached)]


def test_losses_on_hidden_states_read_the_layers_that_were_written(make_trainer, tmp_path):
    losses = [
        {"name": "hidden_mse", "weight": 0.5, "layers": [[0, 1], [1, 2]]},
        {"name": "hidden_cosine", "weight": 0.1},
    ]
    options = dict(max_steps=4, losses=losses, learning_rate=1e-2)
    online = make_trainer(teacher=big(), folder="online", **options)
    cached = make_trainer(teacher=cache(tmp_path / "cache", layers=[0, 1, 2]), folder="cached", **options)
    assert curve(online, "hidden_mse_loss", "hidden_cosine_loss") == [
        pytest.approx(step, rel=1e-5) for step in curve(cached, "hidden_mse_loss", "hidden_cosine_loss")
    ]
    with pytest.raises(
        DistillError, match=r"hidden_mse needs hidden states of the layers \[2\], and the cache has \[0, 1\]"
    ):
        make_trainer(teacher=cache(tmp_path / "less", layers=[0, 1]), **options | {"losses": losses[:1]})
    with pytest.raises(DistillError, match="attention_kl compares features of the kind attention, which no cache"):
        make_trainer(teacher=cache(tmp_path / "cache", layers=[0, 1, 2]), losses=[{"name": "attention_kl"}])


def gradient(chunked_loss, hidden, weight):
    head = LazyLogits(hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    loss = chunked_loss.from_hidden(head)
    return loss.item(), torch.autograd.grad(loss, (head.hidden, head.weight))


@pytest.mark.parametrize("proposal_temperature", [2.0, 1.2])
def test_sampling_does_not_bias_loss_and_gradient(tmp_path, proposal_temperature):
    """The mean of 64 redraws is within 2 standard errors of the whole: in loss, and along the whole's gradient."""
    data = rows("llama", 8)
    batch = collate(data)
    targets = Targets.from_batch(batch, shift=True)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(len(targets), 16, generator=generator), torch.randn(VOCAB, 16, generator=generator)
    terms = objective(1.0, 2.0)[:1]
    with torch.no_grad():
        teacher_logits = DenseLogits(
            targets.gather(big().eval()(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits)
        )
    exact, (full_cache, _) = gradient(ChunkedLoss(teacher_logits, targets, terms), hidden, weight)
    losses, along = [], []
    for seed in range(64):
        options = {
            "kind": "sampled",
            "seed": seed,
            "proposal_temperature": proposal_temperature,
            "samples_per_token": 6,
        }
        teacher = cache(tmp_path / str(seed), "llama", data, **options)
        teacher.prepare(build("llama"), torch.device("cpu"))
        loss, (sampled_gradient, _) = gradient(
            ChunkedLoss(teacher(batch, targets, {}).logits, targets, terms), hidden, weight
        )
        losses.append(loss)
        along.append((sampled_gradient * full_cache).sum().item() / full_cache.square().sum().item())
    for values, expected in ((losses, exact), (along, 1.0)):
        loss_values = torch.tensor(values, dtype=torch.float64)
        error = loss_values.std() / math.sqrt(len(loss_values))
        assert 0 < error < 0.05 * expected
        assert abs(loss_values.mean() - expected) < 2 * error


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_analytic_gradient_of_a_sparse_teacher_equals_autograd(tail, temperature):
    generator = torch.Generator().manual_seed(1)
    logits, k = torch.randn(9, 40, generator=generator, dtype=torch.float64, requires_grad=True), 5
    log_probs = torch.log_softmax(torch.randn(9, 40, generator=generator, dtype=torch.float64) / temperature, -1)
    ids = log_probs.topk(k).indices
    top_log_probs = log_probs.gather(1, ids)
    top_log_probs[3, 2:], ids[3, 2:] = -math.inf, 0  # a token with fewer ids
    rest = (1 - top_log_probs.exp().sum(1)).log() if tail else None
    source = SparseLogProbs(
        ids, top_log_probs, rest, temperature, None if tail else (top_log_probs.exp() * log_probs.gather(1, ids)).sum(1)
    )
    targets = Targets.from_batch({"labels": torch.zeros(9, dtype=torch.long)}, shift=False)
    (term,) = objective(1.0, temperature)[:1]
    (by_hand,) = torch.autograd.grad(term(Signals(DenseLogits(logits)), Signals(source), targets).sum(), logits)
    loss = ChunkedLoss(source, targets, [term], num_items=1).from_logits(DenseLogits(logits))
    (closed,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, term(Signals(DenseLogits(logits)), Signals(source), targets).sum())
    torch.testing.assert_close(closed, by_hand)


def test_a_padded_vocabulary_of_either_side_is_left_out(make_trainer, tmp_path):
    for vocab in (104, 97):
        model, student = big(vocab=vocab), build("llama", 0, vocab=201 - vocab)
        options = dict(max_steps=3, model=student, train_sampling_strategy="sequential")
        teacher = cache(tmp_path / str(vocab), model=model, kind="top_k", k=vocab)
        online, cached = (
            make_trainer(teacher=t, folder=f"{f}{vocab}", **options | {"model": build("llama", 0, vocab=201 - vocab)})
            for t, f in ((big(vocab=vocab), "online"), (teacher, "cached"))
        )
        a, b = (curve(t, "soft_loss") for t in (online, cached))
        assert a == [pytest.approx(step, abs=0.02) for step in b]


def test_missing_examples_are_refused_or_computed_by_the_source(make_trainer, tmp_path):
    half = cache(tmp_path / "half", "llama", rows("llama", 32)[:16])
    options = dict(max_steps=4, train_sampling_strategy="sequential", per_device_train_batch_size=8, learning_rate=1e-2)
    with pytest.raises(DistillError, match=r"8 of 8 examples of a batch are not in .*which has 16 examples .the first"):
        make_trainer(teacher=half, **options).train()
    asking = CachedTeacher(str(tmp_path / "half"), source=FrozenTeacher(big()), on_miss="query_teacher")
    online = make_trainer(teacher=big(), folder="online", **options)
    cached = make_trainer(teacher=asking, folder="cached", **options)
    assert curve(online) == [pytest.approx(step, rel=1e-6) for step in curve(cached)]
    assert cached.state.log_history[-2]["cache_missing"] == 16


def test_missing_examples_are_sampled_as_in_the_cache(make_trainer, tmp_path):
    full_cache = cache(tmp_path / "whole", kind="sampled")
    cache(tmp_path / "half", "llama", rows("llama", 32)[:12], kind="sampled")
    asking = CachedTeacher(str(tmp_path / "half"), source=FrozenTeacher(big()), on_miss="query_teacher")
    a, b = (make_trainer(teacher=t, folder=str(i), max_steps=4) for i, t in enumerate((full_cache, asking)))
    assert curve(a) == [pytest.approx(step, rel=1e-6) for step in curve(b)]


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("sampled", {"divergence": "js"}, "soft is js, and a sampled cache supports forward_kl only"),
        ("top_k", {"temperature": 1.0}, "soft has temperature 1, and the cache was written at 2"),
        ("sampled", {"losses": [{"name": "hidden_mse"}]}, "hidden_mse needs hidden states of the layers"),
    ],
)
def test_a_loss_that_the_cache_does_not_support_is_refused_early(make_trainer, tmp_path, kind, options, why):
    with pytest.raises(DistillError, match=why):
        make_trainer(teacher=cache(tmp_path / "cache", kind=kind), **options)


def test_another_tokenizer_template_source_or_weights_are_refused(make_trainer, tmp_path):
    from hf_distill.recipe.smoke import byte_tokenizer

    tokenizer, other = byte_tokenizer(), byte_tokenizer()
    other.chat_template = "{{ messages[0].content }}"
    teacher = cache(tmp_path / "cache", processing_class=tokenizer)
    make_trainer(teacher=teacher, processing_class=tokenizer)
    with pytest.raises(DistillError, match="another chat template than the student's"):
        make_trainer(teacher=teacher, processing_class=other)
    other.add_tokens(["<new>"])
    with pytest.raises(DistillError, match="another tokenizer than the student's"):
        make_trainer(teacher=teacher, processing_class=other)
    for model, why in ((build("gpt2", 1), "its source is a GPT2LMHeadModel"), (build("llama", 9), "other weights")):
        asking = CachedTeacher(str(tmp_path / "cache"), source=FrozenTeacher(model), on_miss="query_teacher")
        with pytest.raises(DistillError, match=why):
            make_trainer(teacher=asking)
    with pytest.raises(DistillError, match="pass that teacher as `source`"):
        CachedTeacher(str(tmp_path / "cache"), on_miss="query_teacher")


def test_it_combines_with_an_ema_teacher_and_not_with_a_mutual_peer(make_trainer, tmp_path):
    from hf_distill.teachers import PeerTeacher

    teacher = cache(tmp_path / "cache")
    trainer = make_trainer(teacher=MultiTeacher({"disk": teacher, "past": EMATeacher(0.5)}), max_steps=2)
    assert all(a > 0 for (a,) in curve(trainer, "soft_disk_loss"))
    with pytest.raises(DistillError, match="mutual learning is symmetric"):
        MultiTeacher({"disk": teacher, "peer": PeerTeacher(big(), mutual=True)})


def test_a_resumed_run_equals_an_uninterrupted_run(make_trainer, tmp_path):
    options = dict(max_steps=6, save_strategy="steps", save_steps=3, learning_rate=1e-2)
    straight = make_trainer(teacher=cache(tmp_path / "cache", kind="sampled"), folder="straight", **options)
    straight.train()
    again = make_trainer(teacher=CachedTeacher(str(tmp_path / "cache")), folder="again", **options)
    again.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-3")
    assert all(torch.equal(p, q) for p, q in zip(straight.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js", "total_variation"])
def test_padding_slots_of_sparse_log_probs_do_not_contribute(name):
    """Three ids of K = 5: the same loss as with K = 3, though the two that are missing stand as id 0."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    log_probs = torch.log_softmax(torch.randn(6, 40, generator=generator, dtype=torch.float64), -1)
    ids = log_probs.topk(3).indices
    top_log_probs, nothing = log_probs.gather(1, ids), torch.zeros(6, 2, dtype=torch.long)
    rest = (1 - top_log_probs.exp().sum(1)).log()
    few = SparseLogProbs(ids, top_log_probs, rest)
    filled = SparseLogProbs(
        torch.cat([ids, nothing], 1), torch.cat([top_log_probs, nothing.double() - math.inf], 1), rest
    )
    targets = Targets.from_batch({"labels": torch.zeros(6, dtype=torch.long)}, shift=False)
    (term,) = objective(1.0, 1.0, name)[:1]
    losses, gradients = [], []
    for source in (few, filled):
        leaf = logits.clone().requires_grad_()
        losses.append(ChunkedLoss(source, targets, [term], num_items=1).from_logits(DenseLogits(leaf)))
        gradients += torch.autograd.grad(losses[-1], leaf)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_caches_of_images_and_token_types_give_the_losses_of_the_teacher(make_trainer, tmp_path):
    """The key of an example holds what the teacher read; columns that it read stay in the data."""
    import transformers as tf

    vit = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8)
    students = [tf.ViTForImageClassification(tf.ViTConfig(**vit, patch_size=4, num_labels=3)) for _ in range(2)]
    pixels = [{"pixel_values": torch.randn(3, 8, 8), "labels": torch.tensor(i % 3)} for i in range(8)]
    small = dict(vocab_size=VOCAB, dim=16, n_layers=1, n_heads=1, hidden_dim=16, num_labels=5)
    texts = [
        {**row, "token_type_ids": torch.tensor([i % 2] * 12), "unread": torch.ones(1)}
        for i, row in enumerate(rows("sequence", 8))
    ]
    bert = big("sequence").eval()
    bert.bert.embeddings.token_type_embeddings.weight.data *= 5
    cases = [
        (students[0], students[1].eval(), pixels),
        (tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**small)), bert, texts),
    ]
    for number, (student, teacher, data) in enumerate(cases):
        known = [{k: v for k, v in row.items() if k != "unread"} for row in data]
        cached_teacher = cache(
            tmp_path / f"cache{number}", "bert", data, model=teacher, kind="top_k", k=VOCAB, temperature=2.0
        )
        soft = [
            make_trainer(model=student, teacher=each, train_dataset=known, eval_dataset=known).evaluate()[
                "eval_soft_loss"
            ]
            for each in (teacher, cached_teacher)
        ]
        assert soft[0] == pytest.approx(soft[1], abs=0.02)
    without = [{k: v for k, v in row.items() if k != "token_type_ids"} for row in known]
    with pytest.raises(DistillError, match="read token_type_ids"):
        make_trainer(model=student, teacher=cached_teacher, train_dataset=without, eval_dataset=without).evaluate()
