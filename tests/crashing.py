"""Kills runs at chosen moments and resumes them, each in one or two separate processes.

A kill point is a time, or a location: the n-th call of a function of a run, before the call, in the middle of what it
writes, or after it. Processes are forked from one that has imported everything, so that a trial takes seconds. When one
of two processes is killed, the other one is killed as well, as a launcher does it.
"""

import gc
import json
import os
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from forking import environments_of_ranks, fork_context

# Functions of a run at which it can be killed, and whether they write a file that can be truncated.
KILL_LOCATIONS = {
    "step": ("hf_distill.trainer.distiller:Distiller.__call__", False),
    "backward": ("accelerate:Accelerator.backward", False),
    "optimizer": ("accelerate.optimizer:AcceleratedOptimizer.step", False),
    "teacher moves": ("hf_distill.trainer.teacher_callback:TeacherCallback.on_step_end", False),
    "evaluation": ("transformers:Trainer.prediction_step", False),
    "checkpoint begins": ("hf_distill.trainer.checkpointing:mark_incomplete", False),
    "weights": ("transformers:PreTrainedModel.save_pretrained", True),
    "projectors": ("hf_distill.trainer.sidecar:save_sidecar", True),
    "teacher's state": ("hf_distill.teachers.state:save_file", True),
    "optimizer's state": ("torch:save", True),
    "trainer's state": ("transformers:TrainerState.save_to_json", True),
    "seal": ("hf_distill.trainer.checkpointing:mark_complete", False),
    "rename": ("pathlib:Path.replace", False),
    "rotation": ("hf_distill.trainer.checkpointing:rotate", False),
    "old checkpoint": ("hf_distill.trainer.checkpoints:remove", False),
    "removal": ("shutil:rmtree", False),
    "cache is read": ("hf_distill.cache.reader:CacheReader.get", False),
    "shard": ("hf_distill.cache.writer:write_shard", False),
    "index": ("hf_distill.cache.unfinished:write_index", False),
    "head": ("hf_distill.cache.writer:write_head", False),
    "completions": ("hf_distill.generation.store:CompletionStore.write", False),
    "data set": ("pyarrow.parquet:write_table", True),
    "manifest": ("hf_distill.cache.manifest:Manifest.write", False),
    "log": ("hf_distill.core.io:MetricsFile.on_log", True),
    "evidence": ("hf_distill.runner.single_run:write_json", False),
    "recipe": ("hf_distill.runner.run_dir:_write_recipe", False),
}


_SHORT = [
    *("train.max_steps=7", "train.save_steps=3", "train.save_total_limit=1", "train.logging_steps=1"),
    *("train.eval_strategy=steps", "train.eval_steps=3", "train.learning_rate=0.01"),
]
_FEATURES = "losses=[{name: hidden_cosine, weight: 0.1}, {name: attention_kl, layers: last:1}]"
_ALL_FEATURES = [_FEATURES, "projectors={kind: linear}", "teacher.attn_implementation=eager"]
_LORA = "student={model: 'smoke:llama/student', lora: {r: 4}}"
_GENERATION = [
    *("generate.max_prompts=24", "generate.prompts_per_part=3", "generate.samples=2", "generate.max_new_tokens=16"),
    "generate.filters=[{name: length, min_characters: 12}, exact_duplicates]",
]
_REMOTE = [  # no smoke run, which would replace the server by a local model
    *("student.model=smoke:llama/student", "train.per_device_train_batch_size=2", "train.use_cpu=true"),
    *("teacher={kind: remote, api: vllm, concurrency: 1, top_k: 8}", "data.max_length=64", "data.eval.max_rows=4"),
]
KINDS = {  # name of a packaged recipe, and overrides
    "frozen": ("quickstart", _ALL_FEATURES),
    "two processes": ("quickstart", [*_ALL_FEATURES, "control=null"]),
    "cached": ("cached", ["control=null"]),
    "adapter_base": ("quickstart", [_LORA, "teacher={kind: adapter_base}", "control=null"]),
    **{name: (name, ["control=null"]) for name in ("ema", "snapshot", "online", "mutual", "mtp", "multi-view")},
    "on-policy": ("on-policy", ["control=null"]),
    "chain": ("progressive", []),
    "capture": ("cached", []),
    **{name: (name, ["control=null"]) for name in ("cross-tokenizer", "privileged-context", "text-classification")},
    "pruned": ("prune-width", ["control=null"]),
    "trimmed": ("quickstart", ["student={from_teacher: {keep_layers: 2, vocab: {keep: used}}}", "control=null"]),
    "quantized": ("quantized-student", ["control=null"]),
    "remote": ("remote", _REMOTE),
    "generate": ("sequence-level", _GENERATION),
    "generate and train": ("sequence-level", _GENERATION),
}
FILES_ALONE = ("capture", "generate")  # kinds that train nothing
NUM_RANKS = dict.fromkeys(KINDS, 1) | {"two processes": 2}


