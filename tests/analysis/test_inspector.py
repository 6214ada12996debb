"""Measures of a teacher equal those of naive full softmaxes."""

import json
import math
import shutil
from dataclasses import asdict

import pytest
import torch
from tiny import VOCAB, build, collate, rows
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.analysis import ModelPair
from hf_distill.analysis.advice import advice_of
from hf_distill.analysis.inspector import inspect_teacher
from hf_distill.analysis.soft_labels import AtTemperature, CacheKind, SoftLabels, ids_for
from hf_distill.cache import write_cache
from hf_distill.cache.sampling import sample_by_inverse_cdf, systematic_points
from hf_distill.cli import app
from hf_distill.recipe import load_recipe, run_recipe


def pair_of(data=None, **options):
    return ModelPair(
        build("llama", 1), None, rows("llama", 12) if data is None else data, collate, batch_size=4, **options
    )


def naive_logits(pair):
    """(logits [T, V] in float64, labels [T]) of every target token, from the unmodified forward."""
    logits, labels = [], []
    for start in range(0, len(pair.rows), 4):
        batch = collate(pair.rows[start : start + 4])
        is_target = (batch["labels"][:, 1:] != -100) & (batch["attention_mask"][:, :-1] == 1)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad():
            teacher_logits = pair.teacher.eval()(**inputs, use_cache=False).logits[:, :-1]
        logits.append(teacher_logits[is_target].double())
        labels.append(batch["labels"][:, 1:][is_target])
    return torch.cat(logits), torch.cat(labels)


def test_measures_equal_those_of_naive_softmaxes():
    pair = pair_of()
    inspection = inspect_teacher(pair, None, positions=())
    logits, labels = naive_logits(pair)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    ordered = p.sort(-1, descending=True).values
    assert inspection.tokens == len(labels)
    assert inspection.vocab_size == VOCAB
    assert inspection.entropy == pytest.approx(entropy.mean().item(), rel=1e-5)
    assert inspection.entropy_bits == pytest.approx(entropy.mean().item() / math.log(2), rel=1e-5)
    assert inspection.mass == pytest.approx({k: ordered[:, :k].sum(-1).mean().item() for k in (1, 10)}, rel=1e-5)
    assert inspection.accuracy == pytest.approx((p.argmax(-1) == labels).double().mean().item())
    ce = -log_p.gather(1, labels[:, None]).mean().item()
    assert inspection.cross_entropy == pytest.approx(ce, rel=1e-5)
    assert inspection.perplexity == pytest.approx(math.exp(ce), rel=1e-5)
    needed = torch.tensor([next(k for k in range(1, VOCAB + 1) if row[:k].sum() >= 0.99) for row in ordered]).double()
    assert inspection.ids_for_99["mean"] == pytest.approx(needed.mean().item())
    assert inspection.ids_for_99["median"] == pytest.approx(needed.quantile(0.5).item())
    assert inspection.ids_for_99["p90"] == pytest.approx(needed.quantile(0.9).item())
    edges = [low for low, _ in inspection.histogram]
    assert edges[-1] < math.log(VOCAB)
    counts = torch.histogram(entropy, torch.tensor([*edges, 1e9]).double()).hist
    assert [count for _, count in inspection.histogram] == counts.tolist()


def test_the_number_of_ids_equals_that_of_a_sorted_cumulative_sum(monkeypatch):
    from hf_distill.analysis import soft_labels

    monkeypatch.setattr(soft_labels, "_FIRST_IDS", 3)  # so that most rows need several rounds of sorting
    torch.manual_seed(0)
    p = (torch.randn(50, 200) * torch.linspace(0.1, 8, 50)[:, None]).softmax(-1)
    p[0] = torch.eye(200)[7]
    for share in (0.5, 0.99):
        ordered = p.double().sort(-1, descending=True).values
        expected = [next(k for k in range(1, 201) if row[:k].sum() >= share) for row in ordered]
        assert ids_for(p, share).tolist() == expected


def test_an_id_with_zero_probability_gives_no_nan():
    measures = SoftLabels((1.0, 2.0), (1.0, 2.0))
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf], [200.0, 0.0, 0.0, 0.0]])
    measures.add(logits, torch.tensor([1, 0]))
    assert measures["entropy@2.0"].tolist() == pytest.approx([math.log(2), 0.0])
    assert measures["cross_entropy"].tolist() == pytest.approx([math.log(2), 0.0])
    assert measures["hit"].tolist() == [1.0, 1.0]  # no id is likelier than one of two equally likely ids
    assert measures["ids"].tolist() == [2.0, 1.0]
    assert measures["distinct@1.0"].tolist() == pytest.approx([2.0, 1.0])


