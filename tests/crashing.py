"""Runs that are killed at some moment and resumed, each in a process of its own.

A fate is a moment by the clock, or a place: the n-th call of something that a run does, before it, in the middle of
what it writes, or after it. Processes are forked from one that has imported everything, so that a trial takes seconds.
"""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

# What a run does, by where it is looked up; "half": it writes, and can be cut off in the middle.
PLACES = {
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
    "manifest": ("hf_distill.cache.manifest:Manifest.write", False),
    "log": ("hf_distill.core.io:MetricsFile.on_log", True),
    "evidence": ("hf_distill.runner.single_run:write_json", False),
    "recipe": ("hf_distill.runner.run_dir:_write_recipe", False),
}
_PRELOAD = [  # what every run imports
    *("hf_distill.runner.run", "hf_distill.runner.cache_writer", "hf_distill.trl", "hf_distill.cache.api"),
    *("transformers.models.llama.modeling_llama", "transformers.trainer", "transformers.models.auto.modeling_auto"),
    *("transformers.models.auto.tokenization_auto", "datasets", "peft", "trl.experimental.gkd"),
]


_SHORT = [
    *("train.max_steps=7", "train.save_steps=3", "train.save_total_limit=1", "train.logging_steps=1"),
    *("train.eval_strategy=steps", "train.eval_steps=3", "train.learning_rate=0.01"),
]
_FEATURES = "losses=[{name: hidden_cosine, weight: 0.1}, {name: attention_kl, layers: last:1}]"
_LORA = "student={model: 'smoke:llama/student', lora: {r: 4}}"
KINDS = {  # a packaged recipe, and what is changed of it
    "frozen": ("quickstart", [_FEATURES, "projectors={kind: linear}", "teacher.attn_implementation=eager"]),
    "cached": ("cached", ["control=null"]),
    "adapter_base": ("quickstart", [_LORA, "teacher={kind: adapter_base}", "control=null"]),
    **{name: (name, ["control=null"]) for name in ("ema", "snapshot", "online", "mutual", "mtp", "multi-view")},
    "on-policy": ("on-policy", ["control=null"]),
    "chain": ("progressive", []),
    "capture": ("cached", []),
}


def make_workload(kind: str, place: Path, *overrides: str, callbacks: Sequence[Any] = ()) -> Callable[[], None]:
    """What a process of a kind does, in the folder `run` of the one that it is in, from wherever it was cut off.

    Args:
        kind: of `KINDS`.
        place: of what trials share: a cache.
        overrides: of the recipe.
        callbacks: of its trainers.
    """
    return partial(_run_workload, kind, place, overrides, callbacks)


def _run_workload(kind: str, place: Path, overrides: Sequence[str], callbacks: Sequence[Any]) -> None:
    from hf_distill.recipe import load_recipe, run_recipe
    from hf_distill.runner.cache_writer import write_recipe_cache

    name, changes = KINDS[kind]
    if name == "cached":
        changes = [*changes, f"teacher.path={'run' if kind == 'capture' else place / 'cache' / 'run'}"]
        texts = [json.dumps({"text": f"The number {i} times {i} is {i * i}. " * 9}) for i in range(60)]
        (place / "texts.jsonl").write_text("\n".join(texts))
        changes.append(f"data.task.path={place / 'texts.jsonl'}")
    recipe = load_recipe(name, [*_SHORT, *changes, "train.output_dir=run", *overrides], smoke=True)
    if kind == "capture":
        write_recipe_cache(recipe, batch_size=2, shard_rows=4)
    else:
        run_recipe(recipe, resume=True, callbacks=callbacks)


@dataclass(frozen=True)
class Fate:
    """When a process is killed: after some seconds of training, or at a place."""

    seconds: float | None = None
    place: str = ""
    call: int = 0
    when: str = "before"  # half, after

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s" if self.seconds is not None else f"{self.when} call {self.call} of {self.place}"


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _wrap(place: str, around: Callable[[str, Callable, tuple, dict], Any]) -> None:
    module, _, path = PLACES[place][0].partition(":")
    owner: Any = import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        return around(place, original, args, kwargs)

    setattr(owner, name, wrapped)


def _note_sealed() -> None:
    """Have a child note, for each output folder, that a checkpoint of it is complete."""
    module = import_module("hf_distill.trainer.checkpointing")
    original = module.mark_complete

    def noting(folder: Path) -> None:
        original(folder)
        with Path("sealed").open("a") as file:
            file.write(f"{folder.parent}\n")

    module.mark_complete = noting


