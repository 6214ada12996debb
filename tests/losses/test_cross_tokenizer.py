"""Losses for a teacher with another tokenizer: naive references, gradients, limits and errors."""

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch

from hf_distill import DistillError
from hf_distill.core.aligned_logits import AlignedLogits, CrossTokenizerLogits
from hf_distill.core.logits import DenseLogits, LazyLogits, SparseLogProbs
from hf_distill.core.signals import Signals
from hf_distill.core.targets import Targets
from hf_distill.core.token_classes import TokenClasses
from hf_distill.losses import LOSSES, alm, projected_kl, uld
from hf_distill.losses.analytic_gradients import BlockLogits, BufferPool
from hf_distill.losses.fused import ChunkedLoss
from hf_distill.losses.objective import objective

NAMES = ("alm", "projected_kl", "uld")
CHUNKS = [0, 0, -1, 1, 2, 2, 2, -1, 3]
# Class 5 has no id of the teacher and class 6 none of the student; class 0 has several ids of both.
STUDENT_CLASSES = [0, 1, 2, 0, 3, 5, 4, 0, 4, 5, 7]
TEACHER_CLASSES = [2, 0, 1, 0, 3, 6, 4, 2, 6, 6, 7, 0, 7]
CLASSES = TokenClasses(torch.tensor(STUDENT_CLASSES), torch.tensor(TEACHER_CLASSES), 8)


def logits(n, v, seed=0, dtype=torch.float64):
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(3).to(dtype)


def align(first_logits, log_probs=None, chunks=CHUNKS, classes=CLASSES):
    """Signals of a teacher with another tokenizer."""
    if isinstance(first_logits, torch.Tensor):
        first_logits = DenseLogits(first_logits)
    count = max(chunks) + 1
    first = torch.tensor([chunks.index(c) for c in range(count)], dtype=torch.long)
    if log_probs is None:
        log_probs = -logits(1, count, seed=2)[0].abs()
    return Signals(AlignedLogits(first_logits, log_probs, torch.tensor(chunks), first, classes, np.array(chunks)))


def targets_of(labels):
    labels = torch.as_tensor(labels)
    return Targets(labels, torch.arange(len(labels)), torch.zeros_like(labels), (1, len(labels)))


LABELS = targets_of([1, 0, 4, 2, 9, 8, 7, 3, 5])


def value_of(name, student, teacher, targets=LABELS, **options):
    return LOSSES[name].function(Signals(DenseLogits(student)), teacher, targets, **options)


def analytic(name, student, teacher, targets=LABELS, may_be_masked=False, **options):
    block = BlockLogits(student, None, targets.labels, BufferPool(), may_be_masked)
    values, gradient = LOSSES[name].gradient_fn(block.with_teacher(teacher.logits), **options)
    return values, gradient.clone()


def autograd(name, student, teacher, targets=LABELS, **options):
    student = student.detach().requires_grad_()
    values = value_of(name, student, teacher, targets, **options)
    return values.detach(), torch.autograd.grad(values.sum(), student)[0]


def assert_gradients_agree(name, student, teacher, targets=LABELS, **options):
    expected = autograd(name, student, teacher, targets, **options)
    for got, want in zip(analytic(name, student, teacher, targets, **options), expected, strict=True):
        torch.testing.assert_close(got, want)


def softmax(row, temperature=1.0):
    exps = [math.exp(x / temperature) for x in row]
    return [x / sum(exps) for x in exps]


def naive_alm(s, t, tau):
    a, b = math.exp(t / tau), math.exp(s / tau)
    return tau * (a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)))


def naive_projected_kl(p, q, student_classes=STUDENT_CLASSES, teacher_classes=TEACHER_CLASSES, temperature=1.0):
    shared = set(student_classes[: len(p)]) & set(teacher_classes[: len(q)])
    sums_p, sums_q = dict.fromkeys(shared, 0.0), dict.fromkeys(shared, 0.0)
    for sums, probs, classes in ((sums_p, p, student_classes), (sums_q, q, teacher_classes)):
        for prob, k in zip(probs, classes, strict=False):
            if k in shared:
                sums[k] += prob
    sums_p, sums_q = ({k: value ** (1 / temperature) for k, value in sums.items()} for sums in (sums_p, sums_q))
    total_p, total_q = sum(sums_p.values()), sum(sums_q.values())
    return sum(sums_q[k] / total_q * math.log(sums_q[k] / total_q / (sums_p[k] / total_p)) for k in shared)


