"""Run the experiments whose results are missing, then write docs/evidence.md: python run.py (`make evidence`).

Each cell runs in a separate process that writes results/evidence/CELL-SEED.json. A cell whose file exists is
not run again.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from math import exp
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from cards import cards
from cells import CELLS, NARROW_AND_SHALLOW, NUM_LAYERS, PEERS, SEEDS, STEPS, TEACHER, answer_runs, recipe_values, runs
from compute import counted
from report import RESULTS, write
from texts import prepare
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_distill import DistillTrainer
from hf_distill.cache import write_cache
from hf_distill.core.files import atomic_path
from hf_distill.core.io import environment, held_out_metrics, read_json, write_json
from hf_distill.core.signals import FeatureKey, Signals
from hf_distill.core.targets import FeatureTokens, Targets
from hf_distill.models.pruning import block_influence, cut_student, top_layers
from hf_distill.planning.pruned import student_config
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.recipe.from_teacher import FromTeacher
from hf_distill.runner.cache_writer import write_recipe_cache
from hf_distill.runner.datasets import prepare_data
from hf_distill.runner.model_loading import resolve_model
from hf_distill.runner.teacher_only import load_teacher_and_data, static_teacher_spec
from hf_distill.teachers import Teacher

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WORK = Path(
    "runs/evidence"
)  # relative to the root, where all cells run, so that recipes and cards contain no absolute path
TEXTS = WORK / "texts"
# One core for each cell. The allocator keeps freed memory for the next step instead of returning it to the system.
_ONE_CORE = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


class Workload(NamedTuple):
    """A result: the script that makes it, its arguments, and whether it runs while no other one does."""

    cell: str
    seed: int
    script: list[str]
    alone: bool = False

    @property
    def file(self) -> Path:
        """The file of the result."""
        return RESULTS / f"{self.cell}-{self.seed}.json"


def jobs() -> Iterator[Workload]:
    """Yield the workloads of all results."""
    yield Workload("before", 0, ["run.py", "before"])
    yield Workload("cache_bytes", 0, ["run.py", "cache_bytes"])
    for name, seed in runs():
        yield Workload(name, seed, ["run.py", name, str(seed)])
    for seed in SEEDS:
        yield Workload("encoder", seed, ["encoder.py", str(seed)])
        yield Workload("digits", seed, ["digits.py", str(seed)])
        yield Workload("relevance", seed, ["relevance.py", str(seed)])
        yield Workload("whisper", seed, ["whisper.py", str(seed)])
    for name, seed in answer_runs():
        yield Workload(f"answers_{name}", seed, ["answers.py", name, str(seed)])
    for seed in SEEDS:
        for peer in PEERS:
            yield Workload(f"peer_{peer}", seed, ["peers.py", peer, str(seed)], alone=True)


def recipe_of(name: str, seed: int, output: Path, *more: str) -> Any:
    """Return the recipe of a cell."""
    start = random_start() if "start=random" in CELLS[name].changes else None
    values, changes = recipe_values(name, seed, TEXTS, layers(), output, start)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:  # a separate file, because cells run concurrently
        yaml.safe_dump(values, file)
        file.flush()
        return load_recipe(file.name, [*changes, *more])


def layers() -> list[int]:
    """Return the layers that every student keeps: those of the highest block influence on the first training rows."""
    file = WORK / "layers.json"
    if not file.is_file():
        path = resolve_model(TEACHER)
        tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
        rows = [json.loads(line)["text"] for line in (TEXTS / "train.jsonl").read_text().splitlines()[:8]]
        batches = [dict(tokenizer(row, return_tensors="pt", truncation=True, max_length=256)) for row in rows]
        write_json(file, {"layers": top_layers(block_influence(model, batches), NUM_LAYERS)})
    return read_json(file)["layers"]


def random_start() -> Path:
    """Return the folder of a student with random weights, in the shape that is pruned in depth and width."""
    folder = WORK / "random"
    if not folder.is_dir():
        path = resolve_model(TEACHER)
        config = student_config(FromTeacher(**NARROW_AND_SHALLOW), AutoConfig.from_pretrained(path))
        set_seed(0)
        with atomic_path(folder, f"{os.getpid()}.half") as temporary:
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(temporary)
            AutoTokenizer.from_pretrained(path).save_pretrained(temporary)
    return folder


def measure(student: Path, apart: bool = False) -> dict[str, float]:
    """Return held-out metrics of a student, measured with the teacher in full precision whichever one trained it."""
    recipe = recipe_of("distilled", 0, WORK / "measured", "control=null")
    teacher, data, tokenizer, args = load_teacher_and_data(recipe, static_teacher_spec(recipe), lambda text: None)
    args.report_to, args.remove_unused_columns = [], False
    model = AutoModelForCausalLM.from_pretrained(student)
    tools = {"data_collator": data.collator, "processing_class": tokenizer}
    trainer = DistillTrainer(model, args, teacher=teacher, eval_dataset=data.held_out, **tools)
    results: dict[str, float] = {}
    for kind in ("", "general", "technical") if apart else ("",):
        rows = data.held_out
        if kind:
            recipe = recipe_of("distilled", 0, WORK / "measured", f"data.eval.path={TEXTS / f'held_out_{kind}.jsonl'}")
            rows = prepare_data(recipe, tokenizer, 0, 1).held_out
        metrics = held_out_metrics(trainer.evaluate(rows))
        keys = ("perplexity", "kl", "agreement", "teacher_perplexity")
        results |= {f"{kind}_{key}" if kind else key: metrics[key] for key in keys}
    return results


def cell(name: str, seed: int) -> None:
    """Run a cell with a seed, and write its result."""
    spec, output, more = CELLS[name], WORK / f"{name}-{seed}", []
    shutil.rmtree(output, ignore_errors=True)
    if spec.cache:
        path = WORK / f"{name}-{seed}-cache"
        shutil.rmtree(path, ignore_errors=True)
        write_recipe_cache(recipe_of(name, seed, output), str(path), **spec.cache, seed=seed)
        more = [f"teacher={{kind: cached, path: '{path}', source: {{model: '{TEACHER}'}}}}"]
    start = time.perf_counter()
    folder = run_recipe(recipe_of(name, seed, output, *more)).folder
    seconds = time.perf_counter() - start
    run_results = read_json(folder / "results.json")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    result: dict[str, Any] = {"cell": name, "seed": seed, "metrics": measure(folder / "student", spec.apart)}
    result |= {
        "run_seconds": seconds,
        "data": run_results["data"],
        "student": run_results.get("student"),
        "recipe": recipe,
    }
    if spec.curve:
        result |= {"curve": _curve(folder, "student"), "control_curve": _curve(folder, "control")}
    write_json(RESULTS / f"{name}-{seed}.json", result | {"environment": environment("cpu")})
    if not (spec.card and seed == 0):
        shutil.rmtree(output)


def _curve(folder: Path, run: str) -> list[dict[str, float]]:
    """Return the metrics of evaluations during training; without a teacher, the loss is the cross entropy."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    by_step = {line["step"]: held_out_metrics(line) for line in lines if line["run"] == run and "eval_loss" in line}
    keys = ("perplexity", "kl", "agreement")
    return [
        {"step": step, "perplexity": exp(value["loss"])} | {key: value[key] for key in keys if key in value}
        for step, value in by_step.items()
    ]


