"""What a step keeps beside weights, gradients and optimizer, in bytes: activations, the fused head.

Letters: T asked tokens, S a row; H, V, L as in `signals.py`; I the width of the feed-forward layers; c bytes of a
number that is computed with, r of one in the residual stream.
"""

import torch

from ..core.logits import LazyLogits
from ..losses.fused import CPU_CACHE_BYTES, MAX_TEMPORARIES, auto_chunk_tokens
from .model_stats import ModelStats
from .strategy import Strategy
from .workload import Workload


def activations(job: Workload, strategy: Strategy) -> int:
    """What the student's L blocks keep for the backward, or the teacher's working set; an estimate.

    A block keeps, in bytes a token, with norms computed in fp32, linear layers of c and no maps of attention:

        norms * (4 + r) * H + inputs * c * H + c * (2 * heads + 2 * kv_heads) * head_dim + 4 * heads + 4 * c * I

    where `inputs` is 2, or 5 under autocast, which casts the input of each linear layer anew. Eager attention adds
    heads * S * (4 + c). Activation checkpointing keeps r * H of each block, and all of one. The teacher runs without
    gradients: 3 * c * (H + I) of one block.

    Source: the accounting of 2205.05198 (34 * H of a block of GPT), for the blocks of transformers.
    """
    student, c = job.student, job.compute
    cast = job.autocast(strategy)
    r = 4 if cast else c
    attention = c * 2 * (student.heads + student.kv_heads) * student.head_dim + 4 * student.heads
    if student.head_norms:
        attention += (4 + c) * (student.heads + student.kv_heads) * student.head_dim
    if student.eager:
        attention += student.heads * job.length * (4 + c + c * student.softcap)
        attention += c * 2 * (student.heads - student.kv_heads) * student.head_dim  # keys and values, repeated
    norms = student.norms * (4 + r) * student.hidden + (5 if cast else 2) * c * student.hidden
    block = norms + attention + 4 * c * student.intermediate
    kept = student.depth * r * student.hidden + block if job.checkpointing else student.depth * block
    kept += (4 + 2 * r) * student.hidden  # the last norm
    teacher = job.teacher
    working = 3 * max(job.teacher_dtype.itemsize, 2) * (teacher.hidden + teacher.intermediate)
    working += teacher.heads * job.length * (4 + job.teacher_dtype.itemsize) * teacher.eager
    return job.tokens * max(kept, 0 if strategy.teacher == "cache" else working)


def head_gradients(job: Workload, strategy: Strategy) -> int:
    """What the fused head keeps beside its workspace: see `sweep._Fused`.

    The asked tokens' hidden states of both models, and their gradient in fp32 and then in c:
    T * (c * H_s + c * H_t + (4 + c) * H_s). A head that is trained: its gradient, V * H * (4 + c). No second copy where
    c is 4. A head that is not held in what it is computed with: its cast, V * H * c.
    """
    student, c = job.student, job.compute
    again = c if c != 4 else 0
    states = job.tokens * (c * student.hidden + job.teacher_dtype.itemsize * job.teacher.hidden)
    states += job.tokens * student.hidden * (4 + again)
    by_weight = 0 if job.lora else student.head * (4 + again)
    casts = student.head * c if job.autocast(strategy) and job.lora else 0
    if job.mixed and job.teacher_dtype.itemsize > 2:
        casts += job.teacher.head * 2
    return states + by_weight + casts


def workspace(job: Workload, left: int | None) -> int:
    """Logits of a chunk, of both models, in fp32, and temporaries; the rows are those of `sweep.chunk_of_workspace`.

    On a CPU 150 MiB, and temporaries of a block of rows that its cache holds; on a GPU an eighth of the memory that is
    left, temporaries of the whole chunk included. At least 16 rows, at most T.

    Args:
        job: the models and the batch.
        left: bytes that the other parts leave on a GPU; None: unknown, the least is taken.
    """
    if job.device == "cpu":
        row = 4 * (job.student.vocab + job.teacher.vocab)
        rows = min(job.tokens, auto_chunk_tokens(_head(job.student), [_head(job.teacher)]))
        return row * rows + MAX_TEMPORARIES * min(
            CPU_CACHE_BYTES * torch.get_num_threads(), 4 * job.student.vocab * rows
        )
    row = 4 * (job.student.vocab + job.teacher.vocab + MAX_TEMPORARIES * job.student.vocab)
    return row * min(job.tokens, max(16, max(left or 0, 0) // 8 // row))


def _head(anatomy: ModelStats) -> LazyLogits:
    weight = torch.empty(anatomy.vocab, anatomy.hidden, device="meta")
    return LazyLogits(weight[:1], weight)
