"""Measure the memory of a teacher that is sharded over two processes, and compare its losses with one process.

Teacher: a random Llama of 1.25 GiB in fp32 (24 layers, width 1024, vocabulary 32000). For each rank: the share of the
parameters that it has between steps; the growth of anonymous memory (RssAnon, which excludes mapped checkpoint pages)
during loading; and the maximum number of parameters that are gathered at a time in a forward, compared with the largest
layer and the output head. Losses: the largest relative difference in 10 steps of a tiny pair on two processes and one.

    python benchmarks/sharded_teacher.py
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from measure import save, status_mib

CONFIG = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
PLACEMENTS = {"whole": {}, "zero3": {"deepspeed": "zero3-teacher.json"}, "fsdp2": {"fsdp": True}}
STRATEGIES = (
    [], ["zero2"], ["zero3"], ["teacher=zero3"], ["zero2", "teacher=zero3"], ["zero3", "teacher=zero3"],
    ["teacher=fsdp2"], ["fsdp2", "teacher=fsdp2"],
)  # fmt: skip
SCRIPT = Path(__file__).parent.parent / "tests" / "distributed" / "two_ranks.py"


def make(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    model.save_pretrained(folder / "teacher")
    tiny = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(**CONFIG | tiny)).save_pretrained(folder / "student")


class Peak(threading.Thread):
    """Records the peak RssAnon of this process in MiB, sampled every two milliseconds."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.maximum = status_mib("RssAnon")
        self.is_stopped = False

    def run(self) -> None:
        while not self.is_stopped:
            self.maximum = max(self.maximum, status_mib("RssAnon"))
            time.sleep(0.002)


def unsharded_parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters of which this rank has all values."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    def available(p) -> bool:
        return p.ds_status == ZeroParamStatus.AVAILABLE if hasattr(p, "ds_status") else not hasattr(p, "to_local")

    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if available(p))


def rank(folder: str, placement: str) -> None:
    """Measure one rank and print the results."""
    from transformers import AutoModelForCausalLM

    from hf_distill import FrozenTeacher
    from hf_distill.core.targets import Targets
    from hf_distill.models.blocks import find_blocks
    from hf_distill.models.model_types import unwrap_model

    torch.distributed.init_process_group("gloo")
    student = AutoModelForCausalLM.from_pretrained(f"{folder}/student")
    import deepspeed  # noqa: F401

    peak = Peak()
    peak.start()
    teacher = FrozenTeacher(f"{folder}/teacher", dtype="float32", **PLACEMENTS[placement])
    teacher.prepare(student, torch.device("cpu"))
    peak.is_stopped = True
    peak.join()
    model = unwrap_model(teacher.model)
    parts = [p.to_local() if hasattr(p, "to_local") else getattr(p, "ds_tensor", p) for p in model.parameters()]
    numel = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()}
    name, blocks = find_blocks(model)
    resting, gathered = unsharded_parameters(model), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: gathered.append(unsharded_parameters(model)))
    ids = torch.randint(3, 32000, (2, 64), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids}
    teacher(inputs, Targets.from_batch(inputs, shift=True), {})
    sizes = [sum(n for key, n in numel.items() if key.startswith(f"{name}.{i}.")) for i in range(len(blocks))]
    total, head = sum(numel.values()), numel["lm_head.weight"]
    print(json.dumps({
        "parameter_mib": total * 4 / 2**20,
        "resident_share": sum(p.numel() for p in parts) / total,
        "rss_anon_before_mib": peak.before,
        "rss_anon_growth": (peak.maximum - peak.before) / (total * 4 / 2**20),
        "gathered_at_rest": resting / total,
        "gathered_most": max(gathered) / total,
        "layer_and_head": (max(sizes) + head) / total,
    }))  # fmt: skip


def launch_ranks(script: Path, ranks: int, *arguments: str) -> list[str]:
    """Run a script on a number of ranks and return the lines that they print."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    if ranks == 1:
        launcher = [sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*launcher, str(script), *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.splitlines()


def differences() -> dict[str, float]:
    """Return strategy -> the largest relative difference of a logged loss from that of one process."""
    sys.path.insert(0, str(SCRIPT.parent.parent))
    from tiny import build

    def losses(folder: Path, ranks: int, *variants: str) -> list[dict]:
        folder.mkdir()
        launch_ranks(SCRIPT, ranks, str(folder), *variants)
        log = json.loads((folder / "straight.json").read_text())["log"]
        return [{k: v for k, v in line.items() if k.endswith("loss")} for line in log]

    largest = {}
    with tempfile.TemporaryDirectory() as name:
        build("llama", 0).save_pretrained(f"{name}/models/student")
        build("llama", 1, layers=3, width=48, vocab=101).save_pretrained(f"{name}/models/teacher")
        one = losses(Path(name) / "one", 1)
        for strategy in STRATEGIES:
            two = losses(Path(name) / "-".join(["two", *strategy]), 2, *strategy)
            pairs = [(a[k], b[k]) for a, b in zip(one, two, strict=True) for k in a]
            largest[" ".join(strategy) or "ddp"] = max(abs(b / a - 1) for a, b in pairs)
            print(strategy, largest[" ".join(strategy) or "ddp"], flush=True)
    return largest


if __name__ == "__main__":
    if len(sys.argv) == 3:
        rank(sys.argv[1], sys.argv[2])
    else:
        ranks = {}
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder))
            for placement in PLACEMENTS:
                lines = launch_ranks(Path(__file__), 2, folder, placement)
                ranks[placement] = [json.loads(line) for line in lines if line.startswith("{")]
                print(placement, ranks[placement], flush=True)
        save("sharded_teacher", {"held": ranks, "loss_differences": differences()})