def before() -> None:
    """Measure the pruned student before training, from which all cells start."""
    path, folder = resolve_model(TEACHER), WORK / "before"
    teacher = AutoModelForCausalLM.from_pretrained(path)
    cut_student(teacher, layers()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    result: dict[str, Any] = {"cell": "before", "seed": 0, "metrics": measure(folder)}
    student = AutoModelForCausalLM.from_pretrained(folder)
    result |= {"layers": layers(), "steps": STEPS, "compute": counted(teacher, student)}
    write_json(RESULTS / "before-0.json", result | {"environment": environment("cpu")})
    shutil.rmtree(folder)


class _RememberingTeacher:
    """Runs a teacher once for each batch, so that several caches can be written from one pass."""

    def __init__(self, teacher: Teacher):
        self.teacher, self.model = teacher, teacher.model
        self._signals: dict[bytes, Signals] = {}

    def __call__(self, inputs: dict, targets: Targets, features: Mapping[FeatureKey, FeatureTokens], /) -> Signals:
        key = inputs["input_ids"].numpy().tobytes()
        if key not in self._signals:
            self._signals[key] = self.teacher(inputs, targets, features)
        return self._signals[key]


def cache_bytes() -> None:
    """Write each cache of the rows that all cells share, and record its bytes per token."""
    recipe = recipe_of("pure", 0, WORK / "measured")
    teacher, data, tokenizer, args = load_teacher_and_data(recipe, static_teacher_spec(recipe), lambda text: None)
    remembering, metrics = _RememberingTeacher(teacher), {}
    for name, spec in CELLS.items():
        if spec.cache and spec.changes == CELLS["pure"].changes:
            with tempfile.TemporaryDirectory() as folder:
                manifest = write_cache(
                    folder,
                    remembering,
                    data.train,
                    data.held_out,
                    collator=data.collator,
                    processing_class=tokenizer,
                    batch_size=args.per_device_train_batch_size,
                    temperature=1.0,
                    **spec.cache,
                )
            metrics[name] = manifest.bytes_per_token
    result = {"cell": "cache_bytes", "seed": 0, "metrics": metrics, "environment": environment("cpu")}
    write_json(RESULTS / "cache_bytes-0.json", result)


def do(job: Workload) -> str:
    """Run a workload in a separate process, and return its result as a line of text."""
    start = time.perf_counter()
    settings = dict(os.environ) | ({} if job.alone else _ONE_CORE)
    command = [sys.executable, str(HERE / job.script[0]), *job.script[1:]]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job.cell}, seed {job.seed}:\n{done.stderr[-4000:]}")
    if not job.file.is_file():  # a script that runs no recipe prints its metrics
        metrics = json.loads(done.stdout.strip().splitlines()[-1])
        versions = environment("cpu") | {package: version(package) for package in ("trl", "peft")}
        write_json(job.file, {"cell": job.cell, "seed": job.seed, "metrics": metrics, "environment": versions})
    metrics = {key: round(value, 4) for key, value in read_json(job.file)["metrics"].items()}
    return f"{job.cell}, seed {job.seed} ({time.perf_counter() - start:.0f} s): {metrics}"


def main() -> None:
    """Run the missing workloads: concurrently, and then one at a time those that measure speed and memory."""
    os.chdir(ROOT)
    missing = [job for job in jobs() if not job.file.is_file()]
    if missing:
        RESULTS.mkdir(parents=True, exist_ok=True)
        prepare(TEXTS)
        layers()
    if any(job.script[0] == "answers.py" for job in missing):
        subprocess.run(
            [sys.executable, str(HERE / "answers.py"), "prepare"], env=dict(os.environ) | _ONE_CORE, check=True
        )
    for alone, workers in ((False, os.cpu_count()), (True, 1)):
        with ThreadPoolExecutor(workers) as pool:
            running = [pool.submit(do, job) for job in missing if job.alone == alone]
            try:
                for done in as_completed(running):
                    print(done.result(), flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    write()
    cards(WORK)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "before":
        before()
    elif sys.argv[1] == "cache_bytes":
        cache_bytes()
    else:
        cell(sys.argv[1], int(sys.argv[2]))
