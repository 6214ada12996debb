"""What is said of a teacher is what whole softmaxes say of it."""

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


def whole(pair):
    """(logits [T, V] in float64, labels [T]) of every asked token, made at once by the model itself."""
    logits, labels = [], []
    for start in range(0, len(pair.rows), 4):
        batch = collate(pair.rows[start : start + 4])
        asked = (batch["labels"][:, 1:] != -100) & (batch["attention_mask"][:, :-1] == 1)
        given = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad():
            said = pair.teacher.eval()(**given, use_cache=False).logits[:, :-1]
        logits.append(said[asked].double())
        labels.append(batch["labels"][:, 1:][asked])
    return torch.cat(logits), torch.cat(labels)


def test_every_number_is_that_of_whole_softmaxes():
    pair = pair_of()
    found = inspect_teacher(pair, None, positions=())
    logits, labels = whole(pair)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    ordered = p.sort(-1, descending=True).values
    assert found.tokens == len(labels)
    assert found.vocab_size == VOCAB
    assert found.entropy == pytest.approx(entropy.mean().item(), rel=1e-5)
    assert found.entropy_bits == pytest.approx(entropy.mean().item() / math.log(2), rel=1e-5)
    assert found.mass == pytest.approx({k: ordered[:, :k].sum(-1).mean().item() for k in (1, 10)}, rel=1e-5)
    assert found.accuracy == pytest.approx((p.argmax(-1) == labels).double().mean().item())
    ce = -log_p.gather(1, labels[:, None]).mean().item()
    assert found.cross_entropy == pytest.approx(ce, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(ce), rel=1e-5)
    needed = torch.tensor([next(k for k in range(1, VOCAB + 1) if row[:k].sum() >= 0.99) for row in ordered]).double()
    assert found.ids_for_99["mean"] == pytest.approx(needed.mean().item())
    assert found.ids_for_99["median"] == pytest.approx(needed.quantile(0.5).item())
    assert found.ids_for_99["p90"] == pytest.approx(needed.quantile(0.9).item())
    edges = [low for low, _ in found.histogram]
    assert edges[-1] < math.log(VOCAB)
    counts = torch.histogram(entropy, torch.tensor([*edges, 1e9]).double()).hist
    assert [count for _, count in found.histogram] == counts.tolist()


def test_the_ids_that_hold_a_share_are_those_of_a_sorted_running_sum(monkeypatch):
    from hf_distill.analysis import soft_labels

    monkeypatch.setattr(soft_labels, "_FIRST", 3)  # so that most rows are ordered further and further
    torch.manual_seed(0)
    p = (torch.randn(50, 200) * torch.linspace(0.1, 8, 50)[:, None]).softmax(-1)
    p[0] = torch.eye(200)[7]
    for share in (0.5, 0.99):
        ordered = p.double().sort(-1, descending=True).values
        expected = [next(k for k in range(1, 201) if row[:k].sum() >= share) for row in ordered]
        assert ids_for(p, share).tolist() == expected


def test_an_id_without_any_mass_does_no_harm():
    measures = SoftLabels((1.0, 2.0), (1.0, 2.0))
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf], [200.0, 0.0, 0.0, 0.0]])
    measures.add(logits, torch.tensor([1, 0]))
    assert measures["entropy@2.0"].tolist() == pytest.approx([math.log(2), 0.0])
    assert measures["cross_entropy"].tolist() == pytest.approx([math.log(2), 0.0])
    assert measures["hit"].tolist() == [1.0, 1.0]  # of two that are as likely neither is likelier
    assert measures["ids"].tolist() == [2.0, 1.0]
    assert measures["distinct@1.0"].tolist() == pytest.approx([2.0, 1.0])


@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_is_neither_measured_nor_shown(pad):
    padded = rows("llama", 12, pad=pad)
    unwrap_model = [{k: v[row["attention_mask"] == 1] for k, v in row.items()} for row in padded]
    found = inspect_teacher(pair_of(padded), None)
    alone = inspect_teacher(ModelPair(build("llama", 1), None, unwrap_model, collate, batch_size=1), None)
    assert found.tokens == alone.tokens == sum(int((row["labels"][1:] != -100).sum()) for row in unwrap_model)
    assert found.entropy == pytest.approx(alone.entropy, rel=1e-5)
    assert found.cross_entropy == pytest.approx(alone.cross_entropy, rel=1e-5)
    assert [p.context for p in found.positions] == [p.context for p in alone.positions]