def naive_uld(p, q):
    size = max(len(p), len(q))
    p, q = (sorted(x, reverse=True) + [0.0] * (size - len(x)) for x in (p, q))
    return sum(abs(x - y) for x, y in zip(p, q, strict=True))


def at_first(values, chunks=CHUNKS):
    first = {c: chunks.index(c) for c in chunks if c >= 0}
    return [values[c] if c >= 0 and first[c] == i else 0.0 for i, c in enumerate(chunks)]


@pytest.mark.parametrize("tau", [1.0, 3.0, 100.0])
def test_alm_is_the_kl_of_the_probabilities_of_chunks(tau):
    student, teacher = logits(9, 11), align(None)
    log_p = student.log_softmax(1).gather(1, LABELS.labels[:, None])[:, 0].tolist()
    sums = [sum(x for x, k in zip(log_p, CHUNKS, strict=True) if k == c) for c in range(4)]
    expected = [naive_alm(s, t, tau) for s, t in zip(sums, teacher.logits.log_probs.tolist(), strict=True)]
    assert value_of("alm", student, teacher, tau=tau).tolist() == pytest.approx(at_first(expected), rel=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("v_student", "v_teacher"), [(11, 13), (14, 16), (10, 12)])
def test_losses_on_first_tokens_are_their_formulas_also_with_padded_vocabularies(temperature, v_student, v_teacher):
    student, first = logits(9, v_student), logits(4, v_teacher, seed=1)
    rows = student[[0, 3, 4, 8]].tolist()
    pairs = [(softmax(row), softmax(other)) for row, other in zip(rows, first.tolist(), strict=True)]
    expected = [naive_projected_kl(*pair, temperature=temperature) for pair in pairs]
    got = value_of("projected_kl", student, align(first), temperature=temperature)
    assert got.tolist() == pytest.approx(at_first(expected), rel=1e-9)
    pairs = [
        (softmax(row, temperature), softmax(other, temperature))
        for row, other in zip(rows, first.tolist(), strict=True)
    ]
    got = value_of("uld", student, align(first), temperature=temperature)
    assert got.tolist() == pytest.approx(at_first([naive_uld(*pair) for pair in pairs]), rel=1e-9)


def test_the_temperature_of_projected_kl_does_not_depend_on_the_number_of_ids_of_a_class():
    """An id of the teacher that is divided into two halves changes nothing at any temperature."""
    student, first = logits(9, 11), logits(4, 13, seed=1)
    divided = first.clone()
    divided[:, 0] = first[:, 0] - math.log(2)
    divided = torch.cat([divided, divided[:, :1]], 1)
    classes = TokenClasses(CLASSES.student, torch.tensor([*TEACHER_CLASSES, TEACHER_CLASSES[0]]), CLASSES.count)
    expected = value_of("projected_kl", student, align(first), temperature=2.0)
    teacher = align(divided, classes=classes)
    torch.testing.assert_close(value_of("projected_kl", student, teacher, temperature=2.0), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunks", [CHUNKS, [0, 1, 2, 3], [-1, -1]])
@pytest.mark.parametrize("option", [1.0, 2.0])
def test_analytic_gradients_are_those_of_autograd_and_pass_gradcheck(name, chunks, option):
    options = {"tau" if name == "alm" else "temperature": option}
    count = max(chunks) + 1
    student, targets = logits(len(chunks), 11), LABELS.slice(slice(0, len(chunks)))
    teacher = align(logits(count, 13, seed=1), chunks=chunks)
    assert_gradients_agree(name, student, teacher, targets, **options)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: value_of(name, x, teacher, targets, **options), (student,))


@pytest.mark.parametrize("name", NAMES)
def test_tokens_in_no_chunk_have_no_loss_and_no_gradient(name):
    values, gradient = analytic(name, logits(9, 11), align(logits(4, 13, seed=1)))
    outside = [i for i, c in enumerate(CHUNKS) if c < 0]
    assert values[outside].abs().max() == 0
    assert gradient[outside].abs().max() == 0
    assert gradient[[0, 3, 4, 8]].abs().amax(1).min() > 0