def _cut(folder: Path, since: float) -> None:
    """The newest file that was written since then loses its second half; of lines, half of the last one."""
    files = [(p.stat().st_mtime, p) for p in folder.rglob("*") if p.is_file() and p.stat().st_mtime >= since - 0.01]
    if files:
        path = max(files)[1]
        data = path.read_bytes()
        size = data.rstrip(b"\n").rfind(b"\n") + 5 if path.suffix == ".jsonl" else len(data) // 2
        os.truncate(path, size)


def _child(job: Callable[[], None], folder: Path, fate: Fate | None, counts: Path | None) -> None:
    import torch

    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    calls: Counter = Counter()

    def around(place: str, original: Callable, args: tuple, kwargs: dict) -> Any:
        calls[place] += 1
        hit = fate is not None and fate.place == place and fate.call == calls[place]
        if hit and fate.when == "before":
            kill()
        since = time.time()
        result = original(*args, **kwargs)
        if hit:
            if fate.when == "half":
                _cut(folder / "run", since)
            kill()
        return result

    for place in PLACES if counts else [fate.place] if fate and fate.place else []:
        _wrap(place, around)
    _note_sealed()
    start = time.monotonic()
    job()
    if counts:
        counts.write_text(json.dumps({"calls": calls, "seconds": time.monotonic() - start}))


def started(job, folder: Path, fate: Fate | None = None, counts: Path | None = None) -> int:
    """Run a job in a process of its own; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    process = context.Process(target=_child, args=(job, folder, fate, counts))
    process.start()
    if fate is not None and fate.seconds is not None:
        process.join(fate.seconds)
        if process.is_alive():
            process.kill()
    process.join()
    return process.exitcode


def fates(counts: dict[str, Any], number: int, seed: int) -> list[Fate]:
    """So many moments: a third by the clock, the others at places, each of which is met as often as the others."""
    random_ = random.Random(seed)
    clock = [Fate(seconds=random_.uniform(0.1, counts["seconds"])) for _ in range(number // 3)]
    places = sorted(place for place in PLACES if counts["calls"].get(place))
    random_.shuffle(places)
    at = []
    for i in range(number - len(clock)):
        place = places[i % len(places)]
        whens = ["before", "half", "after"] if PLACES[place][1] else ["before", "after"]
        at.append(Fate(place=place, call=random_.randint(1, counts["calls"][place]), when=random_.choice(whens)))
    return clock + at


def content(folder: Path, kind: str) -> dict[str, Any]:
    """Of a trial's folder all that no crash may change: weights, held-out metrics, logs; the files of a cache."""
    folder = folder / "run"
    if kind == "capture":
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]  # it names the process
        return {str(p.relative_to(folder)): p.read_bytes() for p in files}
    outputs: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if "checkpoint-" not in str(path):
            outputs[str(path.relative_to(folder))] = path.read_bytes()
    results = json.loads((folder / "results.json").read_text())
    outputs["status"], outputs["models"] = results["status"], [_untimed(m) for m in results["models"].values()]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    outputs["logs"] = [_untimed(line) for line in lines if "loss" in line or "eval_loss" in line]
    return outputs


def _untimed(values: dict[str, Any]) -> dict[str, Any]:
    timing = ("per_second", "_time", "runtime", "seconds")
    return {name: value for name, value in values.items() if not name.endswith(timing)}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Which parts are not the same."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def trial(job, folder: Path, fate: Fate, expected: dict[str, Any], kind: str) -> str | None:
    """Kill a run so, look for a complete checkpoint, resume it, and compare; None: nothing was lost."""
    code = started(job, folder, fate)
    if code not in (0, -signal.SIGKILL):
        return f"{fate}: ended with {code} before it was killed: {_last(folder)}"
    if without := _without_complete(folder):
        return f"{fate}: no complete checkpoint is left in {without}"
    if code := started(job, folder):
        return f"{fate}: could not be resumed ({code}): {_last(folder)}"
    lost = differences(content(folder, kind), expected)
    return f"{fate}: not the same: {', '.join(lost)}" if lost else None


def _without_complete(folder: Path) -> list[str]:
    """Output folders of a trial in which a checkpoint was complete before a kill, and none is afterwards."""
    from hf_distill.trainer.checkpoints import checkpoint_defect, checkpoints_of, restore

    file = folder / "sealed"
    homes = sorted(set(file.read_text().splitlines())) if file.is_file() else []
    for home in homes:
        restore(folder / home)
    return [home for home in homes if all(checkpoint_defect(path) for path in checkpoints_of(folder / home))]


def _last(folder: Path) -> str:
    return (folder / "log").read_text()[-1500:]
