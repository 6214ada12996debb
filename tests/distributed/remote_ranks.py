"""Trains on two ranks, each with a server of its own: python remote_ranks.py FOLDER URL_0 URL_1 [resume]

Writes the weights to FOLDER/weights.pt on rank 0. The error that ends training is written to stderr.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tiny import build, collate, rows

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.errors import RunError
from hf_distill.teachers import RemoteTeacher

if __name__ == "__main__":
    folder, *urls = sys.argv[1:4]
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    args = DistillConfig(
        folder,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=10,
        temperature=1.0,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = DistillTrainer(
        build("llama", 0, dropout=0.1),
        args,
        teacher=RemoteTeacher(urls[rank], top_k=8, retry_seconds=0, prefetch=0),  # the server counts requests
        train_dataset=rows("llama", 32),
        data_collator=collate,
    )
    try:
        trainer.train(resume_from_checkpoint="resume" in sys.argv)
    except RunError as error:
        sys.stderr.write(f"rank {rank}: {error}\n")
        raise SystemExit(3) from None
    if rank == 0:
        torch.save(trainer.model.state_dict(), Path(folder) / "weights.pt")
