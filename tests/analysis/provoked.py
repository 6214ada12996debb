"""Distillations that fail for a known reason, and healthy ones: tiny models trained on a Markov chain.

Each of 64 tokens depends on the two tokens before it, so a model needs attention to predict it.
"""

import math
from functools import cache
from statistics import fmean

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_distill.analysis import ModelPair

VOCAB, LENGTH, LEARNING_RATE = 64, 48, 1e-2


@cache
def chain(seed):
    """[V, V, V]: distribution of the next token, by the one before the last and the last."""
    generator = torch.Generator().manual_seed(seed)
    before, last = (4.5 * torch.randn(2, VOCAB, VOCAB, generator=generator)).softmax(-1)
    return 0.25 * before[:, None, :] + 0.75 * last[None, :, :]


def sample(table, rows, seed):
    """[rows, LENGTH] ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, LENGTH), generator=generator)
    for t in range(2, LENGTH):
        ids[:, t] = torch.multinomial(table[ids[:, t - 2], ids[:, t - 1]], 1, generator=generator)[:, 0]
    return ids


def corrupt(table, seed):
    """The same chain, except that a third of the tokens is followed by one wrong token with near certainty."""
    generator = torch.Generator().manual_seed(seed + 99)
    wrong = table.clone()
    for last in torch.randperm(VOCAB, generator=generator)[: VOCAB // 3].tolist():
        wrong[:, last] = 1e-4
        wrong[:, last, torch.randint(0, VOCAB, (1,), generator=generator)] = 1.0
    return wrong / wrong.sum(-1, keepdim=True)


def train(model, table, steps, seed, teacher=None, alpha=0.5, temperature=2.0, shift=1, distort=None, decay=True):
    """Train a model on a chain and return the lines of its log.

    shift:   offset of the label from its position; 1 is correct
    distort: applied to the teacher logits
    """
    optimizer, logs = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), []
    model.train()
    for step, ids in enumerate(sample(table, 12 * steps, seed * 100_003).split(12)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (0.5 * (1 + math.cos(math.pi * step / steps)) if decay else 1.0)
        z = model(input_ids=ids).logits[:, :-shift].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(z, ids[:, shift:].flatten())
        if teacher is not None:
            with torch.no_grad():
                y = teacher(input_ids=ids).logits[:, :-shift].flatten(0, 1)
            y = y if distort is None else distort(y)
            log_q, log_p = (y / temperature).log_softmax(-1), (z / temperature).log_softmax(-1)
            soft = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
            loss = alpha * temperature**2 * soft + (1 - alpha) * loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        logs.append({"loss": loss.item(), "learning_rate": optimizer.param_groups[0]["lr"]})
    model.eval().requires_grad_(False)
    every = max(1, steps // 25)
    groups = [logs[i : i + every] for i in range(0, len(logs), every)]
    return [{**group[-1], "loss": fmean(log["loss"] for log in group)} for group in groups]


def build_model(seed, width, layers=2):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
        )
    )


@cache
def teacher_of(seed, kind="good"):
    """A teacher that was trained on the chain; "wrong": on a corrupted chain; "weak": for few steps."""
    model, table = build_model(seed + 1000, 64), chain(seed)
    train(model, corrupt(table, seed) if kind == "wrong" else table, 20 if kind == "weak" else 250, seed + 1)
    return model


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


def pair(seed, student, teacher, shift=1, **objective):
    """Both models over held-out rows; with a wrong shift the labels are the shifted ones of the training."""
    ids = sample(chain(seed), 40, 7_000_000 + seed)
    labels = ids.clone()
    if shift == 2:
        labels[:, :-1] = ids[:, 1:]
        labels[:, -1] = -100
    rows = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    return ModelPair(teacher, student, rows, collate, batch_size=8, **objective)


def distilled(seed, width=32, steps=250, kind="good", decay=True, **options):
    """Train a student; returns (pair, logs)."""
    student, teacher = build_model(seed + 2000, width), teacher_of(seed, kind)
    logs = train(student, chain(seed), steps, seed + 2, teacher, decay=decay, **options)
    objective = {k: options[k] for k in ("alpha", "temperature") if k in options}
    return pair(seed, student, teacher, options.get("shift", 1), **objective), logs


def permuted_ids(seed):
    """A teacher for which the ids have other meanings."""
    import copy

    correct, logs = distilled(seed, steps=40)
    teacher = copy.deepcopy(correct.teacher)
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))
    embedding = teacher.get_input_embeddings().weight
    with torch.no_grad():
        embedding.copy_(embedding[order])
    return pair(seed, correct.student, teacher), logs


def truncate(logits):
    """Teacher logits of a cache of the two likeliest ids, without the mass of the others."""
    return logits.masked_fill(logits < logits.topk(2).values[:, -1:], -30.0)


CASES = {
    "capacity_gap": lambda seed: distilled(seed, width=4, steps=600),
    "temperature_too_high": lambda seed: distilled(seed, temperature=12.0, steps=100),
    "temperature_too_low": lambda seed: distilled(seed, temperature=0.05, steps=100, alpha=0.05),
    "alpha_too_high": lambda seed: distilled(seed, kind="wrong", alpha=1.0),
    "alpha_too_low": lambda seed: distilled(seed, alpha=0.01, steps=60),
    "wrong_shift_or_mask": lambda seed: distilled(seed, shift=2, steps=120),
    "wrong_tokenizer": permuted_ids,
    "teacher_weaker_than_labels": lambda seed: distilled(seed, kind="weak", alpha=0.1),
    "under_trained": lambda seed: distilled(seed, steps=25, decay=False),
    "collapsed_tail": lambda seed: distilled(seed, distort=truncate, alpha=1.0, temperature=1.0),
}


def healthy(seed):
    """A student of a good teacher, trained until it is close to it."""
    return distilled(seed)
