"""Losses for a teacher with another tokenizer. They compare chunks: spans of text that both tokenizers delimit.

Shape letters: see `core/targets.py`, and C chunks. The value of a chunk stands at its first token; the other tokens of
the chunk, and tokens in no chunk, have 0. p and q are the distributions of student and teacher over what follows the
same text, at the first token of a chunk: softmax(logits / temperature) of each model over its own ids.
"""

import torch
from torch import Tensor

from ..core.aligned_logits import AlignedLogits
from ..core.logits import SparseLogProbs
from ..core.loss_kinds import CHUNK_LOG_PROBS, FIRST_LOGITS
from ..core.options import POSITIVE
from ..core.signals import Signals
from ..core.targets import Targets
from ..errors import DistillError
from .alignment import LOG_ZERO, check_temperature, dense_logits
from .class_logits import class_logits, class_maps, sparse_class_log_probs
from .divergences import forward_kl
from .registry import loss

ALM_TAU = 100.0  # default of the option


@loss("alm", compares=(CHUNK_LOG_PROBS,), paper="2503.20083", limits={"tau": POSITIVE})
def alm(student: Signals, teacher: Signals, targets: Targets, *, tau: float = ALM_TAU) -> Tensor:
    """Approximate likelihood matching: both models give each chunk of text the same probability.

    tau * KL(Bernoulli(exp(t / tau)) || Bernoulli(exp(s / tau)))

    s and t are the log-probabilities of the chunk's text by student and teacher: sums over the tokens of each. Only the
    probabilities of the tokens of the text are compared, so any teacher that returns these can be used. As tau grows,
    the loss tends to |t| * log(|t| / |s|) - |t| + |s|: the factor tau, which the paper does not have, keeps its scale.

    Args:
        student: signals with the student logits [T, V_s].
        teacher: signals with `AlignedLogits`; a chunk whose log-probability is NaN (unknown) has the loss 0.
        targets: T target tokens.
        tau: temperature of the probabilities of chunks.

    Returns:
        [T] in nats; 0 where s = t.

    Raises:
        DistillError: the teacher has the student's tokenizer.

    Source: Minixhofer, Vulic, Ponti, arXiv 2503.20083, without their debiasing of chunk ends.
    """
    chunks = aligned_logits("alm", teacher)
    log_probs = torch.log_softmax(dense_logits(student), -1).gather(1, targets.labels[:, None])[:, 0]
    values, _ = match_likelihoods(chunk_sums(log_probs, chunks), chunk_log_probs(chunks).to(log_probs), tau)
    return at_first_tokens(values, chunks)


@loss("projected_kl", compares=(FIRST_LOGITS,), paper="2605.21699")
def projected_kl(student: Signals, teacher: Signals, targets: Targets, *, temperature: float = 1.0) -> Tensor:
    """Forward KL of the probabilities of classes of ids that both tokenizers have.

    sum_k Q(k) * (log Q(k) - log P(k)), P = softmax(log of sum_{v in k} p(v) / temperature), Q likewise of q

    p and q are at temperature 1 here: the temperature is that of the classes. A sum of probabilities at a higher
    temperature would grow with the number of ids in a class, of which the larger vocabulary has more.

    Ids of the same text are a class, and an id that only one tokenizer has is in the class of its longest beginning
    that both have: "123" is in the class of "1" if the other tokenizer has single digits. Classes of which one model
    has no id are left out, and the others are renormalized. With identical tokenizers it is forward KL.

    A top-k teacher is compared over the classes of its stored ids and one more entry for everything else. A sampled
    teacher's gradient is unbiased, as with forward KL.

    Args:
        student: signals with the student logits [T, V_s].
        teacher: signals with `AlignedLogits`.
        targets: not used.
        temperature: T, divides the logits of the classes of both models.

    Returns:
        [T] in nats; 0 where P = Q.

    Raises:
        DistillError: the teacher has the student's tokenizer, or it is sparse and the temperature is not 1.

    Source: the P-KL of X-Token, arXiv 2605.21699, with a partition of the ids in place of a weighted projection.
    """
    chunks = aligned_logits("projected_kl", teacher)
    logits = dense_logits(student)[chunks.first_tokens]
    first_logits = teacher_first_logits(chunks, temperature, logits)
    vocab_size = vocab_size_of_teacher(chunks)
    student_class_map, teacher_class_map = class_maps(chunks.token_classes, logits.shape[1], vocab_size, logits.device)
    teacher_class_logits: Signals | Tensor
    if isinstance(first_logits, SparseLogProbs):
        check_is_at_temperature_1(temperature)
        teacher_class_logits = Signals(sparse_class_log_probs(first_logits, teacher_class_map))
    else:
        teacher_class_logits = class_logits(first_logits, teacher_class_map).logits
    values = forward_kl(class_logits(logits, student_class_map).logits, teacher_class_logits, temperature=temperature)
    return at_first_tokens(values, chunks)