def test_temperatures_divide_the_logits():
    pair = pair_of(temperature=3.0)
    found = inspect_teacher(pair, None, positions=())
    at = {one.temperature: one for one in found.by_temperature}
    assert [*at] == [0.5, 1.0, 2.0, 3.0, 5.0, 10.0]
    logits, _ = whole(pair)
    for t, one in at.items():
        p = (logits / t).softmax(-1)
        assert one.entropy == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-5)
        ordered = p.sort(-1, descending=True).values
        assert one.mass == pytest.approx({k: ordered[:, :k].sum(-1).mean().item() for k in (1, 10)}, rel=1e-5)
    assert found.entropy == at[1.0].entropy
    assert found.temperature == 3.0


def test_positions_show_the_likeliest_ids_and_mark_the_label():
    pair = pair_of()
    logits, labels = whole(pair)
    p = logits.softmax(-1)
    shown = inspect_teacher(pair, None, positions=(0, 3, 17), k=5).positions
    assert [position.index for position in shown] == [0, 3, 17]
    for position in shown:
        own = p[position.index]
        best = own.topk(5)
        assert [c.text for c in position.candidates] == [str(i) for i in best.indices.tolist()]
        assert [c.probability for c in position.candidates] == pytest.approx(best.values.tolist(), rel=1e-5)
        label = int(labels[position.index])
        assert position.target == str(label)
        assert [c.is_target for c in position.candidates] == [i == label for i in best.indices.tolist()]
        assert position.rank == int((own > own[label]).sum()) + 1
        assert position.target_probability == pytest.approx(own[label].item(), rel=1e-5)
        assert position.entropy == pytest.approx(-(own * own.log()).sum().item(), rel=1e-5)


def test_a_label_among_the_likeliest_is_marked_once():
    (position,) = inspect_teacher(pair_of(), None, positions=(5,), k=VOCAB).positions
    (marked,) = [c for c in position.candidates if c.is_target]
    assert marked.text == position.target
    assert marked.probability == position.target_probability
    assert position.candidates.index(marked) == position.rank - 1


def test_a_position_s_context_ends_where_the_label_begins():
    data = [{"input_ids": torch.arange(3, 43), "labels": torch.arange(3, 43)}]
    (position,) = inspect_teacher(pair_of(data), None, positions=(27,)).positions
    assert position.context.split() == [str(i) for i in range(15, 31)]
    assert position.target == "31"


def test_errors_of_caches_are_those_of_what_is_drawn_and_what_is_cut():
    pair = pair_of(temperature=2.0)
    found = {(c.kind, c.temperature): c for c in inspect_teacher(pair, None, positions=()).caches}
    assert [*found] == [("hidden", None), ("sampled", 1.0), ("top_k", 1.0), ("sampled", 2.0), ("top_k", 2.0)]
    logits, _ = whole(pair)
    g = torch.Generator().manual_seed(0)
    for t in (1.0, 2.0):
        p = (logits / t).softmax(-1)
        cut = p.scatter(1, p.topk(64).indices, 0)
        top_k = found["top_k", t]
        assert top_k.lost == pytest.approx(cut.sum(-1).mean().item(), rel=1e-4)
        assert top_k.error == pytest.approx((cut.norm() / p.norm()).item(), rel=1e-4)
        assert top_k.error_of_sum == pytest.approx((cut.sum(0).norm() / p.sum(0).norm()).item(), rel=1e-4)
        each = of_sum = distinct = 0.0
        for _ in range(200):
            ids, _ = sample_by_inverse_cdf((logits / t).clone(), systematic_points(len(p), 12, g))
            error = torch.zeros_like(p).scatter_add_(1, ids, torch.full_like(ids, 1 / 12, dtype=p.dtype)) - p
            each, of_sum = each + error.square().sum().item(), of_sum + error.sum(0).square().sum().item()
            distinct += sum(len(row.unique()) for row in ids) / len(ids)
        sampled = found["sampled", t]
        assert sampled.error == pytest.approx(math.sqrt(each / 200) / p.norm().item(), rel=0.02)
        assert sampled.error_of_sum == pytest.approx(math.sqrt(of_sum / 200) / p.sum(0).norm().item(), rel=0.05)
        expected = distinct / 200 * 7 * 0.92 / 8 + 3.2 + 28 * 12 / len(p)  # 7 bits an id, 12 rows
        assert sampled.bytes_per_token == pytest.approx(expected, rel=0.02)


