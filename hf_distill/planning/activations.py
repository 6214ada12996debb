"""Bytes of a training step that are neither weights, gradients nor optimizer states: activations and the fused loss.

Letters: T target tokens, S tokens of a row, H, V and L as in `core/targets.py`; I the width of the feed-forward layers;
c bytes of a number in the compute dtype, r bytes of a number in the residual stream.
"""

from ..losses.fused_buffers import MAX_TEMPORARIES, auto_chunk_tokens, block_rows, gradient_has_buffer
from .strategy import Strategy
from .workload import Workload


def activation_bytes(workload: Workload, strategy: Strategy) -> int:
    """Estimate the activations in bytes: what the student saves for backward, or the teacher's working set if larger.

    Each of the student's L layers saves, in bytes per token, with norms computed in fp32, linear layers computed in c
    and no attention maps:

        norms * (4 + r) * H + inputs * c * H + c * (2 * heads + 2 * kv_heads) * head_dim + 4 * heads + 4 * c * I

    where `inputs` is 2, or 5 under autocast, which casts the input of each linear layer separately. Eager attention
    adds heads * S * (4 + c). Activation checkpointing saves r * H per layer, and everything of one layer. The teacher
    runs without gradients and needs 3 * c * (H + I) for one layer.

    Source: the accounting of 2205.05198 (34 * H per GPT layer), adapted to the layers of transformers.
    """
    student, c = workload.student, workload.compute
    cast = workload.autocast(strategy)
    r = 4 if cast else c
    attention = c * 2 * (student.heads + student.kv_heads) * student.head_dim + 4 * student.heads
    if student.head_norms:
        attention += (4 + c) * (student.heads + student.kv_heads) * student.head_dim
    if student.eager:
        attention += student.heads * workload.length * (4 + c + c * student.softcap)
        attention += c * 2 * (student.heads - student.kv_heads) * student.head_dim  # keys and values, repeated
    norms = student.norms * (4 + r) * student.hidden + (5 if cast else 2) * c * student.hidden
    block = norms + attention + 4 * c * student.intermediate
    saved = student.depth * r * student.hidden + block if workload.checkpointing else student.depth * block
    saved += (4 + 2 * r) * student.hidden  # the last norm
    teacher = workload.teacher
    teacher_c = workload.teacher_compute(strategy)
    working = 3 * teacher_c * (teacher.hidden + teacher.intermediate)
    working += teacher.heads * workload.length * (4 + teacher_c) * teacher.eager
    return workload.tokens * max(saved, 0 if strategy.teacher in ("cache", "remote") else working)


def head_gradient_bytes(workload: Workload, strategy: Strategy) -> int:
    """Bytes that the fused loss keeps besides its workspace; see `losses.fused`.

    Hidden states of the target tokens of both models, and their gradient in fp32 and then in c:
    T * (c * H_s + c * H_t + (4 + c) * H_s). A trained output head adds its gradient, V * H * (4 + c). There is no
    second copy where c is 4. An output head whose dtype is not the compute dtype adds its cast, V * H * c, and that
    of a teacher that a device map spreads its copy on the student's device.
    """
    student, c = workload.student, workload.compute
    second_copy = c if c != 4 else 0
    states = workload.tokens * (c * student.hidden + workload.teacher_compute(strategy) * workload.teacher.hidden)
    states += workload.tokens * student.hidden * (4 + second_copy)
    weight_gradient = 0 if workload.lora else student.head * (4 + second_copy)
    casts = student.head * c if workload.autocast(strategy) and workload.lora else 0
    if workload.autocasts_teacher(strategy) or strategy.teacher == "device_map":  # a copy on the student's device
        casts += workload.teacher.head * workload.teacher_compute(strategy)
    return states + weight_gradient + casts


def workspace_bytes(workload: Workload) -> int:
    """Bytes of one chunk of the fused loss: fp32 logits of both models, a gradient and temporaries.

    A chunk has `chunk_tokens` tokens, or as many as `auto_chunk_tokens` returns, and at most T. On a GPU the Triton
    kernel or analytic gradients compute it, and the larger of both is returned: the kernel has no temporaries, and
    always a buffer for the gradient; analytic gradients have temporaries for a block of rows of the student's width.
    """
    student_row, teacher_row = 4 * workload.student.vocab, 4 * workload.teacher.vocab
    chunk_tokens = workload.chunk_tokens or auto_chunk_tokens(
        [workload.student.vocab, workload.teacher.vocab], 4, workload.device
    )
    rows = min(workload.tokens, chunk_tokens)
    block = min(rows, block_rows(student_row, workload.device))
    gradient_itemsize = 2 if workload.rounds_gradient else 4
    analytic, kernel = (
        rows * workload.student.vocab * gradient_itemsize * gradient_has_buffer(uses_kernel, gradient_itemsize, 4)
        for uses_kernel in (False, workload.device != "cpu")
    )
    further = max(analytic + MAX_TEMPORARIES * block * student_row, kernel)
    return rows * (student_row + teacher_row) + further
