"""The Triton kernel of the fused loss: each program computes one row of logits. Importing this module needs Triton.

z and y are the logits of student and teacher, p and q their softmaxes over the ids that both have, and m a mixture of p
and q. The formulas are those of `analytic_gradients.py`, which are the reference. A program reads its two rows two or
three times:

1. `_softmax_pass`: the softmaxes at each temperature and at T = 1, forward and reverse KL, and the statistics.
2. `_mixture_pass`: only for `js`, `skew_kl` and `skew_reverse_kl`, the expectations that need the softmaxes.
3. `_gradient_pass`: the gradient with respect to the student logits. It is written to a separate buffer: the warps of a
   program do not run in step, so none of them may overwrite what another reads.

Logits, sums and losses are float32. A loss has one partial sum for each lane, and the lanes are
added after the last block; a statistic is a number to which the sum of each block is added.
"""

import triton
import triton.language as tl

FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JS = tl.constexpr(2)  # the losses from here on have a mixture
SKEW_KL = tl.constexpr(3)
SKEW_REVERSE_KL = tl.constexpr(4)

_NO_ID = tl.constexpr(-1.0e30)  # logit of lanes after the last id; finite after a division by T, and its exp is 0
_LOWEST_MAX = tl.constexpr(-1.0e28)  # the maximum before the first id; finite, because -inf minus -inf is NaN
_STAGES = tl.constexpr(3)  # blocks of a loop that are loaded or computed at the same time
_SMALLEST_NORMAL = tl.constexpr(
    1.1754944e-38
)  # of float32; clamps a mixture. A smaller constant is a float64 in Triton


@triton.jit
def write_one(out_ptr):
    """Write 1: a trial whether Triton works."""
    tl.store(out_ptr, 1.0)