def test_bytes_of_hidden_states_are_those_of_a_written_cache(tmp_path):
    pair = pair_of(rows("llama", 100, length=60))  # so that what a shard has of its own is little
    found = {c.kind: c for c in inspect_teacher(pair, None, positions=()).caches}
    written = write_cache(tmp_path / "cache", pair.teacher, pair.rows, collator=collate, kind="hidden")
    assert found["hidden"].bytes_per_token == pytest.approx(written.bytes_per_token, rel=0.05)


def test_hidden_states_are_offered_where_there_is_a_plain_head_alone():
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


def test_chunks_change_nothing(monkeypatch):
    from hf_distill.cache import sampling as drawing

    at_once = inspect_teacher(pair_of(), None)
    monkeypatch.setattr(drawing, "_WORKSPACE", 4 * VOCAB * 7)
    monkeypatch.setattr(drawing, "_CACHED", 4 * VOCAB * 2)
    small = inspect_teacher(pair_of(), None)
    assert [p.index for p in small.positions] == [p.index for p in at_once.positions] == [8, 64]
    assert small.histogram == at_once.histogram
    assert floats(asdict(small)) == pytest.approx(floats(asdict(at_once)), rel=1e-5, abs=1e-9)


def test_whole_batches_until_enough_was_asked_in_one_forward_of_the_teacher_alone():
    pair, calls = pair_of().with_student(build("llama", 0)), []
    pair.teacher.register_forward_hook(lambda *_: calls.append("teacher"))
    pair.student.register_forward_hook(lambda *_: calls.append("student"))
    asked = [sum(int((row["labels"][1:] != -100).sum()) for row in pair.rows[i : i + 4]) for i in (0, 4, 8)]
    found = inspect_teacher(pair, asked[0] + 1)
    assert found.tokens == asked[0] + asked[1]
    assert calls == ["teacher"] * 4  # two short ones measure its output head


def advice(entropies, temperature=1.0, accuracy=0.9, cross_entropy=0.0, error=0.4, lost=0.1, top=0.9, divergence=None):
    at = [AtTemperature(t, entropy, {1: 0.5, 100: top}) for t, entropy in entropies.items()]
    caches = [CacheKind("hidden", None, 1000, 0, 0, 0)]
    for t in sorted({1.0, temperature}):
        bad = t == temperature
        caches.append(CacheKind("sampled", t, 14, 0, error if bad else 0.4, 0.1))
        caches.append(CacheKind("top_k", t, 160, lost if bad else 0.1, 0.1, 0.1))
    return " ".join(advice_of(at, temperature, 1000, accuracy, cross_entropy, caches, divergence or "forward_kl"))


