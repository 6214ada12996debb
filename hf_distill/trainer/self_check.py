"""A look at the first batch: what is about to be trained is the objective that was asked for.

On 32 of its target tokens the fused head's losses, total and gradient must be those of a plain reference: materialized
logits, the losses as they are defined, autograd, and the weights and T^2 that the arguments say. On a few more
positions, the losses must be those of the logits that the unmodified forwards of student and teacher returned.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.logits import DenseLogits, LazyLogits, MultiTeacherLogits, SparseLogProbs, compute_dtype, named_sources
from ..core.signals import Signals
from ..core.targets import IGNORE_INDEX, Targets
from ..errors import RunError
from ..losses.fused import ChunkedLoss
from ..losses.objective import Term
from ..models.output_head import LogitSample, known_output_head
from .config import DistillArguments

TOKENS = 32
_CLOSE = 1e-2  # of the largest value: TF32 and bf16 differ by thousandths, another objective by more
_NATS = 1e-4  # what cancels in float32 where student and teacher are alike, before T^2
_ROUNDINGS = 64  # of a logit in float32, which a gradient may err by where its parts cancel
_TILE = 4096  # rows of the head that are held in float32 at a time


@dataclass(frozen=True)
class SelfCheck:
    """To be called with the first batch's job; see `Distiller.pre_loss_hook`.

    fields: the arguments that the objective was made of
    inputs: the collator's batch
    shift:  whether predictions stand one position before their labels
    student, teacher: the models whose own logits are compared with, where there are such
    """

    fields: DistillArguments
    inputs: dict
    shift: bool
    student: nn.Module | None = None
    teacher: nn.Module | None = None

    def __call__(self, job: ChunkedLoss, said: LazyLogits | DenseLogits, told: Signals, asked: Targets) -> None:
        """Compare.

        Args:
            job: of the student's head.
            said: source of the student's logits.
            told: what the teacher says.
            asked: the tokens that the batch asks.

        Raises:
            RunError: something is not as it should be; says what.
        """
        problems = [*self._asked(asked), *_graphs(told)]
        if len(job.targets):
            problems += self._losses(*_some(job, said))
            problems += self._unmodified(job, said)
        if problems:
            raise RunError(
                f"The self-check of the first batch failed: {'; '.join(problems)}. Training would not follow the "
                "objective that was asked for. A loss of your own that looks beyond its token or draws random numbers "
                "fails it too; self_check=False (--no-self-check) leaves it out."
            )

    def _asked(self, asked: Targets) -> list[str]:
        """The batch's labels, counted anew."""
        if self.inputs.get("shift_labels") is not None and self.shift:
            wanted = self.inputs["shift_labels"] != IGNORE_INDEX
        else:
            labels, mask = self.inputs["labels"], self.inputs.get("attention_mask")
            wanted = labels != IGNORE_INDEX
            if self.shift:
                wanted = wanted[..., 1:]
                if mask is not None and mask.shape == labels.shape:
                    wanted = wanted & (mask[..., :-1] != 0)  # nothing is predicted from padding
        count = int(wanted.sum())
        return [] if count == len(asked) else [f"{len(asked)} tokens are asked, but the labels ask {count}"]

    def _losses(self, job: ChunkedLoss, said: LazyLogits | DenseLogits) -> list[str]:
        given: Tensor = said.hidden if isinstance(said, LazyLogits) else said.values
        with torch.enable_grad(), torch.autocast(given.device.type, enabled=False):
            leaf = given.detach().requires_grad_()
            total = (
                job.from_hidden(replace(said, hidden=leaf)) if isinstance(said, LazyLogits) else job.from_logits(leaf)
            )
            (gradient,) = torch.autograd.grad(total, leaf)
            values, by_logits = self._reference(job, _logits(said))
        problems = []
        for term in job.terms:
            if not _close(job.per_token[term.name], values[term.name], _NATS * self._scale(term)):
                fused, plain = job.per_token[term.name].mean(), values[term.name].mean()
                problems.append(f"{term.name} is {fused:.6g} in the fused head and {plain:.6g} by its definition")
        factors = {term.name: self._weight(term) for term in job.terms}
        expected = sum(factor * values[name].sum() for name, factor in factors.items()) / len(job.targets)
        size = sum(abs(self._weight(term)) * self._scale(term) for term in job.terms)
        if not _close(total.detach(), torch.as_tensor(expected), _NATS * max(size, 1)):
            told = ", ".join(f"{name} {factor:g}" for name, factor in factors.items())
            problems.append(f"the loss is {total:.6g}, but {expected:.6g} with the weights that were asked for: {told}")
        logits = said.project() if isinstance(said, LazyLogits) else said.values
        finite = logits.masked_fill(~logits.isfinite(), 0)
        rounding = _ROUNDINGS * torch.finfo(torch.float32).eps * float(finite.abs().max()) * size / len(job.targets)
        if isinstance(said, LazyLogits):
            by_logits = _by_hidden(by_logits, said)
            rounding *= max(float(tile.abs().max()) for tile in said.weight.split(_TILE)) * abs(said.scaling.scale)
        if not _close(gradient, by_logits, 1e-6 + rounding):
            problems.append("the fused head's gradient is not that of the loss")
        return problems

    @torch.no_grad()
    def _unmodified(self, job: ChunkedLoss, said: LazyLogits | DenseLogits) -> list[str]:
        """The losses from lazy logits beside those from the logits that the models themselves returned."""
        student = _sample_of(self.student) if isinstance(said, LazyLogits) else None
        if student is None or not isinstance(said, LazyLogits):
            return []
        teacher = _sample_of(self.teacher) if isinstance(job.teacher, LazyLogits) else None
        count = min(len(job.targets), len(student.logits), len(student.logits if teacher is None else teacher.logits))
        rows, device = slice(count), said.hidden.device
        lazy: Any = _rows_of(job.teacher, rows)
        own = {name: _told(source) for name, source in named_sources(lazy).items()}
        if teacher is not None and isinstance(job.teacher, LazyLogits):
            hidden = teacher.hidden[rows].to(job.teacher.hidden)
            lazy, own = (
                replace(job.teacher, hidden=hidden),
                {None: Signals(DenseLogits(teacher.logits[rows].to(device)))},
            )
        targets = job.targets.slice(rows)
        few = replace(job, teacher=lazy, targets=targets, statistics=0, chunk_tokens=None, num_items=None, per_token={})
        few.from_hidden(replace(said.detach(), hidden=student.hidden[rows].to(said.hidden)))
        logits = student.logits[rows].to(device)
        largest = max(float(s.logits.where(s.logits.isfinite(), 0).abs().max()) for s in (student, teacher) if s)
        rounding = 4 * max(s.eps for s in (student, teacher) if s) * largest
        problems = []
        for term in job.terms:
            plain = term.loss.function(Signals(DenseLogits(logits)), own.get(term.teacher), targets, **term.options)
            plain = plain if term.loss.needs or targets.has_label_mask is None else plain * targets.has_label_mask
            plain, scale = plain * self._scale(term), self._scale(term)
            if not _close(few.per_token[term.name], plain, (_NATS + rounding) * scale):
                problems.append(
                    f"{term.name} is {few.per_token[term.name].mean():.6g} in the fused head, and {plain.mean():.6g} "
                    "from the logits that the unmodified models return"
                )
        return problems

    def _weight(self, term: Term) -> float:
        """What the arguments say; of terms that a teacher made, what it says."""
        return {"soft": self.fields.alpha, "hard": 1 - self.fields.alpha}.get(term.name, term.weight)

    def _scale(self, term: Term) -> float:
        """T^2, by the arguments."""
        if "temperature" not in term.options:
            return 1.0
        divergence = self.fields.divergence
        own = divergence.get("temperature") if isinstance(divergence, dict) else None
        asked = self.fields.temperature if own is None else own
        return (asked if term.name == "soft" else term.options["temperature"]) ** 2

    def _reference(self, job: ChunkedLoss, made: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Each term's values by its definition, [n], and the gradient of their weighted mean by the raw logits."""
        raw, logits = made
        heard = {name: _told(source) for name, source in named_sources(job.teacher).items()}
        values, total = {}, raw.new_zeros(())
        for term in job.terms:
            own = term.loss.function(Signals(DenseLogits(logits)), heard.get(term.teacher), job.targets, **term.options)
            if not term.loss.needs and job.targets.has_label_mask is not None:
                own = own * job.targets.has_label_mask
            values[term.name] = own.detach() * self._scale(term)
            if self._weight(term):
                total = total + self._weight(term) * self._scale(term) * own.sum() / len(job.targets)
        if not total.requires_grad:
            return values, torch.zeros_like(raw)
        return values, torch.autograd.grad(total, raw)[0]


def _some(job: ChunkedLoss, said: LazyLogits | DenseLogits) -> tuple[ChunkedLoss, LazyLogits | DenseLogits]:
    """The same of 32 tokens, from all over the batch, in two chunks."""
    step = max(1, len(job.targets) // TOKENS)
    rows = slice(0, step * TOKENS, step)
    teacher = _rows_of(job.teacher, rows)
    targets = job.targets.slice(rows)
    some = replace(job, teacher=teacher, targets=targets, statistics=0, chunk_tokens=TOKENS // 2, num_items=None)
    return replace(some, per_token={}), _block(said, rows)


def _sample_of(model: nn.Module | None) -> LogitSample | None:
    known = None if model is None else known_output_head(model)
    return None if known is None else known.sample


def _rows_of(teacher: Any, rows: slice) -> Any:
    if isinstance(teacher, MultiTeacherLogits):
        return MultiTeacherLogits({name: _block(source, rows) for name, source in teacher.sources.items()})
    return None if teacher is None else _block(teacher, rows)


def _block(source, rows: slice):
    if isinstance(source, SparseLogProbs):
        return source.slice(rows)
    if isinstance(source, LazyLogits):
        return replace(source.detach(), hidden=source.hidden[rows].detach())
    return DenseLogits(source.values[rows].detach())


def _logits(said: LazyLogits | DenseLogits) -> tuple[Tensor, Tensor]:
    """What the head itself puts out, as a leaf, and the logits that follow from it."""
    if isinstance(said, DenseLogits):
        raw = said.values.detach().to(compute_dtype(said.values)).requires_grad_()
        return raw, raw
    dtype = compute_dtype(said.hidden, said.weight)
    hidden = said.hidden.to(dtype)
    with torch.no_grad():
        raw = torch.cat([hidden @ tile.to(dtype).t() for tile in said.weight.split(_TILE)], dim=1)
        if said.bias is not None:
            raw += said.bias
    logits = raw.requires_grad_() * said.scaling.scale
    cap = said.scaling.softcap
    return raw, logits if cap is None else cap * torch.tanh(logits / cap)


def _by_hidden(gradient: Tensor, said: LazyLogits) -> Tensor:
    """[n, H] of a gradient by what the head puts out, [n, V]."""
    tiles = zip(gradient.split(_TILE, dim=1), said.weight.split(_TILE), strict=True)
    return torch.stack([part @ tile.to(part.dtype) for part, tile in tiles]).sum(0)


def _told(source: LazyLogits | DenseLogits | SparseLogProbs) -> Signals:
    return Signals(source if isinstance(source, SparseLogProbs) else DenseLogits(source.project()))


def _graphs(told: Signals) -> list[str]:
    """A teacher's answer that carries a graph would be trained."""
    sources = named_sources(told.logits).values()
    tensors = [t for s in sources for t in vars(s).values() if isinstance(t, Tensor)] + [*told.features.values()]
    return ["the teacher's answer carries a gradient"] if any(t.requires_grad for t in tensors) else []


def _close(one: Tensor, other: Tensor, least: float = 1e-6) -> bool:
    """Equal, but for rounding; both not finite is for others to say."""
    one, other = one.double(), other.double().to(one.device)
    largest = torch.maximum(one.abs().max(), other.abs().max())
    return not largest.isfinite() or bool((one - other).abs().max() <= _CLOSE * largest + least)