@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_is_neither_measured_nor_shown(pad):
    padded = rows("llama", 12, pad=pad)
    unpadded = [{k: v[row["attention_mask"] == 1] for k, v in row.items()} for row in padded]
    inspection = inspect_teacher(pair_of(padded), None)
    alone = inspect_teacher(ModelPair(build("llama", 1), None, unpadded, collate, batch_size=1), None)
    assert inspection.tokens == alone.tokens == sum(int((row["labels"][1:] != -100).sum()) for row in unpadded)
    assert inspection.entropy == pytest.approx(alone.entropy, rel=1e-5)
    assert inspection.cross_entropy == pytest.approx(alone.cross_entropy, rel=1e-5)
    assert [p.context for p in inspection.positions] == [p.context for p in alone.positions]


def test_temperatures_divide_the_logits():
    pair = pair_of(temperature=3.0)
    inspection = inspect_teacher(pair, None, positions=())
    effects = {effect.temperature: effect for effect in inspection.by_temperature}
    assert [*effects] == [0.5, 1.0, 2.0, 3.0, 5.0, 10.0]
    logits, _ = naive_logits(pair)
    for t, effect in effects.items():
        p = (logits / t).softmax(-1)
        assert effect.entropy == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-5)
        ordered = p.sort(-1, descending=True).values
        assert effect.mass == pytest.approx({k: ordered[:, :k].sum(-1).mean().item() for k in (1, 10)}, rel=1e-5)
    assert inspection.entropy == effects[1.0].entropy
    assert inspection.temperature == 3.0


def test_positions_show_the_likeliest_ids_and_mark_the_label():
    pair = pair_of()
    logits, labels = naive_logits(pair)
    p = logits.softmax(-1)
    shown = inspect_teacher(pair, None, positions=(0, 3, 17), k=5).positions
    assert [position.index for position in shown] == [0, 3, 17]
    for position in shown:
        probabilities = p[position.index]
        best = probabilities.topk(5)
        assert [c.text for c in position.candidates] == [str(i) for i in best.indices.tolist()]
        assert [c.probability for c in position.candidates] == pytest.approx(best.values.tolist(), rel=1e-5)
        label = int(labels[position.index])
        assert position.target == str(label)
        assert [c.is_target for c in position.candidates] == [i == label for i in best.indices.tolist()]
        assert position.rank == int((probabilities > probabilities[label]).sum()) + 1
        assert position.target_probability == pytest.approx(probabilities[label].item(), rel=1e-5)
        assert position.entropy == pytest.approx(-(probabilities * probabilities.log()).sum().item(), rel=1e-5)


def test_a_label_among_the_likeliest_is_marked_once():
    (position,) = inspect_teacher(pair_of(), None, positions=(5,), k=VOCAB).positions
    (marked,) = [c for c in position.candidates if c.is_target]
    assert marked.text == position.target
    assert marked.probability == position.target_probability
    assert position.candidates.index(marked) == position.rank - 1


def test_the_context_of_a_position_ends_before_the_label():
    data = [{"input_ids": torch.arange(3, 43), "labels": torch.arange(3, 43)}]
    (position,) = inspect_teacher(pair_of(data), None, positions=(27,)).positions
    assert position.context.split() == [str(i) for i in range(15, 31)]
    assert position.target == "31"


def test_errors_of_caches_equal_those_of_sampling_and_truncating():
    pair = pair_of(temperature=2.0)
    inspection = {(c.kind, c.temperature): c for c in inspect_teacher(pair, None, positions=()).caches}
    assert [*inspection] == [("hidden", None), ("sampled", 1.0), ("top_k", 1.0), ("sampled", 2.0), ("top_k", 2.0)]
    logits, _ = naive_logits(pair)
    g = torch.Generator().manual_seed(0)
    for t in (1.0, 2.0):
        p = (logits / t).softmax(-1)
        cut = p.scatter(1, p.topk(64).indices, 0)
        top_k = inspection["top_k", t]
        assert top_k.truncated_mass == pytest.approx(cut.sum(-1).mean().item(), rel=1e-4)
        assert top_k.error == pytest.approx((cut.norm() / p.norm()).item(), rel=1e-4)
        assert top_k.error_of_sum == pytest.approx((cut.sum(0).norm() / p.sum(0).norm()).item(), rel=1e-4)
        each = of_sum = distinct = 0.0
        for _ in range(200):
            ids, _ = sample_by_inverse_cdf((logits / t).clone(), systematic_points(len(p), 12, g))
            error = torch.zeros_like(p).scatter_add_(1, ids, torch.full_like(ids, 1 / 12, dtype=p.dtype)) - p
            each, of_sum = each + error.square().sum().item(), of_sum + error.sum(0).square().sum().item()
            distinct += sum(len(row.unique()) for row in ids) / len(ids)
        sampled = inspection["sampled", t]
        assert sampled.error == pytest.approx(math.sqrt(each / 200) / p.norm().item(), rel=0.02)
        assert sampled.error_of_sum == pytest.approx(math.sqrt(of_sum / 200) / p.sum(0).norm().item(), rel=0.05)
        expected = distinct / 200 * 7 * 0.92 / 8 + 3.2 + 28 * 12 / len(p)  # 7 bits an id, 12 rows
        assert sampled.bytes_per_token == pytest.approx(expected, rel=0.02)