# These arguments change from chunk to chunk: a kernel for each kind of their values would be compiled during training.
@triton.jit(
    do_not_specialize=["out_stride", "first_token", "statistics_every"],
    do_not_specialize_on_alignment=["labels_ptr", "has_label_ptr", "out_ptr"],
)
def losses_and_gradient(
    student,  # output of the head, [r, V_s]: (pointer, row stride, ids of a row that may be read, bias, scale, softcap)
    teacher,  # the same of the teacher, [r, V_t]; not read without HAS_TEACHER
    labels_ptr,  # [r] ids
    has_label_ptr,  # [r] whether cross entropy counts; None if it counts for all rows
    out_ptr,  # [M, r] float32: divergences, cross entropies, statistics
    out_stride,
    gradient_ptr,  # [r, V_s]; None computes no gradient
    gradient_stride,
    gradient_limit,  # ids of a row that pass 3 may write before it writes those that only the student has
    V_s,
    V_t,
    V_shared,  # ids that divergences compare, min(V_s, V_t); 0 without a teacher
    first_token,  # index of row 0 among the target tokens
    statistics_every,  # target tokens whose index is a multiple of it are measured
    divergences,  # of each divergence: (1 / T, beta or lam, factor of the value, factor of the gradient)
    smoothings,  # label smoothing of each cross entropy
    ce_factors,  # of the gradient of all cross entropies: (sum of weights, sum of weight * label smoothing)
    KINDS: tl.constexpr,  # FORWARD_KL etc. for each divergence
    HAS_GRADIENT: tl.constexpr,  # for each divergence, whether it contributes to the gradient
    HAS_CE_GRADIENT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_MIXTURE: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    MAY_BE_MASKED: tl.constexpr,  # whether logits may be -inf
    BLOCK: tl.constexpr,  # ids in a block
):
    """Write losses and statistics of one row to out[:, row] and the gradient of their weighted sum to gradient[row]."""
    N: tl.constexpr = len(KINDS)
    NUM_CE: tl.constexpr = len(smoothings)
    row = tl.program_id(0).to(tl.int64)
    student = (student[0] + row * student[1], student[2], student[3], student[4], student[5])
    teacher = (teacher[0] + row * teacher[1], teacher[2], teacher[3], teacher[4], teacher[5])
    sizes = (V_s, V_t, V_shared)
    out = out_ptr + row
    is_measured = (first_token + row) % statistics_every == 0

    shared, full, sums, statistics = _softmax_pass(
        student, teacher, sizes, is_measured, divergences, KINDS, NUM_CE > 0 or HAS_STATISTICS, HAS_SMOOTHING,
        HAS_STATISTICS, HAS_TEACHER, MAY_BE_MASKED, BLOCK,
    )  # fmt: skip
    z_max, z_exp_sum, z_sum = full
    lse = z_max + tl.log(z_exp_sum)
    label = tl.load(labels_ptr + row)
    label_logit = _load_logits(student, label, label < V_s)
    has_label = 1.0
    if has_label_ptr is not None:
        has_label = tl.load(has_label_ptr + row).to(tl.float32)
    for i in tl.static_range(NUM_CE):
        ce = lse - label_logit
        if HAS_SMOOTHING:
            ce = (1.0 - smoothings[i]) * ce + smoothings[i] * (lse - z_sum / V_s)
        tl.store(out + (N + i) * out_stride, ce * has_label)
    if HAS_STATISTICS and is_measured:
        statistics_out = out + (N + NUM_CE) * out_stride
        _store_student_statistics(statistics_out, out_stride, statistics, label_logit, lse, z_max, z_exp_sum)
        if HAS_TEACHER:
            _store_pair_statistics(
                statistics_out + 4 * out_stride, out_stride, statistics, student, teacher, sizes, shared, label, z_max,
                BLOCK,
            )  # fmt: skip

    softmaxes = ()
    results = ()
    for i in tl.static_range(N):
        z_log_sum, y_log_sum, kl = _finish_softmaxes(sums[i], shared, divergences[i][0], KINDS[i])
        softmaxes += ((z_log_sum, y_log_sum),)
        results += ((kl, kl),)
    if HAS_MIXTURE:
        results = _mixture_pass(
            student, teacher, V_shared, shared, softmaxes, results, divergences, KINDS, MAY_BE_MASKED, BLOCK
        )
    for i in tl.static_range(N):
        tl.store(out + i * out_stride, results[i][0] * divergences[i][2])
    if gradient_ptr is not None:
        _gradient_pass(
            gradient_ptr + row * gradient_stride, gradient_limit, student, teacher, sizes, shared, softmaxes, results,
            divergences, label, full, (ce_factors[0] * has_label, ce_factors[1] * has_label), KINDS, HAS_GRADIENT,
            HAS_CE_GRADIENT, HAS_TEACHER, MAY_BE_MASKED, BLOCK,
        )  # fmt: skip


