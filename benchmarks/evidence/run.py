"""Run what is missing of the evidence, then write docs/evidence.md: python run.py (`make evidence`).

Each cell is a process of its own, and leaves results/evidence/CELL-SEED.json; what is there is not run again.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from cells import BLOCKS, CELLS, PEERS, SEEDS, STEPS, TEACHER, runs, values_of
from report import DOCUMENT, RESULTS, render
from texts import prepare
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import DistillTrainer
from hf_distill.evidence import environment, measured, read_json, write_json, write_whole
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.running.caching import write_recipe_cache
from hf_distill.running.models import resolve_model
from hf_distill.running.speaker import load_speaker, speaker_of
from hf_distill.student import block_influence, most_influential

HERE = Path(__file__).parent
WORK = HERE.parent.parent / "runs" / "evidence"
TEXTS = WORK / "texts"


def recipe_of(name: str, seed: int, output: Path, *more: str) -> Any:
    """A cell's recipe."""
    values, changes = values_of(name, seed, TEXTS, layers(), output)
    file = WORK / f"{name}-{seed}.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return load_recipe(str(file), [*changes, "control=null", *more])


def layers() -> list[int]:
    """The blocks that every student keeps: those that change what passes them most, over the first training rows."""
    file = WORK / "layers.json"
    if not file.is_file():
        path = resolve_model(TEACHER)
        tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
        rows = [json.loads(line)["text"] for line in (TEXTS / "train.jsonl").read_text().splitlines()[:8]]
        batches = [dict(tokenizer(row, return_tensors="pt", truncation=True, max_length=256)) for row in rows]
        write_json(file, {"layers": most_influential(block_influence(model, batches), BLOCKS)})
    return read_json(file)["layers"]


def measure(student: Path, seed: int) -> dict[str, float]:
    """A student's held-out figures beside the teacher in full precision, whoever taught it."""
    found: dict[str, float] = {}
    for part in ("held_out", "held_out_general", "held_out_technical"):
        recipe = recipe_of("distilled", seed, WORK / "measured", f"data.eval.path={TEXTS / f'{part}.jsonl'}")
        teacher, data, tokenizer, args = load_speaker(recipe, speaker_of(recipe), lambda text: None)
        args.report_to, args.remove_unused_columns = [], False
        model = AutoModelForCausalLM.from_pretrained(student)
        parts = {"eval_dataset": data.held_out, "data_collator": data.collator, "processing_class": tokenizer}
        metrics = measured(DistillTrainer(model, args, teacher=teacher, **parts).evaluate())
        kept = {key: metrics[key] for key in ("perplexity", "kl", "agreement", "teacher_perplexity")}
        found |= kept if part == "held_out" else {f"{part.rpartition('_')[2]}_{key}": v for key, v in kept.items()}
    return found


def cell(name: str, seed: int) -> None:
    """Run one, and write down what came of it."""
    spec, output, more = CELLS[name], WORK / f"{name}-{seed}", []
    if spec.cache:
        path = WORK / f"{name}-cache"
        write_recipe_cache(recipe_of(name, seed, output), str(path), **spec.cache)
        more = [f"teacher={{kind: cached, path: '{path}', source: {{model: '{TEACHER}'}}}}"]
    recipe = recipe_of(name, seed, output, *more)
    start = time.perf_counter()
    result = run_recipe(recipe, resume=True)
    seconds = time.perf_counter() - start
    evidence = read_json(result.folder / "evidence.json")
    found: dict[str, Any] = {"cell": name, "seed": seed, "metrics": measure(result.folder / "student", seed)}
    found |= {"run_seconds": seconds, "train_seconds": result.models["student"].get("train_seconds")}
    found |= {"student": evidence.get("student"), "recipe": evidence_recipe(result.folder)}
    if spec.curve:
        lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        keys = ("step", "eval_perplexity", "eval_kl", "eval_agreement")
        found["curve"] = [{key: line[key] for key in keys} for line in lines if "eval_kl" in line]
    write_json(RESULTS / f"{name}-{seed}.json", found | {"environment": environment("cpu")})


def evidence_recipe(folder: Path) -> dict[str, Any]:
    """The resolved recipe, without this machine's paths."""
    text = (folder / "recipe.yaml").read_text().replace(str(WORK), "runs/evidence")
    return yaml.safe_load(text)


def before() -> None:
    """The student as it is cut, which all cells begin with."""
    from hf_distill.student import cut_student

    path = resolve_model(TEACHER)
    cut_student(AutoModelForCausalLM.from_pretrained(path), layers()).save_pretrained(WORK / "before")
    AutoTokenizer.from_pretrained(path).save_pretrained(WORK / "before")
    found = {"cell": "before", "seed": 0, "metrics": measure(WORK / "before", 0), "layers": layers()}
    write_json(RESULTS / "before-0.json", found | {"environment": environment("cpu"), "steps": STEPS})


def jobs() -> Iterator[tuple[str, int, list[str]]]:
    """Each result: its name, its seed, and the script that makes it, with its arguments."""
    yield "before", 0, ["run.py", "before"]
    for name, seed in runs():
        yield name, seed, ["run.py", name, str(seed)]
    for seed in SEEDS:
        for who in PEERS:
            yield f"peer_{who}", seed, ["peers.py", who, str(seed)]
    for seed in SEEDS:
        yield "encoder", seed, ["encoder.py", str(seed)]


def main() -> None:
    """All that is missing."""
    prepare(TEXTS)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, seed, script in jobs():
        file = RESULTS / f"{name}-{seed}.json"
        if file.is_file():
            continue
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *script], cwd=HERE, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}, seed {seed}:\n{done.stderr[-4000:]}")
        if not file.is_file():  # what is no recipe prints its figures
            metrics = json.loads(done.stdout.strip().splitlines()[-1])
            versions = environment("cpu") | {package: version(package) for package in ("trl", "peft")}
            write_json(file, {"cell": name, "seed": seed, "metrics": metrics, "environment": versions})
        told = {key: round(value, 4) for key, value in read_json(file)["metrics"].items()}
        print(f"{name}, seed {seed} ({time.perf_counter() - start:.0f} s): {told}", flush=True)
    write_whole(DOCUMENT, render())


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "before":
        before()
    else:
        cell(sys.argv[1], int(sys.argv[2]))
