"""Inspect the quickstart's teacher, and measure the size of its caches and their effect on a student's gradient.

python inspect_teacher.py [RUN]        RUN: the folder of a quickstart run; by default runs/quickstart
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from hf_distill.analysis import ModelPair, inspect_teacher, open_run
from hf_distill.cache import write_cache
from hf_distill.cache.sampling import sample_by_inverse_cdf, systematic_points
from hf_distill.core.defaults import SAMPLES_PER_TOKEN, TOP_K_IDS
from hf_distill.core.io import environment, write_json

RESULTS = Path(__file__).parent / "results"
TOKENS, ROWS = 2000, 16
TEMPERATURES = (1.0, 2.0)


def head_gradient(pair) -> dict:
    """Compare the gradient [V, H] of forward KL by the student's output head for each cache with the exact one."""
    random = torch.Generator().manual_seed(0)
    gradients: dict = {}
    count = 0
    for batch in pair.batches(TOKENS):
        count += len(batch.targets)
        for start in range(0, len(batch.targets), ROWS):
            rows = slice(start, start + ROWS)
            teacher_values, student_values = batch.teacher.project(rows), batch.student.project(rows)
            hidden = batch.student.hidden[rows]
            for t in TEMPERATURES:
                q, p = (teacher_values / t).softmax(-1), (student_values / t).softmax(-1)
                top_ids = q.topk(TOP_K_IDS).indices
                ids, _ = sample_by_inverse_cdf(
                    (teacher_values / t).clone(), systematic_points(len(q), SAMPLES_PER_TOKEN, random)
                )
                sampled = torch.zeros_like(q).scatter_add_(1, ids, torch.full(ids.shape, 1 / SAMPLES_PER_TOKEN))
                teacher_tail, student_tail = q.scatter(1, top_ids, 0), p.scatter(1, top_ids, 0)
                share = teacher_tail.sum(-1, keepdim=True) / student_tail.sum(-1, keepdim=True)
                top_k = q - teacher_tail + student_tail * share
                for name, estimate in {"full": q, "sampled": sampled, "top_k": top_k}.items():
                    gradient = (p - estimate).T @ hidden.float()
                    gradients[name, t] = gradients[name, t] + gradient if (name, t) in gradients else gradient
    cosines = {
        f"{name}, T = {t:g}": torch.nn.functional.cosine_similarity(
            gradients[name, t].flatten().double(), gradients["full", t].flatten().double(), dim=0
        ).item()
        for name in ("sampled", "top_k")
        for t in TEMPERATURES
    }
    return {"tokens": count, "cosine": cosines}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    pair = ModelPair.of_run(open_run(folder))
    inspection = asdict(inspect_teacher(pair))
    rows, written = pair.rows.select(range(8)), {}
    for kind in ("sampled", "top_k"):
        for t in TEMPERATURES:
            options = {"collator": pair.collator, "kind": kind, "temperature": t}
            manifest = write_cache(tempfile.mkdtemp(), pair.teacher, rows, **options)
            written[f"{kind}, T = {t:g}"] = manifest.bytes_per_token
    measured = {"environment": environment("cpu"), **inspection, "written_bytes_per_token": written}
    write_json(RESULTS / "inspect.json", {**measured, "head_gradient": head_gradient(pair)})
    print(json.dumps(written), flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parents[1] / "runs" / "quickstart"))
