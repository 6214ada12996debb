"""What is said of a teacher is what whole softmaxes say of it."""

import json
import math

import pytest
import torch
from tiny import VOCAB, build, collate, rows
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.analysis import Pair
from hf_distill.analysis.advice import advice_of
from hf_distill.analysis.inspector import AtTemperature, CacheKind, inspect_teacher
from hf_distill.cli import app
from hf_distill.recipe import load_recipe, run_recipe


def pair_of(data=None, **options):
    return Pair(build("llama", 1), None, rows("llama", 12) if data is None else data, collate, batch_size=4, **options)


def whole(pair):
    """(logits [T, V] in float64, labels [T]) of every asked token, made at once by the model itself."""
    logits, labels = [], []
    for start in range(0, len(pair.rows), 4):
        batch = collate(pair.rows[start : start + 4])
        asked = batch["labels"][:, 1:] != -100
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
    assert found.ids_for_99["mean"] == pytest.approx(needed.mean().item(), abs=0.2)  # ties at the edge
    assert found.ids_for_99["median"] == pytest.approx(needed.median().item(), abs=1)
    edges = [low for low, _ in found.histogram]
    counts = torch.histogram(entropy, torch.tensor([*edges, 1e9]).double()).hist
    assert [count for _, count in found.histogram] == counts.tolist()


def test_temperatures_divide_the_logits():
    pair = pair_of(temperature=3.0)
    found = {at.temperature: at for at in inspect_teacher(pair, None, positions=()).by_temperature}
    assert [*found] == [0.5, 1.0, 2.0, 3.0, 5.0, 10.0]
    logits, _ = whole(pair)
    for t, at in found.items():
        p = (logits / t).softmax(-1)
        assert at.entropy == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-5)
        assert at.mass[1] == pytest.approx(p.amax(-1).mean().item(), rel=1e-5)


def test_positions_show_the_likeliest_ids_and_mark_the_data_s_own():
    pair = pair_of()
    logits, labels = whole(pair)
    p = logits.softmax(-1)
    for position in inspect_teacher(pair, None, positions=(0, 3, 17), k=5).positions:
        own = p[position.index]
        best = own.topk(5)
        assert [c.text for c in position.candidates] == [str(i) for i in best.indices.tolist()]
        assert [c.probability for c in position.candidates] == pytest.approx(best.values.tolist(), rel=1e-5)
        label = int(labels[position.index])
        assert position.target == str(label)
        assert [c.is_target for c in position.candidates] == [i == label for i in best.indices.tolist()]
        assert position.rank == int((own > own[label]).sum()) + 1
        assert position.target_probability == pytest.approx(own[label].item(), rel=1e-5)
        assert len(position.context.split()) >= 1


def test_a_position_s_context_ends_where_the_label_begins():
    data = [{"input_ids": torch.arange(3, 23), "labels": torch.arange(3, 23)}]
    (position,) = inspect_teacher(pair_of(data), None, positions=(7,)).positions
    assert position.context.split()[-1] == "10"
    assert position.target == "11"


def test_a_cache_s_cosine_is_that_of_what_it_keeps_or_draws():
    pair = pair_of()
    caches = {cache.kind: cache for cache in inspect_teacher(pair, None, positions=()).caches}
    logits, _ = whole(pair)
    p = logits.softmax(-1)
    kept = p.sort(-1, descending=True).values[:, :64]
    assert caches["top_k"].lost == pytest.approx(1 - kept.sum(-1).mean().item(), abs=1e-5)
    assert caches["top_k"].cosine == pytest.approx((kept.norm(dim=-1) / p.norm(dim=-1)).mean().item(), rel=1e-5)
    assert caches["hidden"].cosine == 1.0
    torch.manual_seed(0)
    draws = torch.multinomial(p, 12 * 200, replacement=True).view(len(p), 200, 12)
    q = torch.zeros(len(p), 200, VOCAB, dtype=p.dtype).scatter_add_(
        2, draws, torch.full_like(draws, 1 / 12, dtype=p.dtype)
    )
    drawn = torch.nn.functional.cosine_similarity(q, p[:, None], dim=-1).mean().item()
    assert caches["sampled"].cosine == pytest.approx(drawn, abs=0.02)


def test_chunks_change_nothing(monkeypatch):
    from hf_distill.cache import drawing

    whole_chunks = inspect_teacher(pair_of(), None)
    monkeypatch.setattr(drawing, "_WORKSPACE", 4 * VOCAB * 7)
    monkeypatch.setattr(drawing, "_CACHED", 4 * VOCAB * 2)
    small = inspect_teacher(pair_of(), None)
    assert small.entropy == pytest.approx(whole_chunks.entropy, rel=1e-6)
    assert small.ids_for_99 == whole_chunks.ids_for_99
    assert [p.index for p in small.positions] == [p.index for p in whole_chunks.positions]


def caches(lost):
    return [CacheKind("hidden", 1000, 0, 1), CacheKind("sampled", 14, 0, 0.8), CacheKind("top_k", 160, lost, 0.9)]


@pytest.mark.parametrize(
    ("entropies", "temperature", "accuracy", "lost", "said"),
    [
        ({1.0: 0.01, 2.0: 1.0}, 1.0, 0.9, 0.0, "little more than a hard label would. T = 2 has 1.00"),
        ({1.0: 2.0, 5.0: 6.5}, 5.0, 0.9, 0.0, "ids that it thinks unlikely. T = 1 has 2.00"),
        ({1.0: 2.0, 2.0: 3.0}, 2.0, 0.9, 0.0, "neither a hard label nor noise"),
        ({1.0: 2.0}, 1.0, 0.1, 0.0, "first choice is the label for 10% of the tokens"),
        ({1.0: 2.0}, 1.0, 0.9, 0.2, "20.0% of the mass lies outside of the ids that a top_k cache keeps: take sampled"),
        ({1.0: 2.0}, 1.0, 0.9, 0.01, "any kind serves"),
    ],
)
def test_advice_follows_what_was_found(entropies, temperature, accuracy, lost, said):
    at = [AtTemperature(t, entropy, {}) for t, entropy in entropies.items()]
    assert said in " ".join(advice_of(at, temperature, 1000, accuracy, caches(lost)))


def test_bad_arguments_are_told():
    with pytest.raises(DistillError, match="k is 0"):
        inspect_teacher(pair_of(), k=0)
    with pytest.raises(DistillError, match="no teacher"):
        inspect_teacher(Pair(None, build("llama"), rows("llama", 4), collate))


def test_the_command_reads_recipes_and_runs(tmp_path):
    recipe = ["inspect", "quickstart", f"train.output_dir={tmp_path / 'run'}", "--smoke"]
    result = CliRunner().invoke(app, [*recipe, "--json", "--tokens", "100"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout[result.stdout.index("{") :])["tokens"] >= 100
    run_recipe(load_recipe("quickstart", [f"train.output_dir={tmp_path / 'run'}"], smoke=True))
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "run"), "--position", "2"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "Entropy of the teacher" in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    left = json.loads((tmp_path / "run" / "inspection.json").read_text())
    assert [position["index"] for position in left["positions"]] == [2]
