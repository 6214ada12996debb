"""docs/evidence.md agrees with the results, and its verdicts follow from them."""

import copy
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CELLS_OF_SCRIPTS = ("encoder", "digits", "relevance", "whisper")
PEAK = "peak_mib_over_what_stays"


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(ROOT / "benchmarks" / "evidence"))
    yield importlib.import_module("report")
    sys.path.remove(str(ROOT / "benchmarks" / "evidence"))


@pytest.fixture
def claims(report):
    return importlib.import_module("claims")


def verdict(claim) -> str:
    return claim[-1]


def test_the_evidence_page_is_generated_from_the_results(report):
    assert report.render() == report.DOCUMENT.read_text(), "run `make evidence`, which writes docs/evidence.md"


def test_every_run_has_a_result_with_its_environment(report):
    results = report.results()
    cells = importlib.import_module("cells")
    expected = {
        *cells.runs(),
        ("before", 0),
        ("cache_bytes", 0),
        *((f"answers_{name}", seed) for name, seed in cells.answer_runs()),
    }
    expected |= {
        (name, seed) for seed in cells.SEEDS for name in (*CELLS_OF_SCRIPTS, *(f"peer_{who}" for who in cells.PEERS))
    }
    assert expected == results.keys()
    assert all({"torch", "transformers", "cpu_count"} <= result["environment"].keys() for result in results.values())


def test_the_page_depends_on_every_number_of_the_results(report, monkeypatch):
    results, page = report.results(), report.render()
    for key in results:
        changed = copy.deepcopy(results)
        for metrics in (changed[key]["metrics"], *changed[key].get("curve", [])):
            metrics.update(
                {name: value * 1.5 for name, value in metrics.items() if not name.endswith(("step", "_parameters"))}
            )
        monkeypatch.setattr(report, "results", lambda changed=changed: changed)
        assert report.render() != page, key


def test_the_readme_quotes_the_results(report, claims):
    results, readme = report.results(), (ROOT / "README.md").read_text()
    section = readme[readme.index("**Evidence.**") :].split("\n\n")[0]
    labels = [f"{claims.mean(claims.every(results, cell)):.1f}" for cell in ("distilled", "hard")]
    ratios = [claims.pair(results, key, lambda ours, theirs: ours / theirs) for key in ("tokens_per_second", PEAK)]
    peers = [f"{value:.2f}" for by in ratios for value in by.values()]
    assert [number for number in (*labels, *peers) if number not in section] == []


def test_cards_quote_the_results(report):
    cells = importlib.import_module("cells")
    for name, cell in cells.CELLS.items():
        if cell.card:
            metrics = report.results()[name, 0]["metrics"]
            card = (ROOT / "model_cards" / cell.card / "README.md").read_text()
            assert f"Held-out perplexity {metrics['perplexity']:.2f} " in card
            assert f"| student | {metrics['perplexity']:.2f} | {metrics['kl']:.4f} |" in card


def test_students_start_from_equal_weights_and_train_on_equal_numbers_of_tokens(report):
    runs = {key: result for key, result in report.results().items() if "recipe" in result}
    others = {"long", "progressive", "progressive_each"}
    cells = importlib.import_module("cells")
    others |= {name for shape in cells.SHAPES.values() for name in shape} - {"distilled", "hard"}
    plain = [r for (name, _), r in runs.items() if name not in others]
    assert {r["recipe"]["train"]["max_steps"] for r in plain} == {40}
    assert len({r["data"]["tokens_per_row"] for r in plain}) == 1
    assert len({tuple(r["student"]["layers_kept"]) for r in plain if "layers_kept" in r["student"]}) == 1


def test_seven_tenths_of_the_tokens_reach_the_control(report):
    for (name, _), result in report.results().items():
        if name == "long":
            student, control = result["curve"], result["control_curve"]
            early = next(point for point in student if point["step"] >= 0.7 * student[-1]["step"])
            assert early["perplexity"] < control[-1]["perplexity"]


def test_a_claim_that_the_results_contradict_is_marked(report, claims):
    results = dict(report.results())
    assert claims.HOLDS in verdict(claims.soft(results))
    results["distilled", 1] = results["hard", 0]
    assert verdict(claims.soft(results)) == claims.NOT


def test_a_quantized_teacher_that_is_worse_than_the_seed_spread_is_marked(report, claims):
    results = copy.deepcopy(report.results())
    results["teacher_nf4", 0]["metrics"]["perplexity"] *= 2
    assert verdict(claims.quantised(results)) == claims.NOT


def test_an_equally_fast_peer_is_marked(report, claims):
    results = copy.deepcopy(report.results())
    for (name, _), result in results.items():
        if name == "peer_gkd_kl":
            result["metrics"]["tokens_per_second"] *= 10
    assert verdict(claims.pace_of_peers(results)) == claims.NOT