@loss("uld", compares=(FIRST_LOGITS,), paper="2402.12030")
def uld(student: Signals, teacher: Signals, targets: Targets, *, temperature: float = 1.0) -> Tensor:
    """Universal logit distillation: L1 distance of the sorted probabilities of both models, in [0, 2] (not in nats).

    sum_i |p_(i) - q_(i)|, where (i) is the i-th largest; the shorter distribution is padded with 0

    It compares how certain both models are, and not of what. A top-k teacher's K probabilities are compared with the
    student's K largest, and the rest of both as one number.

    Args:
        student: signals with the student logits [T, V_s].
        teacher: signals with `AlignedLogits`.
        targets: not used.
        temperature: T, divides the logits of both models.

    Returns:
        [T], in [0, 2].

    Raises:
        DistillError: the teacher has the student's tokenizer, or its sparse probabilities were sampled or have another
            temperature.

    Source: Boizard et al., arXiv 2402.12030.
    """
    chunks = aligned_logits("uld", teacher)
    probs = torch.softmax(dense_logits(student)[chunks.first_tokens] / temperature, -1)
    sorted_probs = probs.sort(-1, descending=True).values
    first_logits = teacher_first_logits(chunks, temperature, probs)
    if isinstance(first_logits, SparseLogProbs):
        teacher_probs, tail = sorted_sparse_probs(first_logits, sorted_probs)
        count = min(teacher_probs.shape[1], probs.shape[1])
        tail_difference = (sorted_probs[:, count:].sum(1) - tail).abs()
        sorted_probs = sorted_probs[:, :count]
    else:
        teacher_probs = torch.softmax(first_logits / temperature, -1).sort(-1, descending=True).values
        tail_difference = torch.zeros_like(probs[:, 0])
    missing = teacher_probs.shape[1] - sorted_probs.shape[1]
    sorted_probs = torch.nn.functional.pad(sorted_probs, (0, max(missing, 0)))
    teacher_probs = torch.nn.functional.pad(teacher_probs, (0, max(-missing, 0)))
    return at_first_tokens((sorted_probs - teacher_probs).abs().sum(1) + tail_difference, chunks)


def aligned_logits(name: str, teacher: Signals | None) -> AlignedLogits:
    """Return the chunks that a loss compares.

    Args:
        name: name of the loss, for the message.
        teacher: signals of the teacher.

    Raises:
        DistillError: the teacher has the student's tokenizer.
    """
    if isinstance(teacher, Signals) and isinstance(teacher.logits, AlignedLogits):
        return teacher.logits
    raise DistillError(
        f"{name} compares spans of text with a teacher of another tokenizer, and this teacher has the student's "
        "tokenizer: use a divergence such as forward_kl, or set cross_tokenizer if the tokenizers differ."
    )


def check_is_at_temperature_1(temperature: float) -> None:
    """Check the temperature of `projected_kl` with a sparse teacher.

    Raises:
        DistillError: it is not 1.
    """
    if temperature != 1.0:
        raise DistillError(
            f"projected_kl has temperature {temperature:g}, and the teacher returns the probabilities of some ids, "
            "whose sums over classes of ids are known at temperature 1 only. Set temperature to 1, or use a teacher "
            "that returns all logits."
        )


def chunk_log_probs(chunks: AlignedLogits) -> Tensor:
    """Return the teacher's log-probability of each chunk, [C].

    Raises:
        DistillError: they were not computed.
    """
    if chunks.log_probs is None:
        raise DistillError("The teacher returned no log-probabilities of chunks: compare first_logits instead.")
    return chunks.log_probs.detach()