def identical(v, dtype):
    same = torch.randperm(v, generator=torch.Generator().manual_seed(5))
    return TokenClasses(same, same, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_projected_kl_with_identical_tokenizers_is_forward_kl(dtype, temperature):
    student, first = logits(5, 300, dtype=dtype), logits(5, 300, seed=1, dtype=dtype)
    teacher = align(first, chunks=[0, 1, 2, 3, 4], classes=identical(300, dtype))
    block = BlockLogits(student, None, LABELS.labels[:5], BufferPool())
    values, gradient = LOSSES["forward_kl"].gradient_fn(block.with_teacher(first), temperature=temperature)
    got = analytic("projected_kl", student, teacher, LABELS.slice(slice(0, 5)), temperature=temperature)
    torch.testing.assert_close(got[0], values, rtol=0, atol=1e-6 * values.max().item())
    torch.testing.assert_close(got[1], gradient, rtol=0, atol=1e-6)
    torch.testing.assert_close(value_of("projected_kl", student, teacher, temperature=temperature), values)


def test_alm_with_identical_tokenizers_is_the_binary_kl_of_the_labels():
    student, first = logits(9, 11), logits(9, 11, seed=1)
    of_labels = [x.log_softmax(1).gather(1, LABELS.labels[:, None])[:, 0] for x in (student, first)]
    teacher = align(None, of_labels[1], chunks=list(range(9)))
    expected = [naive_alm(s, t, 1.0) for s, t in zip(*(x.tolist() for x in of_labels), strict=True)]
    assert value_of("alm", student, teacher, tau=1.0).tolist() == pytest.approx(expected)
    same = align(None, of_labels[0], chunks=list(range(9)))
    values, gradient = analytic("alm", student, same)
    assert max(values.abs().max(), gradient.abs().max()) < 1e-12


def exact_alm(s, t, tau):
    """The loss and its derivative by s, with 60 digits."""
    getcontext().prec = 60
    s, t, tau = Decimal(s), Decimal(t), Decimal(tau)
    a, b = (t / tau).exp(), (s / tau).exp()
    tail = (1 - a) * ((1 - a) / (1 - b)).ln() if a < 1 else 0
    return float(tau * (a * (a / b).ln() + tail)), float((b - a) / (1 - b))


@pytest.mark.parametrize("tau", [1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alm_is_precise_from_certain_to_impossible_chunks(tau, dtype):
    from hf_distill.losses.cross_tokenizer import match_likelihoods

    numbers = torch.tensor([-1e-6, -1e-4, -0.01, -0.7, -5.0, -80.0, -500.0], dtype=dtype)
    s, t = torch.meshgrid(numbers, torch.cat([numbers.new_zeros(1), numbers]), indexing="ij")
    values, derivative = match_likelihoods(s.reshape(-1), t.reshape(-1), tau)
    exact = [exact_alm(*pair, tau) for pair in zip(s.reshape(-1).tolist(), t.reshape(-1).tolist(), strict=True)]
    precision = {torch.float32: 2e-6, torch.float64: 1e-14}[dtype]
    for (value, slope), got, got_slope, scale in zip(
        exact, values.tolist(), derivative.tolist(), (s - t).abs().reshape(-1).tolist(), strict=True
    ):
        assert abs(got - value) <= precision * max(scale, 1e-9)  # equal s and t: rounding alone
        assert abs(got_slope - slope) <= precision * max(abs(slope), 1)


@pytest.mark.parametrize("tau", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("label_logit", [100.0, 17.0, 0.0, -100.0, -500.0])
@pytest.mark.parametrize("log_prob", [0.0, -0.5, -500.0, -math.inf])
def test_the_gradient_of_alm_is_finite_and_bounded_for_long_chunks(tau, label_logit, log_prob):
    chunks, labels = [*[0] * 50, 1], torch.zeros(51, dtype=torch.long)
    student = torch.zeros(51, 20)
    student[:, 0] = label_logit
    teacher = align(None, torch.tensor([log_prob, log_prob]), chunks=chunks)
    values, gradient = analytic("alm", student, teacher, targets_of(labels), tau=tau)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    assert values.min() >= 0
    # 1 - p(label) is rounded to multiples of 6e-8 in float32.
    assert gradient.abs().max() <= max(1.2 * min(tau, -log_prob), 1)


def test_alm_tends_to_a_limit_as_tau_grows():
    student, teacher = logits(9, 11), align(None)
    log_p = student.log_softmax(1).gather(1, LABELS.labels[:, None])[:, 0].tolist()
    sums = [-sum(x for x, k in zip(log_p, CHUNKS, strict=True) if k == c) for c in range(4)]
    minus_t = [-t for t in teacher.logits.log_probs.tolist()]
    limit = [t * math.log(t / s) - t + s for s, t in zip(sums, minus_t, strict=True)]
    assert value_of("alm", student, teacher, tau=1e6).tolist() == pytest.approx(at_first(limit), rel=1e-4)


def test_alm_leaves_out_chunks_whose_probability_is_unknown():
    student = logits(9, 11)
    known = align(None)
    unknown = align(None, known.logits.log_probs.where(torch.arange(4) != 2, torch.nan))
    values, gradient = analytic("alm", student, unknown)
    expected_values, expected_gradient = analytic("alm", student, known)
    assert values[4] == 0
    assert gradient[4:7].abs().max() == 0
    torch.testing.assert_close(values[:4], expected_values[:4])
    torch.testing.assert_close(gradient[[0, 1, 3, 8]], expected_gradient[[0, 1, 3, 8]])
    assert_gradients_agree("alm", student, unknown)


def sparse(first, k, temperature=1.0):
    log_probs, ids = (first / temperature).log_softmax(1).topk(k)
    tail = (1 - log_probs.exp().sum(1)).clamp(min=0).log()
    return SparseLogProbs(ids, log_probs, tail, temperature, vocab_size=first.shape[1])


@pytest.mark.parametrize("name", ["projected_kl", "uld"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_sparse_teacher_with_all_ids_has_the_loss_of_a_dense_teacher(name, temperature):
    student, first = logits(9, 11), logits(4, 13, seed=1)
    teacher = align(sparse(first, 13, temperature))
    if name == "projected_kl" and temperature != 1.0:
        for value in (value_of, analytic):
            with pytest.raises(DistillError, match="Set temperature to 1"):
                value(name, student, teacher, temperature=temperature)
        return
    got = value_of(name, student, teacher, temperature=temperature)
    torch.testing.assert_close(got, value_of(name, student, align(first), temperature=temperature))
    assert_gradients_agree(name, student, teacher, temperature=temperature)


def test_projected_kl_of_a_top_k_teacher_has_one_more_class_for_the_tail():
    student, first = logits(9, 11), logits(4, 13, seed=1)
    first[:, [5, 8, 9]] = -50.0  # ids that only the teacher has
    teacher = sparse(first, 4)
    expected = []
    for row, token in enumerate([0, 3, 4, 8]):
        stored = {TEACHER_CLASSES[i] for i in teacher.ids[row].tolist()}
        p = [x for x, k in zip(softmax(student[token].tolist()), STUDENT_CLASSES, strict=True) if k != 5]
        of_student = [k if k in stored else 9 for k in STUDENT_CLASSES if k != 5]
        of_teacher = [TEACHER_CLASSES[i] if i in teacher.ids[row].tolist() else 9 for i in range(13)]
        expected.append(naive_projected_kl(p, softmax(first[row].tolist()), of_student, of_teacher))
    got = value_of("projected_kl", student, align(teacher))
    assert got.tolist() == pytest.approx(at_first(expected), rel=1e-6)
    assert_gradients_agree("projected_kl", student, align(teacher))


def test_uld_of_a_top_k_teacher_compares_the_rest_as_one_number():
    student, first = logits(9, 11), logits(4, 13, seed=1)
    expected = []
    for row, token in enumerate([0, 3, 4, 8]):
        p, q = (sorted(softmax(x.tolist()), reverse=True) for x in (student[token], first[row]))
        expected.append(sum(abs(x - y) for x, y in zip(p[:3], q[:3], strict=True)) + abs(sum(p[3:]) - sum(q[3:])))
    got = value_of("uld", student, align(sparse(first, 3)))
    assert got.tolist() == pytest.approx(at_first(expected), rel=1e-9)
    assert_gradients_agree("uld", student, align(sparse(first, 3)))
    assert_gradients_agree("uld", student, align(sparse(first, 12)))


def test_projected_kl_of_a_sampled_teacher_has_the_gradient_of_projected_kl_and_uld_refuses_it():
    student, first = logits(1, 11), logits(1, 13, seed=1)
    first[:, [5, 8, 9]] = -50.0
    draws = torch.multinomial(first.softmax(1)[0], 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    ids, counts = draws.unique(return_counts=True)
    sampled = align(SparseLogProbs(ids[None], (counts / 4000).log()[None].double(), None), chunks=[0])
    targets = LABELS.slice(slice(0, 1))
    _, gradient = analytic("projected_kl", student, sampled, targets)
    _, expected = analytic("projected_kl", student, align(first, chunks=[0]), targets)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0.03)
    assert_gradients_agree("projected_kl", student, sampled, targets)
    for of in (autograd, analytic):
        with pytest.raises(DistillError, match="With a sampled teacher uld is biased"):
            of("uld", student, sampled, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["projected_kl", "uld"])
def test_masked_logits_of_both_models_give_finite_losses_and_gradients(name, dtype):
    student, first = logits(9, 11, dtype=dtype), logits(4, 13, seed=1, dtype=dtype)
    first[:, [1, 3, 11, 4]] = -torch.inf  # all ids of class 0, and the one of class 3
    student[:, [0, 3, 7, 4]] = -torch.inf
    student[:, 8] = -200.0  # far below the row's largest, in a class of two
    values, gradient = analytic(name, student, align(first), may_be_masked=True)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    finite = student.clamp(min=-1e4), first.clamp(min=-1e4)
    expected = analytic(name, finite[0], align(finite[1]))
    torch.testing.assert_close(values, expected[0])
    torch.testing.assert_close(gradient, expected[1])


def test_projected_kl_reaches_classes_that_the_student_finds_impossible():
    """Two classes of several ids are 200 nats below the largest logit, which float32 rounds to 0."""
    student, first = logits(9, 11, dtype=torch.float32), logits(4, 13, seed=1, dtype=torch.float32)
    student[:, [6, 8, 0, 3, 7]] -= 200
    values, gradient = analytic("projected_kl", student, align(first))
    expected = analytic("projected_kl", student.double(), align(first.double()))
    torch.testing.assert_close(values, expected[0].float())
    torch.testing.assert_close(gradient, expected[1].float(), rtol=1e-5, atol=1e-6)
    assert gradient[0, [6, 8]].max() < 0


NUMERALS = TokenClasses(  # the student has 1, 2, 3, 12, 123, a, b and the teacher b, a, 3, 2, 1
    torch.tensor([0, 1, 2, 0, 0, 3, 4]), torch.tensor([4, 3, 2, 1, 0]), 6
)


@pytest.mark.parametrize("name", NAMES)
def test_numerals_that_only_the_student_groups_are_not_pushed_down(name):
    """The fault that X-Token describes: "123" is one token of the student and three of the teacher."""
    student = torch.full((1, 7), -40.0, dtype=torch.float64)
    student[0, 4] = 0.0  # certain of 123
    first = torch.full((1, 5), -40.0, dtype=torch.float64)
    first[0, 4] = 0.0  # certain of 1, and then of 2 and of 3
    teacher = align(first, torch.full((1,), -1e-12, dtype=torch.float64), chunks=[0], classes=NUMERALS)
    values, gradient = analytic(name, student, teacher, targets_of([4]))
    assert values[0] == pytest.approx(0, abs=1e-9)
    assert gradient[0, 4] <= 1e-9
    uncertain = torch.zeros(1, 7, dtype=torch.float64)
    if name != "uld":  # which does not know what the teacher is certain of
        _, gradient = analytic(name, uncertain, teacher, targets_of([4]))
        assert gradient[0, 4] < 0 < gradient[0, 5]


def make_batch(hidden=False):
    """A student and a teacher of 9 and 6 target tokens, and targets."""
    labels = torch.tensor([1, 0, 4, 2, 9, 8, 7, 3, 5])
    teacher_labels, teacher_chunks = torch.tensor([3, 1, 12, 0, 7, 5]), torch.tensor([0, 1, 1, 2, 2, 3])
    student, teacher = logits(9, 11, dtype=torch.float32), logits(6, 13, seed=1, dtype=torch.float32)
    source = DenseLogits(teacher)
    if hidden:
        source = LazyLogits(torch.eye(6), teacher.t().contiguous())
    firsts = torch.tensor([0, 3, 4, 8])
    return (
        student,
        CrossTokenizerLogits(
            source,
            teacher_labels,
            teacher_chunks,
            torch.tensor([0, 1, 3, 5]),
            torch.tensor(CHUNKS),
            firsts,
            CLASSES,
            np.array(CHUNKS),
        ),
        targets_of(labels),
    )


def fused(name, chunk_tokens, options, hidden=False):
    student, teacher, targets = make_batch(hidden)
    student.requires_grad_()
    terms = objective(0.7, options.pop("run_temperature", 1.0), {"name": name, **options})
    chunked = ChunkedLoss(teacher, targets, terms, chunk_tokens=chunk_tokens)
    total = chunked.from_logits(DenseLogits(student))
    total.backward()
    return total.detach(), student.grad, chunked.per_token["soft"]


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_fused_loss_is_the_same_for_any_division_into_blocks(name, hidden):
    options = {"run_temperature": 2.0}
    student, teacher, targets = make_batch()
    aligned = teacher.aligned(True, True, 100)
    temperature = {} if name == "alm" else {"temperature": 2.0}
    expected = value_of(name, student, Signals(aligned), targets, **temperature) * (1 if name == "alm" else 4)
    whole = fused(name, 100, {**options})
    torch.testing.assert_close(whole[2], expected)
    for chunk_tokens in (1, 2, 4):
        for got, want in zip(fused(name, chunk_tokens, {**options}, hidden), whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_fused_gradients_are_those_of_autograd():
    student, teacher, targets = make_batch()
    student.requires_grad_()
    aligned = Signals(teacher.aligned(True, True, 100))
    signals = Signals(DenseLogits(student))
    hard = torch.nn.functional.cross_entropy(student, targets.labels, reduction="none")
    soft = alm(signals, aligned, targets)
    others = projected_kl(signals, aligned, targets, temperature=2.0) * 4 + 0.5 * uld(signals, aligned, targets)
    (0.7 * soft + 0.3 * hard + others).mean().backward()
    expected, student.grad = student.grad, None
    losses = [
        {"name": "projected_kl", "temperature": 2.0},
        {"name": "uld", "weight": 0.5},
    ]
    ChunkedLoss(teacher, targets, objective(0.7, 1.0, "alm", losses)).from_logits(DenseLogits(student)).backward()
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("name", NAMES)
def test_losses_on_chunks_refuse_a_teacher_with_the_tokenizer_of_the_student(name):
    student = logits(9, 11)
    with pytest.raises(DistillError, match=f"{name} compares spans of text with a teacher of another tokenizer"):
        value_of(name, student, Signals(DenseLogits(logits(9, 11, seed=1))))
    loss = ChunkedLoss(DenseLogits(logits(9, 11, seed=1)), LABELS, objective(0.5, 1.0, name))
    with pytest.raises(DistillError, match="use a divergence such as forward_kl, or set cross_tokenizer"):
        loss.from_logits(DenseLogits(student))


@pytest.mark.parametrize("name", ["js", "forward_kl", "total_variation"])
def test_divergences_refuse_a_teacher_with_another_tokenizer(name):
    student, teacher, targets = make_batch()
    message = r"another tokenizer.*use a loss on chunks \(alm, projected_kl or uld\)"
    with pytest.raises(DistillError, match=message):
        LOSSES[name].function(Signals(DenseLogits(student)), align(logits(4, 13)), targets)
    with pytest.raises(DistillError, match=message):
        ChunkedLoss(teacher, targets, objective(0.5, 1.0, name)).from_logits(DenseLogits(student))


@pytest.mark.parametrize("name", NAMES)
def test_models_in_different_precisions_are_compared_in_that_of_the_student(name):
    student, teacher = logits(9, 11), align(logits(4, 13, seed=1, dtype=torch.bfloat16))
    expected = value_of(name, student, align(logits(4, 13, seed=1, dtype=torch.bfloat16).double()))
    torch.testing.assert_close(value_of(name, student, teacher), expected)
    torch.testing.assert_close(analytic(name, student, teacher)[0], expected)


def test_options_of_losses_on_chunks_are_checked():
    for spec, message in (
        ({"name": "alm", "tau": 0}, "tau is 0; it must be above 0"),
        ({"name": "alm", "temperature": 1.0}, "no option 'temperature'"),
        ({"name": "projected_kl", "tau": 1.0}, "no option 'tau'"),
    ):
        with pytest.raises(DistillError, match=message):
            objective(0.5, 1.0, spec)
    with pytest.raises(DistillError, match=r"stored at temperature 2\.0 and the loss has temperature 1.0"):
        value_of("uld", logits(9, 11), align(sparse(logits(4, 13), 3, 2.0)))
