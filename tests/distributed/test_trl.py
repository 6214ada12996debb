"""The TRL trainers on two processes train as on one. As a script, this file trains, and rank 0 writes results."""

import json
import os
import sys
from pathlib import Path

import pytest
from launching import run_on_ranks


def train(folder: Path) -> dict[str, list]:
    """Train a few steps with each trainer, with the same global batch for any number of ranks."""
    from datasets import Dataset
    from tiny import build

    from hf_distill.recipe.smoke import byte_tokenizer
    from hf_distill.trl import DistillSFTConfig, DistillSFTTrainer, OnPolicyDistillConfig, OnPolicyDistillTrainer

    tokenizer, world = byte_tokenizer(), int(os.environ.get("WORLD_SIZE", 1))
    rows = Dataset.from_list([{"prompt": f"say {i}:", "completion": " ok " + "very " * (i % 4)} for i in range(16)])
    common = dict(
        max_steps=3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        per_device_train_batch_size=4 // world,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        alpha=0.5,
        losses=[{"name": "hidden_mse", "weight": 0.1}],
    )
    results = {}
    for name, cls, args in (
        ("sft", DistillSFTTrainer, DistillSFTConfig(str(folder), **common)),
        (
            "on-policy",
            OnPolicyDistillTrainer,
            OnPolicyDistillConfig(str(folder), on_policy_fraction=0.0, max_completion_length=12, **common),
        ),
    ):
        trainer = cls(
            model=build("llama", 0, vocab=len(tokenizer)),
            teacher=build("llama", 1, layers=3, width=48, vocab=len(tokenizer)),
            args=args,
            train_dataset=rows,
            eval_dataset=rows.select(range(7)),
            processing_class=tokenizer,
        )
        trainer.train()
        metrics = trainer.evaluate()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        results[name] = [log[key] for log in logs for key in ("loss", "grad_norm", "hard_loss", "num_tokens")]
        results[name] += [metrics["eval_loss"], metrics["eval_kl"]]
    return results


def results_on_ranks(number: int, folder: Path) -> dict[str, list]:
    folder.mkdir()
    ended = run_on_ranks(number, __file__, str(folder))
    assert ended.returncode == 0, ended.stderr[-6000:]
    return json.loads((folder / "results.json").read_text())


def test_two_processes_have_the_same_loss_and_gradient_as_one(tmp_path):
    one, two = results_on_ranks(1, tmp_path / "one"), results_on_ranks(2, tmp_path / "two")
    for name, expected in one.items():
        assert two[name] == pytest.approx(expected, rel=1e-5)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    results = train(Path(sys.argv[1]))
    if os.environ.get("RANK", "0") == "0":
        (Path(sys.argv[1]) / "results.json").write_text(json.dumps(results))