def teacher_first_logits(chunks: AlignedLogits, temperature: float, like: Tensor) -> Tensor | SparseLogProbs:
    """Return the teacher's logits of the first token of each chunk: [C, V_t], or sparse log-probabilities.

    Args:
        chunks: of a batch or block.
        temperature: of the loss, for the check that sparse log-probabilities were stored at it.
        like: tensor of the device, and for logits of the dtype, that are returned.

    Raises:
        DistillError: they were not computed, or the temperature is another one.
    """
    if chunks.first_logits is None:
        raise DistillError("The teacher returned no logits of the first tokens of chunks: use the loss alm.")
    if not temperature > 0:
        raise DistillError(f"temperature is {temperature}; it must be a positive number")
    if isinstance(chunks.first_logits, SparseLogProbs):
        check_temperature(chunks.first_logits, temperature)
        return chunks.first_logits.to(like.device)
    return dense_logits(Signals(chunks.first_logits)).detach().to(like)


def vocab_size_of_teacher(chunks: AlignedLogits) -> int:
    """Return the number of ids of the teacher."""
    vocab_size = None if chunks.first_logits is None else chunks.first_logits.vocab_size
    return len(chunks.token_classes.teacher) if vocab_size is None else vocab_size


def chunk_sums(values: Tensor, chunks: AlignedLogits) -> Tensor:
    """Return the sum of values over the tokens of each chunk, [C].

    Args:
        values: [T].
        chunks: of T target tokens.
    """
    count = len(chunks)
    slots = chunks.chunks.where(chunks.chunks >= 0, count)
    return values.new_zeros(count + 1).index_add(0, slots, values)[:count]


def at_first_tokens(values: Tensor, chunks: AlignedLogits) -> Tensor:
    """Return the values of chunks at their first tokens, and 0 at other tokens, [T].

    Args:
        values: [C].
        chunks: of T target tokens.
    """
    return values.new_zeros(len(chunks.chunks)).index_copy(0, chunks.first_tokens, values)


def match_likelihoods(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Return the loss `alm` of chunks and its derivative with respect to the student's log-probabilities.

    With a = exp(t / tau) and b = exp(s / tau), the loss is a * (t - s) + tau * (1 - a) * log((1 - a) / (1 - b)), and
    its derivative (1 - a) / (1 - b) - 1. 1 - a and 1 - b are computed by expm1: at tau = 100 they are about 1e-3, and
    would lose half their digits as differences.

    Args:
        student: [C] log-probabilities s. They are at most -eps / 2, the largest one below 0 that a softmax of their
            dtype distinguishes from 0, so that the derivative is finite.
        teacher: [C] log-probabilities t; NaN if unknown, which gives 0.
        tau: temperature.

    Returns:
        (loss [C], derivative [C]).
    """
    is_known = ~teacher.isnan()
    t = teacher.where(is_known, -1.0).clamp(max=0)
    s = student.clamp(max=-torch.finfo(student.dtype).eps / 2)
    a, complement = (t / tau).exp(), -(t / tau).expm1()
    ratio = complement / -(s / tau).expm1()
    # An improbable chunk has a = 0 and t - s may be infinite.
    values = torch.where(a > 0, a * (t - s), 0) + tau * complement * ratio.clamp(min=torch.finfo(s.dtype).tiny).log()
    return values.where(is_known, 0), (ratio - 1).where(is_known, 0)


def sorted_sparse_probs(teacher: SparseLogProbs, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stored probabilities of a top-k teacher, sorted from the largest, [C, K], and their rest, [C].

    Args:
        teacher: K log-probabilities of each chunk.
        like: tensor of the dtype that is returned.

    Raises:
        DistillError: the teacher was sampled.
    """
    if teacher.log_tail is None:
        raise DistillError(
            "With a sampled teacher uld is biased, because it compares the largest probabilities: use projected_kl or "
            "alm, or a cache of another kind (hidden, top_k)."
        )
    probs = teacher.log_probs.to(like.dtype).clamp(min=LOG_ZERO).exp()
    return probs.sort(-1, descending=True).values, teacher.log_tail.to(like.dtype).clamp(min=LOG_ZERO).exp()