def test_bytes_of_hidden_states_equal_those_of_a_written_cache(tmp_path):
    pair = pair_of(rows("llama", 100, length=60))  # so that the overhead of a shard is small
    inspection = {c.kind: c for c in inspect_teacher(pair, None, positions=()).caches}
    written = write_cache(tmp_path / "cache", pair.teacher, pair.rows, collator=collate, kind="hidden")
    assert inspection["hidden"].bytes_per_token == pytest.approx(written.bytes_per_token, rel=0.05)


def test_hidden_states_are_offered_only_with_a_language_model_head():
    classes = ModelPair(build("token", 1), None, rows("token", 8), collate)
    kinds = {c.kind for c in inspect_teacher(classes, None, positions=()).caches}
    kinds_of_model = {c.kind for c in inspect_teacher(pair_of(), None, positions=()).caches}
    assert kinds == {"sampled", "top_k"}
    assert kinds_of_model == {"hidden", "sampled", "top_k"}


def floats(values):
    """All numbers in nested dicts and lists, in order."""
    if isinstance(values, dict | list | tuple):
        return [x for part in (values.values() if isinstance(values, dict) else values) for x in floats(part)]
    return [values] if isinstance(values, int | float) else []


def test_chunk_size_does_not_change_the_measures(monkeypatch):
    from hf_distill.cache import sampling

    at_once = inspect_teacher(pair_of(), None)
    monkeypatch.setattr(sampling, "_WORKSPACE_BYTES", 4 * VOCAB * 7)
    monkeypatch.setattr(sampling, "_CPU_CACHE_BYTES", 4 * VOCAB * 2)
    small = inspect_teacher(pair_of(), None)
    assert [p.index for p in small.positions] == [p.index for p in at_once.positions] == [8, 64]
    assert small.histogram == at_once.histogram
    assert floats(asdict(small)) == pytest.approx(floats(asdict(at_once)), rel=1e-5, abs=1e-9)


def test_batches_are_read_until_the_number_of_targets_is_reached_and_the_student_is_not_run():
    pair, calls = pair_of().with_student(build("llama", 0)), []
    pair.teacher.register_forward_hook(lambda *_: calls.append("teacher"))
    pair.student.register_forward_hook(lambda *_: calls.append("student"))
    counts = [sum(int((row["labels"][1:] != -100).sum()) for row in pair.rows[i : i + 4]) for i in (0, 4, 8)]
    inspection = inspect_teacher(pair, counts[0] + 1)
    assert inspection.tokens == counts[0] + counts[1]
    assert calls == ["teacher"] * 4  # two short forwards measure the output head


def advice(
    entropies, temperature=1.0, accuracy=0.9, cross_entropy=0.0, error=0.4, truncated=0.1, top=0.9, divergence=None
):
    effects = [AtTemperature(t, entropy, {1: 0.5, 100: top}) for t, entropy in entropies.items()]
    caches = [CacheKind("hidden", None, 1000, 0, 0, 0)]
    for t in sorted({1.0, temperature}):
        bad = t == temperature
        caches.append(CacheKind("sampled", t, 14, 0, error if bad else 0.4, 0.1))
        caches.append(CacheKind("top_k", t, 160, truncated if bad else 0.1, 0.1, 0.1))
    return " ".join(advice_of(effects, temperature, 1000, accuracy, cross_entropy, caches, divergence or "forward_kl"))