def make_workload(kind: str, shared_folder: Path, *overrides: str, callbacks: Sequence[Any] = ()) -> Callable[[], None]:
    """Return a function that runs or resumes a recipe, in the folder `run` of the working directory.

    Args:
        kind: a key of `KINDS`.
        shared_folder: a folder with the cache that all trials use.
        overrides: overrides of the recipe.
        callbacks: callbacks of its trainers.
    """
    return partial(_run_workload, kind, shared_folder, overrides, callbacks)


def _run_workload(kind: str, shared_folder: Path, overrides: Sequence[str], callbacks: Sequence[Any]) -> None:
    from hf_distill.recipe import load_recipe, run_recipe
    from hf_distill.runner.cache_writer import write_recipe_cache
    from hf_distill.runner.generate import generate_data

    name, changes = KINDS[kind]
    if name == "cached":
        changes = [*changes, f"teacher.path={'run' if kind == 'capture' else shared_folder / 'cache' / 'run'}"]
        texts = [json.dumps({"text": f"The number {i} times {i} is {i * i}. " * 9}) for i in range(60)]
        if not (shared_folder / "texts.jsonl").exists():  # later processes run at the same time and read it
            (shared_folder / "texts.jsonl").write_text("\n".join(texts))
        changes.append(f"data.task.path={shared_folder / 'texts.jsonl'}")
    with _teacher_server() if kind == "remote" else nullcontext() as url:
        changes = [*changes, *([] if url is None else [f"teacher.url={url}"])]
        changes = [*_SHORT, *changes, "train.output_dir=run", *overrides]
        recipe = load_recipe(name, changes, smoke=kind != "remote")
        if kind == "capture":
            write_recipe_cache(recipe, batch_size=2, shard_rows=4)
        elif kind == "generate":
            generate_data(recipe, "run", resume=True)
        else:
            run_recipe(recipe, resume=True, callbacks=callbacks)