@pytest.mark.parametrize(
    ("given", "said", "unsaid"),
    [
        ({"entropies": {1.0: 0.01, 2.0: 1.0}}, "nearly one-hot, it says little more", "tail"),
        ({"entropies": {1.0: 0.01, 2.0: 1.0}}, "T = 2 has 1.00", "hard labels alone"),
        ({"entropies": {1.0: 0.01}}, "hard labels alone serve as well", "T = 2"),
        ({"entropies": {1.0: 0.01, 2.0: 1.0}, "temperature": 2.0}, "nearly one-hot (0.01): stay above 1", "tail"),
        ({"entropies": {1.0: 2.0, 5.0: 6.8}, "temperature": 5.0}, "nearly uniform", "one-hot"),
        ({"entropies": {1.0: 2.0, 5.0: 6.8}, "temperature": 5.0}, "T = 1 has 2.00", "stay above"),
        ({"entropies": {1.0: 2.0}, "top": 0.3}, "the tail dominates, the likeliest 100 ids hold 30%.", "% at T = 1"),
        ({"entropies": {1.0: 2.0, 2.0: 3.0}, "temperature": 2.0}, "neither one-hot nor flat", "At T = 1"),
        ({"entropies": {1.0: 2.0}, "accuracy": 0.1}, "first choice is the label for 10% of the tokens", "surer"),
        ({"entropies": {1.0: 2.0}, "cross_entropy": 3.0}, "surer than it is right", "first choice"),
        ({"entropies": {1.0: 2.0}, "cross_entropy": 2.2}, "sampled (14 bytes/token), top_k (160", "surer"),
        ({"entropies": {1.0: 2.0}, "lost": 0.4}, "top_k does not, 40% of the mass lies outside", "sampled does"),
        (
            {"entropies": {1.0: 2.0}, "error": 2.5},
            "sampled does not, the error of a token's 12 draws is 2.5",
            "At T = 1",
        ),
        (
            {"entropies": {1.0: 2, 4.0: 3}, "temperature": 4.0, "error": 2.5},
            "At T = 1 sampled would serve",
            "top_k does",
        ),
        ({"entropies": {1.0: 2.0}, "divergence": {"name": "js"}}, "the recipe's divergence is js", "At T = 1"),
        ({"entropies": {1.0: 2.0}}, "it pays from the second pass", "does not"),
    ],
)
def test_advice_follows_what_was_found(given, said, unsaid):
    assert said in advice(**given)
    assert unsaid not in advice(**given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"k": 0}, "k is 0"),
        ({"temperatures": (0.0,)}, r"temperatures are \[0.0\]"),
        ({"positions": (-1,)}, r"positions are \[-1\]"),
        ({"tokens": 10, "positions": (3, 500)}, r"Position 500 was asked for, and \d+ tokens were measured"),
    ],
)
def test_bad_arguments_are_told(given, said):
    with pytest.raises(DistillError, match=said):
        inspect_teacher(pair_of(), **given)


def test_no_teacher_and_an_empty_slice_are_told():
    with pytest.raises(DistillError, match="no teacher"):
        inspect_teacher(ModelPair(None, build("llama"), rows("llama", 4), collate))
    with pytest.raises(DistillError, match="held-out slice is empty"):
        inspect_teacher(pair_of([{**row, "labels": row["labels"] * 0 - 100} for row in rows("llama", 4)]))


def test_the_command_reads_a_recipe(tmp_path):
    recipe = ["inspect", "quickstart", f"train.output_dir={tmp_path / 'run'}", "--smoke"]
    result = CliRunner().invoke(app, [*recipe, "--json", "--tokens", "100", "-k", "3"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout[result.stdout.index("{") :])
    assert found["tokens"] >= 100
    assert {len(position["candidates"]) for position in found["positions"]} == {3}
    assert not (tmp_path / "run").exists()


def test_the_command_reads_a_run_and_leaves_what_it_found_there(tmp_path):
    folder = tmp_path / "run"
    run_recipe(load_recipe("quickstart", [f"train.output_dir={folder}"], smoke=True))
    shutil.rmtree(folder / "student")  # the teacher alone is looked at
    result = CliRunner().invoke(app, ["inspect", str(folder), "--position", "2"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    for part in ("entropy", "What T does", "Token 2,", "→", "This teacher on disk", "What this means"):
        assert part in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    left = json.loads((folder / "inspection.json").read_text())
    assert [position["index"] for position in left["positions"]] == [2]
    assert left["advice"]
    with pytest.raises(DistillError, match="whose recipe stands: leave KEY=VALUE"):
        CliRunner().invoke(app, ["inspect", str(folder), "data.max_length=8"], catch_exceptions=False)


def test_a_teacher_that_moves_is_refused_before_anything_is_written(tmp_path):
    given = ["inspect", "ema", f"train.output_dir={tmp_path / 'run'}", "--smoke"]
    with pytest.raises(DistillError, match="of kind ema, and has no model before the run"):
        CliRunner().invoke(app, given, catch_exceptions=False)
    assert not (tmp_path / "run").exists()
