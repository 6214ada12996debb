"""The GPU benchmark runs on a CPU with small shapes, and its limits are compared with what it measured."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_stages_that_need_no_gpu_run_on_a_cpu_and_write_results(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, "gpu.py", "--device", "cpu", "--output", str(output)]
    stages = ["correctness", "products", "fragmented", "waits"]
    done = subprocess.run([*command, "--stages", *stages], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(output.read_text())
    assert results["correctness"]["cases"] > 50
    assert results["correctness"]["failed"] == []
    assert results["fragmented"]["bitwise_equal"]
    assert "waits_for_the_device" not in results["waits"]


def test_a_missed_limit_is_reported(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_report import verdicts

    def call(relative, seconds, peak):
        return {"relative": relative, "seconds": seconds, "peak_gib": peak}

    calls = {
        "ours, KL + CE": call(1.3, 0.06, 4.0),
        "ours, JS + CE": call(1.6, 0.07, 4.0),
        "ours, KL": call(1.2, 0.05, 4.0),
        "ours, JS": call(1.2, 0.05, 5.0),
        "TRL, KL": call(1.7, 0.08, 3.0),
        "TRL, JS": call(1.0, 0.04, 3.0),
    }
    results = {"losses": {"shape": {"head_gradient_gib": 2.0, "calls": calls}}, "trainer": {"bf16": {"failed": "x"}}}
    assert [passed for _, passed in verdicts(results)] == [True, False, True, True, False, False, False]


def test_the_benchmark_of_training_steps_runs_its_cases_on_a_cpu(tmp_path):
    output = tmp_path / "gpu_step.json"
    cases = ["dense", "gkd", "ours", "on-policy ours"]
    command = [sys.executable, "gpu_step.py", "--device", "cpu", "--output", str(output), "--cases", *cases]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {case: rows[0] for case, rows in json.loads(output.read_text())["cases"].items()}
    assert all("failed" not in row for row in results.values()), results
    assert abs(results["ours"]["loss"] - results["dense"]["loss"]) < 1e-4 * results["dense"]["loss"]
    assert abs(results["ours"]["loss"] - results["gkd"]["loss"]) < 1e-4 * results["gkd"]["loss"]