@contextmanager
def _teacher_server() -> Iterator[str]:
    """Serve a tiny teacher in a thread of this process, which ends with it; return its URL."""
    from servers.teacher_servers import VLLMServer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_distill.runner.model_loading import resolve_model

    folder = str(resolve_model("smoke:llama/teacher"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with VLLMServer(model, tokenizer=tokenizer, context=512) as server:
        server.requests = deque(maxlen=1)  # all requests would grow in memory
        yield server.url


@dataclass(frozen=True)
class KillPoint:
    """When a run is killed: after some seconds, or at a call of a function in `KILL_LOCATIONS` by one of its ranks."""

    seconds: float | None = None
    location: str = ""
    call: int = 0
    when: str = "before"  # half, after
    rank: int = 0

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"{self.seconds:.2f} s"
        return f"{self.when} call {self.call} of {self.location} by rank {self.rank}"


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _wrap(location: str, around: Callable[[str, Callable, tuple, dict], Any]) -> None:
    module, _, path = KILL_LOCATIONS[location][0].partition(":")
    owner: Any = import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        return around(location, original, args, kwargs)

    setattr(owner, name, wrapped)


def _record_complete_checkpoints() -> None:
    """Make the process record the output folders in which a checkpoint is complete."""
    module = import_module("hf_distill.trainer.checkpointing")
    original = module.mark_complete

    def noting(folder: Path) -> None:
        original(folder)
        with Path("sealed").open("a") as file:
            file.write(f"{folder.parent}\n")

    module.mark_complete = noting


def _truncate_newest_file(folder: Path, since: float) -> None:
    """Truncate the newest file that was written since a time to its first half; a JSONL file in its last line."""
    files = [(p.stat().st_mtime, p) for p in folder.rglob("*") if p.is_file() and p.stat().st_mtime >= since - 0.01]
    if files:
        path = max(files)[1]
        data = path.read_bytes()
        size = data.rstrip(b"\n").rfind(b"\n") + 5 if path.suffix == ".jsonl" else len(data) // 2
        os.truncate(path, size)


def run_child(
    workload: Callable[[], None],
    folder: Path,
    kill_point: KillPoint | None = None,
    counts: Path | None = None,
    environment: Mapping[str, str] = {},
) -> None:
    """Run a job as one rank, which a kill point of this rank kills; write the number of calls at each location."""
    import torch

    os.environ.update(environment)
    gc.freeze()  # garbage collection would walk every imported module
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    calls: Counter = Counter()

    def around(location: str, original: Callable, args: tuple, kwargs: dict) -> Any:
        calls[location] += 1
        hit = kill_point is not None and kill_point.location == location and kill_point.call == calls[location]
        if hit and kill_point.when == "before":
            kill()
        since = time.time()
        result = original(*args, **kwargs)
        if hit:
            if kill_point.when == "half":
                _truncate_newest_file(folder / "run", since)
            kill()
        return result

    for location in KILL_LOCATIONS if counts else [kill_point.location] if kill_point and kill_point.location else []:
        _wrap(location, around)
    _record_complete_checkpoints()
    workload()
    if counts:
        counts.write_text(json.dumps(calls))


def run_in_process(
    workload: Callable[[], None],
    folder: Path,
    kill_point: KillPoint | None = None,
    counts: Path | None = None,
    num_ranks: int = 1,
) -> int:
    """Run a job in separate processes; when one ends with an error, kill the others; return its exit code.

    Args:
        workload: the job.
        folder: its working directory.
        kill_point: where it is killed.
        counts: file for the number of calls at each location by each rank, and the seconds of the job.
        num_ranks: the number of processes.
    """
    start = time.monotonic()
    processes, files = [], [None if counts is None else Path(f"{counts}.{rank}") for rank in range(num_ranks)]
    for rank, environment in enumerate(environments_of_ranks(num_ranks)):
        own_kill_point = kill_point if kill_point is None or kill_point.rank == rank else None
        arguments = (workload, folder, own_kill_point, files[rank], environment)
        processes.append(fork_context().Process(target=run_child, args=arguments))
        processes[-1].start()
    end = None if kill_point is None or kill_point.seconds is None else start + kill_point.seconds
    codes: list[int | None] = [None] * num_ranks
    while None in codes and not any(codes):
        running = [process for process, code in zip(processes, codes, strict=True) if code is None]
        ended = connection.wait([process.sentinel for process in running], end and max(0.0, end - time.monotonic()))
        for process in running:
            if not ended:
                process.kill()
            if not ended or process.sentinel in ended:
                process.join()
        codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    # A rank that is killed makes the others fail, so that its code comes first.
    code = next((code for code in sorted(code or 0 for code in codes) if code), 0)
    if counts is not None and code == 0:
        calls = [json.loads(file.read_text()) for file in files if file is not None]
        counts.write_text(json.dumps({"calls": calls, "seconds": time.monotonic() - start}))
    return code


def draw_kill_points(counts: dict[str, Any], number: int, seed: int) -> list[KillPoint]:
    """Draw kill points: a third of them times, the others locations, each of which is drawn equally often."""
    random_ = random.Random(seed)
    clock = [KillPoint(seconds=random_.uniform(0.1, counts["seconds"])) for _ in range(number // 3)]
    locations = sorted(name for name in KILL_LOCATIONS if any(calls.get(name) for calls in counts["calls"]))
    random_.shuffle(locations)
    at = []
    for i in range(number - len(clock)):
        location = locations[i % len(locations)]
        whens = ["before", "half", "after"] if KILL_LOCATIONS[location][1] else ["before", "after"]
        rank = random_.choice([rank for rank, calls in enumerate(counts["calls"]) if calls.get(location)])
        call = random_.randint(1, counts["calls"][rank][location])
        at.append(KillPoint(location=location, call=call, when=random_.choice(whens), rank=rank))
    return clock + at


def run_outputs(folder: Path, kind: str) -> dict[str, Any]:
    """Return what no crash may change: weights, metrics and logs of a run, or the files of a cache or a data set."""
    folder = folder / "run"
    if kind in FILES_ALONE:
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]  # it names the process
        return {str(p.relative_to(folder)): p.read_bytes() for p in files}
    outputs: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if "checkpoint-" not in str(path):
            outputs[str(path.relative_to(folder))] = _tensors(path)
    results = json.loads((folder / "results.json").read_text())
    outputs["status"], outputs["models"] = results["status"], [_without_timings(m) for m in results["models"].values()]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    outputs["logs"] = [_without_timings(line) for line in lines if "loss" in line or "eval_loss" in line]
    return outputs


def _tensors(path: Path) -> dict[str, Any]:
    """Return what a safetensors file holds; the order of its metadata is not the same in every process."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
        contents = {
            name: (t.dtype, t.shape, t.view(-1).view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()
        }
        return {"metadata": file.metadata(), "tensors": contents}


def _without_timings(values: dict[str, Any]) -> dict[str, Any]:
    timing = ("per_second", "_time", "runtime", "seconds")
    return {name: value for name, value in values.items() if not name.endswith(timing)}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of the outputs that differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def kill_and_resume(workload, folder: Path, kill_point: KillPoint, expected: dict[str, Any], kind: str) -> str | None:
    """Kill a run, look for a complete checkpoint, resume it, and compare; return the problem, None if there is none."""
    code = run_in_process(workload, folder, kill_point, num_ranks=NUM_RANKS[kind])
    if code not in (0, -signal.SIGKILL):
        return f"{kill_point}: ended with {code} before it was killed: {_end_of_log(folder)}"
    if without := folders_without_complete_checkpoint(folder):
        return f"{kill_point}: no complete checkpoint is left in {without}"
    if code := run_in_process(workload, folder, num_ranks=NUM_RANKS[kind]):
        return f"{kill_point}: could not be resumed ({code}): {_end_of_log(folder)}"
    lost = differences(run_outputs(folder, kind), expected)
    return f"{kill_point}: not the same: {', '.join(lost)}" if lost else None


def folders_without_complete_checkpoint(folder: Path) -> list[str]:
    """Return the output folders that had a complete checkpoint before the kill and have none after it."""
    from hf_distill.trainer.checkpoints import checkpoint_defect, checkpoints_of, restore

    file = folder / "sealed"
    output_dirs = sorted(set(file.read_text().splitlines())) if file.is_file() else []
    for output_dir in output_dirs:
        restore(folder / output_dir)
    return [
        output_dir
        for output_dir in output_dirs
        if all(checkpoint_defect(path) for path in checkpoints_of(folder / output_dir))
    ]


def _end_of_log(folder: Path) -> str:
    return (folder / "log").read_text()[-1500:]