@triton.jit
def _softmax_pass(
    student, teacher, sizes, is_measured, divergences, KINDS: tl.constexpr, NEEDS_SOFTMAX: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr, HAS_STATISTICS: tl.constexpr, HAS_TEACHER: tl.constexpr, MAY_BE_MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Read all logits once.

    Returns:
        (max z, sum exp(z - max z), max y) of the ids that both models have; (max z, sum exp(z - max z), sum z) of all
        ids of the student; the sums of each divergence; the sums of the statistics.
    """
    V_s, _V_t, V_shared = sizes
    N: tl.constexpr = len(KINDS)
    zeros = tl.zeros([BLOCK], tl.float32)
    lowest = tl.full([], _LOWEST_MAX, tl.float32)
    z_max, y_max = lowest, lowest
    sums = ((zeros, zeros, zeros),) * N
    z_exp_sum, z_sum = zeros, zeros
    statistics = (0.0, 0.0, 0.0, 0.0, 0)
    if HAS_TEACHER:
        for start in tl.range(0, V_shared, BLOCK, num_stages=_STAGES):
            ids = start + tl.arange(0, BLOCK)
            inside = ids < V_shared
            z, y = _load_logits(student, ids, inside), _load_logits(teacher, ids, inside)
            new_z_max, new_y_max = tl.maximum(z_max, tl.max(z, 0)), tl.maximum(y_max, tl.max(y, 0))
            maxima = (z_max, y_max, new_z_max, new_y_max)
            new_sums = ()
            for i in tl.static_range(N):
                new_sums += (_add_to_softmaxes(sums[i], z, y, maxima, divergences[i][0], KINDS[i], MAY_BE_MASKED),)
            sums = new_sums
            if NEEDS_SOFTMAX:
                z_scale, z_exp = tl.exp(z_max - new_z_max), tl.exp(z - new_z_max)
                z_exp_sum = z_exp_sum * z_scale + z_exp
                if HAS_SMOOTHING:
                    z_sum += tl.where(inside, z, 0.0)
                if HAS_STATISTICS and is_measured:
                    statistics = _add_to_statistics(statistics, z, y, z_exp, z_scale, maxima, start, MAY_BE_MASKED)
            z_max, y_max = new_z_max, new_y_max
    shared = (z_max, tl.sum(z_exp_sum, 0), y_max)
    if NEEDS_SOFTMAX:
        z_weighted_sum, y_exp_sum, y_weighted_sum, kl_sum, teacher_top = statistics
        for start in range(V_shared, V_s, BLOCK):  # ids that only the student has
            ids = start + tl.arange(0, BLOCK)
            z = _load_logits(student, ids, ids < V_s)
            new_z_max = tl.maximum(z_max, tl.max(z, 0))
            z_scale, z_exp = tl.exp(z_max - new_z_max), tl.exp(z - new_z_max)
            z_exp_sum = z_exp_sum * z_scale + z_exp
            if HAS_SMOOTHING:
                z_sum += tl.where(ids < V_s, z, 0.0)
            if HAS_STATISTICS and is_measured:
                z_weighted_sum = z_weighted_sum * z_scale + tl.sum(_weighted(z_exp, z, MAY_BE_MASKED), 0)
            z_max = new_z_max
        statistics = (z_weighted_sum, y_exp_sum, y_weighted_sum, kl_sum, teacher_top)
    return shared, (z_max, tl.sum(z_exp_sum, 0), tl.sum(z_sum, 0)), sums, statistics


@triton.jit
def _add_to_softmaxes(sums, z, y, maxima, inverse_t, KIND: tl.constexpr, MAY_BE_MASKED: tl.constexpr):
    """Add a block to the sums of a divergence: exp(z / T), exp(y / T), and the expectation of a KL."""
    z_exp_sum, y_exp_sum, kl_sum = sums
    old_z_max, old_y_max, z_max, y_max = maxima
    z_scale, y_scale = tl.exp((old_z_max - z_max) * inverse_t), tl.exp((old_y_max - y_max) * inverse_t)
    z_exp, y_exp = tl.exp((z - z_max) * inverse_t), tl.exp((y - y_max) * inverse_t)
    if KIND == FORWARD_KL:
        values = _weighted(y_exp, (y - z) * inverse_t, MAY_BE_MASKED)
        kl_sum = _rescaled(kl_sum, y_scale, MAY_BE_MASKED) + values
    elif KIND == REVERSE_KL:
        values = _weighted(z_exp, (z - y) * inverse_t, MAY_BE_MASKED)
        kl_sum = _rescaled(kl_sum, z_scale, MAY_BE_MASKED) + values
    return z_exp_sum * z_scale + z_exp, y_exp_sum * y_scale + y_exp, kl_sum


@triton.jit
def _finish_softmaxes(sums, shared, inverse_t, KIND: tl.constexpr):
    """Return log sum exp((z - max z) / T), the same of y, and forward or reverse KL."""
    z_exp_sum, y_exp_sum, kl_sum = tl.sum(sums[0], 0), tl.sum(sums[1], 0), tl.sum(sums[2], 0)
    z_log_sum, y_log_sum = tl.log(z_exp_sum), tl.log(y_exp_sum)
    difference = (shared[0] - shared[2]) * inverse_t + (z_log_sum - y_log_sum)  # of both log-sum-exps
    if KIND == FORWARD_KL:
        return z_log_sum, y_log_sum, kl_sum / y_exp_sum + difference
    return z_log_sum, y_log_sum, kl_sum / z_exp_sum - difference


@triton.jit
def _add_to_statistics(statistics, z, y, z_exp, z_scale, maxima, start, MAY_BE_MASKED: tl.constexpr):
    """Add a block to (sum exp(z) * z, sum exp(y), sum exp(y) * y, sum exp(y) * (y - z), id of the greatest y)."""
    z_weighted_sum, y_exp_sum, y_weighted_sum, kl_sum, teacher_top = statistics
    _old_z_max, old_y_max, _z_max, y_max = maxima
    y_scale, y_exp = tl.exp(old_y_max - y_max), tl.exp(y - y_max)
    kl_block = tl.sum(_weighted(y_exp, y - z, MAY_BE_MASKED), 0)
    return (
        z_weighted_sum * z_scale + tl.sum(_weighted(z_exp, z, MAY_BE_MASKED), 0),
        y_exp_sum * y_scale + tl.sum(y_exp, 0),
        y_weighted_sum * y_scale + tl.sum(_weighted(y_exp, y, MAY_BE_MASKED), 0),
        _rescaled(kl_sum, y_scale, MAY_BE_MASKED) + kl_block,
        tl.where(y_max > old_y_max, start + tl.argmax(y, 0), teacher_top),
    )


@triton.jit
def _store_student_statistics(out, stride, statistics, label_logit, lse, z_max, z_exp_sum):
    """Store `STUDENT_METRICS` of a row."""
    tl.store(out, 1.0)
    tl.store(out + stride, lse - label_logit)
    tl.store(out + 2 * stride, lse - statistics[0] / z_exp_sum)
    tl.store(out + 3 * stride, tl.where(label_logit >= z_max, 1.0, 0.0))


@triton.jit
def _store_pair_statistics(
    out, stride, statistics, student, teacher, sizes, shared, label, z_max, BLOCK: tl.constexpr
):  # fmt: skip
    """Store `PAIR_METRICS` of a row; reads the ids that only the teacher has."""
    V_s, V_t, V_shared = sizes
    _z_weighted_sum, y_exp_sum, y_weighted_sum, kl_sum, teacher_top = statistics
    shared_z_max, shared_z_exp_sum, y_max = shared
    y_lse = y_max + tl.log(y_exp_sum)
    kl = kl_sum / y_exp_sum + (shared_z_max + tl.log(shared_z_exp_sum) - y_lse)
    entropy = y_lse - y_weighted_sum / y_exp_sum
    for start in range(V_shared, V_t, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        y = _load_logits(teacher, ids, ids < V_t)
        new_y_max = tl.maximum(y_max, tl.max(y, 0))
        teacher_top = tl.where(new_y_max > y_max, start + tl.argmax(y, 0), teacher_top)
        y_exp_sum = y_exp_sum * tl.exp(y_max - new_y_max) + tl.sum(tl.exp(y - new_y_max), 0)
        y_max = new_y_max
    ce = y_max + tl.log(y_exp_sum) - _load_logits(teacher, label, label < V_t)
    agrees = _load_logits(student, teacher_top, teacher_top < V_s) >= z_max
    tl.store(out, kl)
    tl.store(out + stride, tl.where(agrees, 1.0, 0.0))
    tl.store(out + 2 * stride, tl.where(label < V_t, ce, float("inf")))
    tl.store(out + 3 * stride, entropy)


@triton.jit
def _mixture_pass(
    student, teacher, V_shared, shared, softmaxes, results, divergences, KINDS: tl.constexpr,
    MAY_BE_MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return, for each divergence, its value and sum_v p(v) * g(v), where g is its derivative with respect to p."""
    N: tl.constexpr = len(KINDS)
    zeros = tl.zeros([BLOCK], tl.float32)
    sums = ((zeros, zeros, zeros),) * N
    for start in tl.range(0, V_shared, BLOCK, num_stages=_STAGES):
        ids = start + tl.arange(0, BLOCK)
        z, y = _load_logits(student, ids, ids < V_shared), _load_logits(teacher, ids, ids < V_shared)
        new_sums = ()
        for i in tl.static_range(N):
            if KINDS[i] >= JS:
                inverse_t, share, _value_factor, _gradient_factor = divergences[i]
                log_p, log_q = _log_probs(z, y, shared, softmaxes[i], inverse_t)
                new_sums += (_add_to_mixture(sums[i], log_p, log_q, share, KINDS[i], MAY_BE_MASKED),)
            else:
                new_sums += (sums[i],)
        sums = new_sums
    new_results = ()
    for i in tl.static_range(N):
        if KINDS[i] >= JS:
            new_results += (_finish_mixture(sums[i], divergences[i][1], KINDS[i]),)
        else:
            new_results += (results[i],)
    return new_results


@triton.jit
def _add_to_mixture(sums, log_p, log_q, share, KIND: tl.constexpr, MAY_BE_MASKED: tl.constexpr):
    """Add a block to E_p[log p - log m], E_q[log q - log m], and E_p[q / m] (skew KL) or E_p[p / m] (its reverse)."""
    p_sum, q_sum, share_sum = sums
    p, q = tl.exp(log_p), tl.exp(log_q)
    m = _mixture(p, q, share, KIND)
    log_m = tl.log(m)
    if KIND != SKEW_KL:
        p_sum += _weighted(p, log_p - log_m, MAY_BE_MASKED)
    if KIND != SKEW_REVERSE_KL:
        q_sum += _weighted(q, log_q - log_m, MAY_BE_MASKED)
    if KIND == SKEW_KL:
        share_sum += p * (q / m)
    elif KIND == SKEW_REVERSE_KL:
        share_sum += p * (p / m)
    return p_sum, q_sum, share_sum


@triton.jit
def _finish_mixture(sums, share, KIND: tl.constexpr):
    """Return the value of a loss with a mixture, and sum_v p(v) * g(v)."""
    p_sum, q_sum, share_sum = tl.sum(sums[0], 0), tl.sum(sums[1], 0), tl.sum(sums[2], 0)
    if KIND == JS:
        return share * q_sum + (1.0 - share) * p_sum, (1.0 - share) * p_sum
    if KIND == SKEW_KL:
        return q_sum, (share - 1.0) * share_sum
    return p_sum, p_sum - share * share_sum


@triton.jit
def _gradient_pass(
    gradient_row, gradient_limit, student, teacher, sizes, shared, softmaxes, results, divergences, label, full,
    ce_factors, KINDS: tl.constexpr, HAS_GRADIENT: tl.constexpr, HAS_CE_GRADIENT: tl.constexpr,
    HAS_TEACHER: tl.constexpr, MAY_BE_MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the weighted sum of all losses with respect to the student's head output."""
    V_s, _V_t, V_shared = sizes
    if HAS_TEACHER:
        for start in tl.range(0, V_shared, BLOCK, num_stages=_STAGES):
            ids = start + tl.arange(0, BLOCK)
            z, y = _load_logits(student, ids, ids < V_shared), _load_logits(teacher, ids, ids < V_shared)
            gradient = tl.zeros([BLOCK], tl.float32)
            if HAS_CE_GRADIENT:
                gradient = _ce_gradient(z, ids, label, full, ce_factors, V_s)
            for i in tl.static_range(len(KINDS)):
                if HAS_GRADIENT[i]:
                    inverse_t, share, _value_factor, factor = divergences[i]
                    log_p, log_q = _log_probs(z, y, shared, softmaxes[i], inverse_t)
                    gradient += factor * _logit_gradient(log_p, log_q, share, results[i][1], KINDS[i], MAY_BE_MASKED)
            _store_gradient(gradient_row, student, ids, ids < gradient_limit, z, gradient)
    for start in range(V_shared, V_s, BLOCK):  # ids that only the student has
        ids = start + tl.arange(0, BLOCK)
        z = _load_logits(student, ids, ids < V_s)
        gradient = tl.zeros([BLOCK], tl.float32)
        if HAS_CE_GRADIENT:
            gradient = _ce_gradient(z, ids, label, full, ce_factors, V_s)
        _store_gradient(gradient_row, student, ids, ids < V_s, z, gradient)


@triton.jit
def _logit_gradient(log_p, log_q, share, mean, KIND: tl.constexpr, MAY_BE_MASKED: tl.constexpr):
    """Return T times the gradient of a divergence with respect to the student logits: p * (g - mean)."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if KIND == FORWARD_KL:
        gradient = p - q
    else:
        if KIND == REVERSE_KL:
            g = log_p - log_q
        elif KIND == JS:
            g = (1.0 - share) * (log_p - tl.log(_mixture(p, q, share, KIND)))
        elif KIND == SKEW_KL:
            g = (share - 1.0) * (q / _mixture(p, q, share, KIND))
        else:
            m = _mixture(p, q, share, KIND)
            g = log_p - tl.log(m) - share * (p / m)
        gradient = _weighted(p, g - mean, MAY_BE_MASKED)
    return gradient


@triton.jit
def _log_probs(z, y, shared, softmax, inverse_t):
    """Return log p and log q. The maxima are subtracted first, so that large probabilities are exact."""
    z_max, _z_exp_sum, y_max = shared
    return (z - z_max) * inverse_t - softmax[0], (y - y_max) * inverse_t - softmax[1]


@triton.jit
def _ce_gradient(z, ids, label, full, factors, V_s):
    """Return the gradient of the weighted sum of all cross entropies: p - (smoothed one-hot labels)."""
    z_max, z_exp_sum, _z_sum = full
    weight, smoothed_weight = factors
    p = tl.exp(z - z_max) * (1.0 / z_exp_sum)
    return weight * p - tl.where(ids == label, weight - smoothed_weight, 0.0) - smoothed_weight / V_s


@triton.jit
def _store_gradient(gradient_row, model, ids, inside, z, gradient):
    """Multiply a gradient with the derivative of scale and softcap and store it."""
    _row_ptr, _readable, _bias_ptr, scale, softcap = model
    gradient *= scale
    if softcap is not None:
        tanh = z * (1.0 / softcap)
        gradient *= 1.0 - tanh * tanh
    tl.store(gradient_row + ids, gradient.to(gradient_row.dtype.element_ty), mask=inside)


@triton.jit
def _load_logits(model, ids, inside):
    """Return softcap * tanh(scale * (head output + bias) / softcap) of ids; `_NO_ID` where not `inside`."""
    row_ptr, readable, bias_ptr, scale, softcap = model
    z = tl.load(row_ptr + ids, mask=ids < readable, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + ids, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    if softcap is not None:
        decay = tl.exp(-2.0 * tl.abs(z * (1.0 / softcap)))
        z = tl.where(z < 0.0, -softcap, softcap) * ((1.0 - decay) / (1.0 + decay))
    return tl.where(inside, z, _NO_ID)


@triton.jit
def _mixture(p, q, share, KIND: tl.constexpr):
    """Return share * q + (1 - share) * p, or share * p + (1 - share) * q for skew reverse KL, clamped above 0."""
    if KIND == SKEW_REVERSE_KL:
        share = 1.0 - share
    return tl.maximum(share * q + (1.0 - share) * p, _SMALLEST_NORMAL)


@triton.jit
def _weighted(weights, values, MAY_BE_MASKED: tl.constexpr):
    """Return weights * values; an id with weight 0 gives 0, even if its value is infinite."""
    product = weights * values
    if MAY_BE_MASKED:
        product = tl.where(weights == 0.0, 0.0, product)
    return product


@triton.jit
def _rescaled(total, scale, MAY_BE_MASKED: tl.constexpr):
    """Return total * scale; 0 where scale is 0, even if an id with a logit of -inf made the total infinite."""
    return _weighted(scale, total, MAY_BE_MASKED)