@pytest.mark.parametrize(
    ("arguments", "expected", "unexpected"),
    [
        ({"entropies": {1.0: 0.01, 2.0: 1.0}}, "nearly one-hot, so it carries little more information", "tail"),
        ({"entropies": {1.0: 0.01, 2.0: 1.0}}, "At T = 2 the entropy is 1.00", "hard labels alone"),
        ({"entropies": {1.0: 0.01}}, "Training on hard labels alone gives about the same", "T = 2"),
        (
            {"entropies": {1.0: 0.01, 2.0: 1.0}, "temperature": 2.0},
            "nearly one-hot (0.01 nats), so keep T above 1",
            "tail",
        ),
        ({"entropies": {1.0: 2.0, 5.0: 6.8}, "temperature": 5.0}, "nearly uniform", "one-hot"),
        ({"entropies": {1.0: 2.0, 5.0: 6.8}, "temperature": 5.0}, "At T = 1 the entropy is 2.00", "keep T above"),
        (
            {"entropies": {1.0: 2.0}, "top": 0.3},
            "the tail dominates, because the likeliest 100 ids have only 30% of the mass.",
            "% at",
        ),
        ({"entropies": {1.0: 2.0, 2.0: 3.0}, "temperature": 2.0}, "neither one-hot nor flat", "At T = 1"),
        (
            {"entropies": {1.0: 2.0}, "accuracy": 0.1},
            "likeliest id is the label for only 10% of the tokens",
            "overconfident",
        ),
        ({"entropies": {1.0: 2.0}, "cross_entropy": 3.0}, "the teacher is overconfident", "likeliest id"),
        ({"entropies": {1.0: 2.0}, "cross_entropy": 2.2}, "sampled (14 bytes/token), top_k (160", "overconfident"),
        (
            {"entropies": {1.0: 2.0}, "truncated": 0.4},
            "top_k is not suitable, because 40% of the mass is outside",
            "sampled is",
        ),
        (
            {"entropies": {1.0: 2.0}, "error": 2.5},
            "sampled is not suitable, because the error of a token's 12 draws is 2.5",
            "At T = 1",
        ),
        (
            {"entropies": {1.0: 2, 4.0: 3}, "temperature": 4.0, "error": 2.5},
            "At T = 1 sampled would be suitable",
            "top_k is",
        ),
        ({"entropies": {1.0: 2.0}, "divergence": {"name": "js"}}, "the recipe's divergence is js", "At T = 1"),
        ({"entropies": {1.0: 2.0}}, "it pays off from the second pass", "is not"),
    ],
)
def test_advice_follows_from_the_measures(arguments, expected, unexpected):
    assert expected in advice(**arguments)
    assert unexpected not in advice(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"temperatures": (0.0,)}, r"temperatures are \[0.0\]"),
        ({"positions": (-1,)}, r"positions are \[-1\]"),
        (
            {"tokens": 10, "positions": (3, 500)},
            r"Position 500 was requested, but only \d+ target tokens were measured",
        ),
    ],
)
def test_arguments_out_of_range_give_an_error(arguments, message):
    with pytest.raises(DistillError, match=message):
        inspect_teacher(pair_of(), **arguments)


def test_a_missing_teacher_or_rows_without_targets_give_an_error():
    with pytest.raises(DistillError, match="no teacher"):
        inspect_teacher(ModelPair(None, build("llama"), rows("llama", 4), collate))
    with pytest.raises(DistillError, match="held-out rows are empty"):
        inspect_teacher(pair_of([{**row, "labels": row["labels"] * 0 - 100} for row in rows("llama", 4)]))


def test_the_command_inspects_the_teacher_of_a_recipe(tmp_path):
    recipe = ["inspect", "quickstart", f"train.output_dir={tmp_path / 'run'}", "--smoke"]
    result = CliRunner().invoke(app, [*recipe, "--json", "--tokens", "100", "-k", "3"])
    assert result.exit_code == 0, result.output
    inspection = json.loads(result.stdout[result.stdout.index("{") :])
    assert inspection["tokens"] >= 100
    assert {len(position["candidates"]) for position in inspection["positions"]} == {3}
    assert not (tmp_path / "run").exists()


def test_the_command_inspects_a_run_and_writes_the_result_to_the_folder(tmp_path):
    folder = tmp_path / "run"
    run_recipe(load_recipe("quickstart", [f"train.output_dir={folder}"], smoke=True))
    shutil.rmtree(folder / "student")  # the student is not needed
    result = CliRunner().invoke(app, ["inspect", str(folder), "--position", "2"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    for part in ("entropy", "Effect of T", "Token 2,", "→", "Caches of this teacher", "Advice"):
        assert part in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    written = json.loads((folder / "inspection.json").read_text())
    assert [position["index"] for position in written["positions"]] == [2]
    assert written["advice"]
    with pytest.raises(DistillError, match="whose recipe cannot be changed: omit KEY=VALUE"):
        CliRunner().invoke(app, ["inspect", str(folder), "data.max_length=8"], catch_exceptions=False)


def test_a_teacher_that_is_not_frozen_gives_an_error_before_anything_is_written(tmp_path):
    command = ["inspect", "ema", f"train.output_dir={tmp_path / 'run'}", "--smoke"]
    with pytest.raises(DistillError, match="of kind ema, so it has no model before the run"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert not (tmp_path / "run").exists()
